"""The embedded text model, its files, its denoiser form, and `generate_text`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsamp import masked
from diffsamp.cli.text import generate_text
from diffsamp.errors import DiffsampError

MODELS = Path(masked.__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return masked.load_text_model("kjv")


def test_files_are_small_and_checked(model, tmp_path):
    assert (MODELS / "kjv.safetensors").stat().st_size < 12 * 2**20
    assert 1e6 < sum(p.numel() for p in model.network.parameters()) < 5e6
    for name in ("kjv.json", "kjv.safetensors", "kjv.tokenizer.json"):
        shutil.copy(MODELS / name, tmp_path / name)
    content = bytearray((tmp_path / "kjv.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "kjv.safetensors").write_bytes(content)
    with pytest.raises(DiffsampError, match="sha256"):
        masked.load_text_model("kjv", folder=tmp_path)
    with pytest.raises(DiffsampError, match="model='bible'"):
        masked.load_text_model("bible")


def test_positions_and_padding_do_not_change_predictions(model):
    x = model.prompt("And God said,", 24)
    t = torch.ones(1)
    full = model(x, t)
    assert full.shape == (1, 24, model.vocab_size) and bool((full[..., model.mask_id] == -torch.inf).all())
    at = torch.tensor([[5, 20]])
    assert torch.allclose(model(x, t, at), full[:, at[0]], atol=1e-4)
    padded = torch.cat([x, torch.full((1, 6), masked.PAD)], 1)
    real = slice(0, model.mask_id)
    assert torch.allclose(model(padded, t)[:, :24, real], full[..., real], atol=1e-3)


def test_text_is_english_of_its_source(model):
    x = model.prompt("In the beginning")
    tokens, facts = masked.sample(
        model,
        x.expand(4, -1),
        mask_id=model.mask_id,
        seeds=range(4),
        temperature=0.8,
        sampler=masked.FirstHitting(steps=64),
    )
    words = [w.strip(".,:;?!()").lower() for row in tokens.tolist() for w in model.decode(row).split()]
    common = {
        "the",
        "and",
        "of",
        "to",
        "that",
        "in",
        "he",
        "shall",
        "unto",
        "for",
        "his",
        "a",
        "lord",
        "they",
        "be",
        "is",
        "him",
        "not",
        "them",
        "it",
        "with",
        "all",
        "thou",
        "was",
        "god",
        "which",
        "my",
        "me",
        "thy",
        "i",
    }
    share = sum(w in common for w in words) / len(words)
    assert share > 0.25  # in the King James Bible these thirty words are about 44 %; a random tokenization has 2 %
    assert facts["calls"] == 64 and model.mask_id not in tokens
    assert all(model.decode(row).startswith("In the beginning") for row in tokens.tolist())


def test_network_prefers_real_text_to_shuffled_text(model):
    x = torch.tensor([model.encode("And the LORD spake unto Moses, saying, Speak unto the children of Israel,")])
    hide = torch.zeros_like(x, dtype=torch.bool)
    hide[:, 2::3] = True
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))

    def loss(ids):
        logp = model(ids.masked_fill(hide, model.mask_id)).log_softmax(-1)
        return -logp.gather(-1, ids[..., None])[..., 0][hide].mean()

    assert loss(x) + 2 < loss(x[:, order])


def test_bound_of_the_card_holds_on_unseen_chapters_and_beats_a_unigram(model):
    # ELBO in its count form: k of 128 tokens masked, k even over 1..128, mean cross-entropy of the masked ones. The
    # spread of one sequence is about 1.5 nats, so 64 of them are within 0.6 (3 sigma) of the card's figure.
    test = load_file(str(Path(__file__).parents[2] / "benchmarks" / "data" / "kjv_heldout.safetensors"))["test"].long()
    clean = test[: 64 * 128].view(64, 128)
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(64, 128, generator=generator).argsort(-1).argsort(-1)
    hide = rank < torch.arange(2, 130, 2)[:, None]
    logp = model(clean.masked_fill(hide, model.mask_id)).log_softmax(-1).gather(-1, clean[..., None])[..., 0]
    loss = float(((-logp * hide).sum(1) / hide.sum(1)).mean())
    figures = model.facts["figures"]
    assert abs(loss - figures["test_elbo_nats_per_token"]) < 0.6
    assert math.exp(loss) < figures["test_perplexity_1-gram"] / 3
    assert figures["test_perplexity_bound"] == pytest.approx(math.exp(figures["test_elbo_nats_per_token"]), rel=1e-3)


def test_round_trip_of_text(model):
    text = "And it came to pass, that the LORD was with him.\n"
    assert model.decode(model.encode(text)) == text


def test_generate_text_as_json_infills_and_is_repeatable(capsys):
    generate_text(infill="And God said, Let there be[mask:2]: and there was[mask].", as_json=True, seeds="3-4", steps=4)
    first = capsys.readouterr().out
    generate_text(infill="And God said, Let there be[mask:2]: and there was[mask].", as_json=True, seeds="3-4", steps=4)
    assert capsys.readouterr().out == first
    found = json.loads(first)
    assert [r["seed"] for r in found["results"]] == [3, 4] and found["tokens"] == 10
    for result in found["results"]:
        assert result["text"].startswith("And God said, Let there be") and result["text"].endswith(".")
        assert result["calls"] == 4 and len(result["order"]) == 10 and len(result["entropy"]) == 4
    generate_text(prompt="In the beginning", length=12, order="entropy")
    assert capsys.readouterr().out.startswith("In the beginning")


@pytest.mark.parametrize(("options", "text"), [
    ({"prompt": "word " * 200}, "must fit into 128"),
    ({"prompt": "a [MASK] b"}, "mask token"),
    ({"infill": "no hole"}, "has no hole"),
    ({"infill": "a[mask:500]"}, "takes at most 128"),
    ({"prompt": "a", "infill": "b[mask]"}, "not both"),
    ({"order": "best"}, "order='best'"),
    ({"steps": 0}, "steps: got 0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"length": 500}, "length=500"),
])  # fmt: skip
def test_bad_requests_are_one_clear_line(options, text):
    with pytest.raises(DiffsampError, match=text) as caught:
        generate_text(**options)
    assert "\n" not in str(caught.value)
