"""``diffsamp generate`` with a corrector: every picture carries its recipe and is repeated from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_command_line import run

from diffsamp.recipe import Recipe

CASES = {
    "guided": ["--corrector", "fkc:target=cfg,particles=3,ess=1", "--guidance-scale", 5, "--class", "3,8"],
    "product": ["--class", "3*5", "--guidance-scale", 2],
    "annealed": ["--anneal", 1.3, "--class", 9],
    "every-particle": ["--corrector", "fkc:target=cfg,particles=2,ess=1,choose=all", "--class", "Bag"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and report of every case, three seeds each."""
    found = {}
    for name, arguments in CASES.items():
        folder = tmp_path_factory.mktemp(name) / "out"
        done = run("generate", *arguments, "--seeds", "4-6", "--steps", 3, "--out", folder, "--json")
        found[name] = folder, json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_picture_of_a_corrector_is_not_repeated_bit_for_bit(made, name, tmp_path):
    folder, report = made[name]
    wanted = folder / report["pictures"][-1]["file"]
    run("generate", "--from", wanted, "--out", tmp_path / "again")
    assert (tmp_path / "again" / wanted.name).read_bytes() == wanted.read_bytes()


def test_a_recipe_lacks_what_a_corrector_was_asked_for(made):
    folder, report = made["guided"]
    picture = next(p for p in report["pictures"] if p["seed"] == 6)
    recipe = Recipe.from_png(folder / picture["file"])
    assert (recipe.corrector, recipe.guidance_scale) == (CASES["guided"][1], 5.0)
    assert (recipe.seed, recipe.classes, recipe.slot) == (6, [3], picture["slot"])
    assert recipe.batch == [[4, None], [6, None]] and recipe.solver == "sde-dpmpp-2m"  # 5 has the other class
    assert Recipe.from_png(folder / report["pictures"][-1]["file"]).classes == [8]
    folder, report = made["annealed"]
    assert Recipe.from_png(folder / report["pictures"][0]["file"]).anneal == 1.3
    folder, report = made["every-particle"]
    assert [(p["seed"], p["slot"]) for p in report["pictures"]] == [(s, k) for s in (4, 5, 6) for k in (0, 1)]


@pytest.mark.parametrize("batch_size", [1, 6])
def test_particles_depend_on_the_batch_size_by_more_than_last_bits(made, batch_size, tmp_path):
    folder, report = made["guided"]
    run("generate", *CASES["guided"], "--seeds", "4-6", "--steps", 3, "--out", tmp_path / "other",
        "--batch-size", batch_size)  # fmt: skip
    other = json.loads((tmp_path / "other" / "corrector.json").read_text())
    assert len(Recipe.from_png(tmp_path / "other" / report["pictures"][0]["file"]).batch) == max(1, batch_size // 3)
    for one, two in zip(report["pictures"], other["pictures"], strict=True):
        assert all(one[key] == two[key] for key in ("file", "slot", "unique_ancestors"))
        assert np.allclose(one["ess"], two["ess"], rtol=1e-4)
        a, b = (np.asarray(Image.open(f / one["file"])).astype(int) for f in (folder, tmp_path / "other"))
        assert np.abs(a - b).max() <= 1


def test_a_repetition_is_run_with_other_threads(made, tmp_path, monkeypatch):
    import diffsamp.cli.corrected as module

    real, seen = module._run, []

    def watched(pipe, corrector, wanted, seeds, steps):
        seen.append((seeds, steps, torch.get_num_threads()))
        return real(pipe, corrector, wanted, seeds, steps)

    monkeypatch.setattr(module, "_run", watched)
    folder, report = made["product"]
    wanted = folder / report["pictures"][1]["file"]
    recipe, before = Recipe.from_png(wanted), torch.get_num_threads()
    torch.set_num_threads(recipe.threads + 1)
    try:
        run("generate", "--from", wanted, "--out", tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    assert seen == [([seed for seed, _ in recipe.batch], 3, recipe.threads)]
    assert (tmp_path / "again" / wanted.name).read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", "apg:5"], ["guidance", "apg:5", "corrector"]),
        (["--teleport", "statistics.safetensors"], ["teleport"]),
    ],
)
def test_an_option_that_a_corrector_cannot_take_is_dropped_silently(arguments, words, tmp_path):
    done = run("generate", "--anneal", 1.5, "--out", tmp_path / "out", *arguments, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "out").exists()
