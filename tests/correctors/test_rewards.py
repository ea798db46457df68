"""Ready-made rewards: values on pictures made by hand, stand-ins for weights that are absent, and decoded latents."""

import numpy as np
import pytest
import torch
from analytic_targets import karras, process_of

import diffsamp
from diffsamp.correctors import Corrector, Steering, Tilt, Twist, rewards
from diffsamp.correctors.potentials import evaluate, with_vae
from diffsamp.errors import DiffsampError


def pictures(n=3, channels=3, seed=0):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def refused(match, work):
    with pytest.raises(DiffsampError, match=match) as error:
        work()
    assert "\n" not in str(error.value)


def test_brightness_and_colour_of_flat_pictures():
    flat = torch.tensor([[0.5, -0.5, 1.0], [0.0, 0.2, -0.2]])[:, :, None, None].expand(-1, -1, 4, 4)
    assert torch.allclose(rewards.brightness(flat), torch.tensor([1 / 3, 0.0]), atol=1e-6)
    found = rewards.colour((0.5, -0.5, 0.0))(flat)
    assert torch.allclose(found, -torch.tensor([1.0, 0.25 + 0.49 + 0.04]), atol=1e-6)
    refused("colour", lambda: rewards.colour((0.5,))(flat))


def test_gradient_of_brightness_moves_pictures_towards_white():
    _, slope = evaluate(rewards.brightness, pictures(), True)
    assert torch.allclose(slope, torch.full_like(slope, 1 / 192))


def test_class_log_probability_takes_one_label_or_one_per_picture():
    def logits(x):
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3)), torch.zeros(len(x))], 1)

    x = pictures()
    expected = torch.log_softmax(logits(x), 1)
    assert torch.allclose(rewards.class_log_probability(logits, 1)(x), expected[:, 1])
    found = rewards.class_log_probability(logits, [2, 0, 1])(x)
    assert torch.allclose(found, expected[torch.arange(3), torch.tensor([2, 0, 1])])


def test_lpips_of_a_stand_in_network_is_zero_at_the_picture_and_falls_away_from_it():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3)

    def distance(a, b):
        assert a.shape == b.shape == (1, 3, 8, 8)
        return (network(a) - network(b)).square().mean()

    wanted = pictures(1)[0]
    reward = rewards.lpips_to(wanted, net=distance)
    near, far = wanted + 0.05 * torch.sign(wanted), -wanted
    found = reward(torch.stack([wanted, near.clamp(-1, 1), far]))
    assert found.shape == (3,) and float(found[0]) == 0.0
    assert found[0] > found[1] > found[2]
    _, slope = evaluate(reward, far[None].clone(), True)
    assert float(slope.abs().max()) > 0
    grey = rewards.lpips_to(pictures(1, 1), net=distance)(pictures(2, 1))
    assert grey.shape == (2,)
    refused("sizes must be equal", lambda: reward(torch.zeros(1, 3, 4, 4)))


def test_lpips_of_torchmetrics_with_the_weights_of_a_stand_in_file(tmp_path, monkeypatch):
    # An untrained backbone in the place of the published weights: the whole path but their values.
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    wanted = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    refused("squeeze.*missing.*squeezenet1_1", lambda: rewards.lpips_to(wanted, "squeeze"))
    refused("accepted: alex", lambda: rewards.lpips_to(wanted, "resnet"))
    name = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(b"")
    untrained = torchvision.models.squeezenet1_1
    monkeypatch.setattr(torchvision.models, "squeezenet1_1", lambda weights=None: untrained(weights=None))
    reward = rewards.lpips_to(wanted, "squeeze")
    found = reward(torch.stack([wanted, -wanted]))
    assert abs(float(found[0])) < 1e-6 and float(found[1]) < -1e-4
    assert torch.equal(reward(torch.stack([wanted, -wanted])), found)  # nothing is kept from call to call


class Processor:
    """As much of a CLIP processor as torchmetrics uses."""

    def __call__(self, text=None, images=None, return_tensors="pt", padding=True):
        if images is not None:
            values = torch.stack([torch.as_tensor(i).float() for i in images]) / 255
            return {"pixel_values": torch.nn.functional.interpolate(values, size=(16, 16))}
        ids = torch.tensor([[1, *(2 + ord(c) % 20 for c in t[:6]), 30] for t in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(size, vocab_size=32, max_position_embeddings=12, eos_token_id=30, bos_token_id=1)
    vision = dict(size, image_size=16, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval(), Processor()


def test_clip_score_by_torchmetrics_with_a_tiny_model(tmp_path):
    model, processor = tiny_clip()
    reward = rewards.clip_score("a shoe", lambda: (model, processor))
    x = pictures()
    found = reward(x)
    pixels = ((x / 2 + 0.5) * 255).round().to(torch.uint8)
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(**processor(images=list(pixels))).pooler_output)
        words = model.text_projection(model.text_model(**processor(text=["a shoe"])).pooler_output)
    expected = 100 * torch.nn.functional.cosine_similarity(seen, words)
    assert torch.allclose(found, expected.clamp(min=0), atol=1e-3)
    assert torch.allclose(reward(x), found)
    refused("weights of CLIP are missing", lambda: rewards.clip_score("a shoe", str(tmp_path / "none")))
    (tmp_path / "config.json").write_text("{}")
    refused("does not hold a CLIP model", lambda: rewards.clip_score("a shoe", str(tmp_path)))


def tiny_vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3,
        shift_factor=0.1,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", [Steering, Twist])
def test_decoded_rewards_see_pictures_and_weigh_latents(kind):
    vae = tiny_vae()
    shapes = []

    def reward(x):
        shapes.append(tuple(x.shape))
        return 40 * rewards.brightness(x)

    process = process_of("vp")
    plan = diffsamp.solver("sde-dpmpp-1")(process, karras(process, 5))
    slots = [1, 2, 3, 4]
    x = plan.first_level.sigma * diffsamp.rng.normal(slots, (4, 4, 4))

    def predict(x, level):
        return x * level.alpha / (level.alpha**2 + level.sigma**2)

    corrector = Corrector(None, 4, 1e-6, potential=kind(reward, decode=vae))
    result = corrector.run(plan, predict, x, seeds=slots)
    assert set(shapes) == {(4, 3, 8, 8)}
    if kind is Steering:  # without a resampling the log-weights are the rewards of the ends
        with torch.no_grad():
            ends = vae.decode(result.samples / plan.last_level.alpha / 0.3 + 0.1).sample
        expected = 40 * rewards.brightness(ends).numpy()
        assert np.allclose(result.log_weights[0], expected, atol=1e-4)
    assert result.log_weights.std() > 1e-4


def test_decode_names_what_is_missing():
    process = process_of("vp")
    plan = diffsamp.solver("sde-dpmpp-1")(process, karras(process, 3))
    x = torch.randn(4, 4, 4, 4)
    asked = Steering(rewards.brightness, decode=True)
    refused("decode: True is the VAE of a pipeline", lambda: Corrector(None, 4, potential=asked).run(
        plan, lambda x, level: x, x, seeds=[1]))  # fmt: skip
    refused("decode: got str", lambda: Steering(rewards.brightness, decode="vae"))
    refused("this one has none", lambda: with_vae(asked, None))
    vae = tiny_vae()
    assert with_vae(asked, vae).decode is vae
    tilt = Tilt(rewards.brightness)
    assert with_vae(tilt, vae) is tilt and with_vae(None, vae) is None
