"""The embedded models load from the package, keep the pipeline contract, and their pictures are what was asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import diffsamp.models as models
from diffsamp.errors import DiffsampError
from diffsamp.models import registry, weights


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    pipeline = models.load("fashion")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def judge():
    return models.classifier()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def to_uint8(sample: torch.Tensor) -> torch.Tensor:
    return ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class Calls:
    """Counts network calls and remembers the labels and batch sizes."""

    def __init__(self, unet):
        self.sizes, self.labels = [], []
        self.handle = unet.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.sizes.append(len(args[0]))
        self.labels.append(args[2].tolist())


@pytest.fixture
def calls(pipe):
    counter = Calls(pipe.unet)
    yield counter
    counter.handle.remove()


def test_shipped_files_are_within_their_sizes_and_match_their_fingerprints():
    for name, limit in (("fashion", 8), ("fashion-cnn", 2), ("fashion-reference", 3)):
        facts = weights.read_config(name)
        content = (weights.FOLDER / facts["weights"]).read_bytes()
        assert len(content) <= limit * 2**20, name
        assert hashlib.sha256(content).hexdigest() == facts["sha256"], name


def test_importing_the_registry_loads_no_diffusers():
    code = (
        "import sys, diffsamp.models as m; m.classifier(); "
        "assert not {'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    models.load("fashion")
    models.load("fashion-cnn")
    assert torch.equal(before, torch.get_rng_state())


def test_sixteen_pictures_in_ten_steps(pipe, calls):
    images = pipe(
        [i % 10 for i in range(16)], num_inference_steps=10, guidance_scale=2.0, generator=generators(*range(16))
    ).images
    assert len(images) == 16 and {image.size for image in images} == {(28, 28)} and images[0].mode == "L"
    assert calls.sizes == [32] * 10  # one call per step, both halves in it
    assert calls.labels[0] == [10] * 16 + [i % 10 for i in range(16)]  # unconditional half first
    assert all(np.ptp(np.asarray(image)) > 100 for image in images)


def test_a_guidance_scale_of_one_runs_half_the_network(pipe, calls):
    pipe([0, 1, 2], num_inference_steps=3, guidance_scale=1.0, generator=generators(0, 1, 2), output_type="latent")
    assert calls.sizes == [3] * 3 and not pipe.do_classifier_free_guidance
    pipe(None, num_inference_steps=2, num_images_per_prompt=2, generator=generators(0, 1), output_type="latent")
    assert calls.labels[-1] == [10, 10]


def test_guidance_is_the_linear_combination_of_both_predictions(pipe):
    # With one DDIM step the sample is linear in the prediction, so samples combine as predictions do.
    latents = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    scheduler = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, timestep_spacing="leading", steps_offset=600
    )
    try:

        def sample(label, scale):
            return pipe(label, scale, num_inference_steps=1, latents=latents, output_type="latent").images

        unconditional, conditional = sample(None, 1.0), sample(7, 1.0)
        expected = unconditional + 3.0 * (conditional - unconditional)
        assert torch.allclose(sample(7, 3.0), expected, atol=1e-5)
        assert (conditional - unconditional).abs().max() > 1e-3
    finally:
        pipe.scheduler = scheduler


def test_a_seed_gives_the_same_picture_in_any_batch_and_order(pipe):
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "latent"}
    together = pipe([3, 8, 5, 0], generator=generators(11, 12, 13, 14), **options).images
    again = pipe([3, 8, 5, 0], generator=generators(11, 12, 13, 14), **options).images
    assert torch.equal(together, again)
    backwards = pipe([0, 5, 8, 3], generator=generators(14, 13, 12, 11), **options).images.flip(0)
    assert torch.allclose(together, backwards, atol=1e-5)
    alone = pipe(8, generator=generators(12), **options).images
    assert torch.allclose(together[1:2], alone, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_any_stock_scheduler_runs(pipe, name):
    scheduler = pipe.scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(scheduler.config)
    try:
        sample = pipe(["bag"], num_inference_steps=8, generator=generators(3), output_type="latent").images
    finally:
        pipe.scheduler = scheduler
    assert sample.shape == (1, 1, 28, 28) and torch.isfinite(sample).all()
    assert sample.abs().max() < 3 and sample.std() > 0.2


def test_own_timesteps_latents_and_callback_are_used(pipe, calls):
    seen = []

    def callback(pipeline, i, t, tensors):
        seen.append((i, float(t)))
        return {"latents": tensors["latents"] * 0 + 0.5} if i == 1 else {}

    result = pipe(
        "Sneaker",
        timesteps=[900, 400],
        latents=torch.zeros(1, 1, 28, 28),
        output_type="np",
        return_dict=False,
        callback_on_step_end=callback,
    )
    assert seen == [(0, 900.0), (1, 400.0)] and pipe.num_timesteps == 2
    assert result[0].shape == (1, 28, 28, 1) and np.allclose(result[0], 0.75)


def test_a_saved_pipeline_comes_back_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "ClassConditionalPipeline"
    again = models.ClassConditionalPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.classes == pipe.classes and type(again.scheduler) is type(pipe.scheduler)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    first = pipe("Ankle boot", generator=generators(1), **options).images
    assert torch.allclose(first, again("Ankle boot", generator=generators(1), **options).images, atol=1e-5)


def test_samples_belong_to_the_classes_that_were_asked_for(pipe, judge):
    # 60 seeded pictures: a fixed set, so this fails only when the model, the sampler or the judge changes.
    labels = [i % 10 for i in range(60)]
    sample = pipe(labels, num_inference_steps=12, generator=generators(*range(60)), output_type="latent").images
    right = judge(to_uint8(sample)).argmax(1) == torch.tensor(labels)
    assert right.float().mean() >= 0.9
    unconditional = pipe(None, num_images_per_prompt=20, num_inference_steps=8, output_type="latent").images
    assert len(judge(to_uint8(unconditional)).argmax(1).unique()) >= 3


def test_the_judge_takes_bytes_and_floats_alike_and_one_picture_at_a_time(judge):
    pictures = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = judge.features(pictures)
    assert features.shape == (5, 128) and (features >= 0).all()
    assert torch.allclose(features, judge.features(pictures.float() / 127.5 - 1), atol=1e-5)
    assert torch.allclose(features[2:3], judge.features(pictures[2:3, 0]), atol=1e-5)
    assert torch.allclose(judge(pictures), judge.head(features))
    with pytest.raises(ValueError, match=r"pictures has shape \(5, 3, 28, 28\)"):
        judge(torch.zeros(5, 3, 28, 28))
    with pytest.raises(TypeError, match="int64"):
        judge(pictures.long())


def test_the_reference_describes_the_test_split_and_the_shipped_judge(judge):
    tensors, facts = models.reference()
    features, labels = tensors["test_features"].float(), tensors["test_labels"].long()
    assert features.shape == (10000, 128) and facts["extractor_sha256"] == models.fingerprint("fashion-cnn")
    assert torch.bincount(labels).tolist() == [1000] * 10
    # The judge's accuracy on the real test split can be had from the features alone.
    accuracy = float((judge.head(features).argmax(1) == labels).float().mean())
    assert accuracy >= 0.915
    assert abs(accuracy - models.config("fashion-cnn")["training"]["test_accuracy"]) < 2e-3
    exact = features.double()
    assert torch.allclose(exact.mean(0), tensors["test_mean"], atol=1e-4)
    assert torch.allclose(torch.cov(exact.T), tensors["test_cov"], atol=1e-3)
    assert 0 < facts["floor"]["10000"] < facts["floor"]["200"]


@pytest.mark.parametrize("name", ["fashion", "fashion-cnn"])
def test_a_corrupted_weights_file_is_one_clear_line(name, tmp_path, monkeypatch):
    for path in Path(weights.FOLDER).glob(f"{name}.*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    target = tmp_path / f"{name}.safetensors"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    with pytest.raises(DiffsampError, match="is corrupted: its sha256 is") as caught:
        registry.load(name)
    assert "\n" not in str(caught.value)
    target.unlink()
    with pytest.raises(DiffsampError, match="cannot be read"):
        registry.load(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "hat"}, "class_labels holds 'hat'; accepted: 0 T-shirt/top"),
        ({"class_labels": 10}, "class_labels holds 10"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type='jpeg'"),
        ({"class_labels": 0, "latents": torch.zeros(2, 1, 28, 28)}, "latents has shape"),
        ({"class_labels": [0, 1], "generator": generators(0)}, "generator is a list of 1"),
        ({"class_labels": 0, "timesteps": [1], "sigmas": [1.0]}, "timesteps and sigmas"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_input_names_the_argument(pipe, options, message):
    with pytest.raises(DiffsampError, match=message.replace("(", r"\(")) as caught:
        pipe(**options)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(DiffsampError, match="model='fashon' is not an embedded model; accepted: fashion, fashion-cnn"):
        models.load("fashon")
