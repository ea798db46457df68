"""The table-driven FID Inception: equal to torch-fidelity's on the same random weights; loading is safe and clear."""

from __future__ import annotations

import pickle

import pytest
import torch

from diffsamp.errors import DiffsampError
from diffsamp.metrics import extractor, weights
from diffsamp.metrics.inception import InceptionFID
from diffsamp.metrics.resize import resize


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of the published layout with random values."""
    torch.manual_seed(0)
    network = InceptionFID()
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("bn.weight", "bn.bias", "running_mean")):
            value.normal_(1.0 if key.endswith("weight") else 0.0, 0.1)
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.normal_(0, 0.05)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


def pictures(size: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_equal_to_torch_fidelity_with_the_same_weights(weights_file, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = extractor("inception-fid", feature_weights=weights_file)
    assert ours.name == f"inception-{weights.sha256_of(weights_file)[:8]}"
    assert ours.distance_name.startswith("FD[inception-")  # other weights are never called FID
    state = InceptionFID().state_dict() | torch.load(weights_file, weights_only=True)
    full = tmp_path / "full.pth"
    torch.save(state, full)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(full))
    with torch.inference_mode():
        features, logits = theirs(pictures())
    found = ours(pictures())
    for a, b in ((found["features"], features), (found["logits"], logits)):
        assert (torch.from_numpy(a) - b).norm() <= 1e-5 * b.norm()
        assert b.std() > 0


def test_a_benchmark_with_a_published_protocol_runs_on_such_a_file(weights_file, tmp_path, monkeypatch):
    from PIL import Image

    from diffsamp.run.bench import Bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    for index, picture in enumerate(torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8).numpy()):
        Image.fromarray(picture).save(tmp_path / "real" / f"{index}.png")
    job = Bench(
        tmp_path / "run", solvers=["unipc"], nfe=[1], n=4, chunk=4, metrics=["fd", "kid"], protocol="torch-fidelity",
        feature_weights=str(weights_file), reference=str(tmp_path / "real"), replicates=2,
    )  # fmt: skip
    results = job.run()
    assert results["distance"] == f"FD[inception-{weights.sha256_of(weights_file)[:8]}]"
    assert results["protocol"]["extractor"] == "inception-fid" and results["protocol"]["resize"] == "tf1"
    assert results["extractor_sha256"] == weights.sha256_of(weights_file)
    value, low, high = results["cells"][0]["metrics"]["fd"]
    assert low <= value <= high and value > 0
    assert any("rank 3 for 2048 features" in told and "at least 2049" in told for told in results["warnings"])


def test_tf1_resize_equals_torch_fidelity_and_the_others_differ():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = pictures(33).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    ours = {name: resize(x, 299, name) for name in ("tf1", "antialias", "pil-bicubic")}
    assert (ours["tf1"] - theirs).abs().max() <= 2e-3  # of 255
    assert (ours["antialias"] - theirs).abs().max() > 1 and (ours["pil-bicubic"] - theirs).abs().max() > 1
    with pytest.raises(DiffsampError, match="accepted: tf1, antialias, pil-bicubic"):
        resize(x, 299, "nearest")


def test_missing_weights_say_where_to_get_and_put_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DIFFSAMP_WEIGHTS", raising=False)
    with pytest.raises(DiffsampError, match="not found") as caught:
        extractor("inception-fid")
    place = tmp_path / "hub" / "checkpoints" / weights.FILES[0]
    assert weights.URL in str(caught.value) and str(place) in str(caught.value)


@pytest.mark.parametrize("name", weights.FILES)
def test_cache_is_found_under_both_names_and_its_hash_checked(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("DIFFSAMP_WEIGHTS", raising=False)
    place = tmp_path / "hub" / "checkpoints" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(DiffsampError, match=r"has sha256 .*expected 6726825d"):
        extractor("inception-fid")


def test_a_pickle_is_not_executed(tmp_path):
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    path = tmp_path / "bomb.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DiffsampError, match="cannot be read safely"):
        extractor("inception-fid", feature_weights=path)
    assert not mark.exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(DiffsampError, match="does not fit InceptionFID: .*missing"):
        extractor("inception-fid", feature_weights=tmp_path / "other.pth")


def test_unknown_extractors_are_named():
    for name in ("inception", "nosuchmodule:thing", "torchvision:resnet18", "hf:/nowhere"):
        with pytest.raises(DiffsampError, match="extractor"):
            extractor(name)
