"""The HTML report: self-contained, drawn without errors in a real browser if there is one, safe for odd names."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from diffsamp.cli import build
from diffsamp.errors import DiffsampError
from diffsamp.report import csv_text, markdown, read_results, write_report
from diffsamp.report.figure import _chosen
from diffsamp.run import run_chunks
from diffsamp.run.matrix import Cell

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Runs after the page's script: sorts the table by the third column twice and writes what it sees into the page.
CHECK = """<script>
const seen = {errors: window.__errors, charts: document.querySelectorAll("svg").length,
  dots: document.querySelectorAll("svg circle").length, bars: document.querySelectorAll("svg .interval").length,
  pictures: [...document.querySelectorAll(".strips img")].length, titles: [...document.querySelectorAll("h1")].length};
const column = () => [...document.querySelectorAll("tbody tr")].map((r) => r.children[2].textContent);
const button = document.querySelectorAll("th button")[2];
seen.before = column(); button.click(); seen.up = column(); button.click(); seen.down = column();
document.querySelector(".legend button").click();
seen.alone = [...document.querySelectorAll(".series:not(.dim)")].map((g) => g.dataset.name);
seen.best = [...document.querySelectorAll("td.best")].map((td) => td.textContent);
seen.off = document.querySelector(".off").textContent;
Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth, () => 0))).then((widths) => {
  seen.widths = widths;
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>"""
CATCH = """<script>window.__errors = []; addEventListener("error", (e) => __errors.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => __errors.push("blocked " + e.blockedURI));
const was = console.error; console.error = (...a) => { __errors.push(a.join(" ")); was(...a); };</script>"""


@pytest.fixture(scope="module")
def bench_folder(tmp_path_factory):
    """A finished benchmark of four cells with known figures and pictures; one name tries to break out of the page."""
    root = tmp_path_factory.mktemp("bench")
    cells = []
    for i, (solver, nfe) in enumerate([("unipc", 5), ("</script><b>ddim", 5), ("unipc", 10), ("diffusers:X", 10)]):
        cell = Cell(solver, nfe)

        def generate(seeds, shade=40 * i):
            rng = np.random.default_rng(int(seeds[0]))
            pictures = np.full((len(seeds), 1, 8, 8), 50 + shade, np.uint8) + rng.integers(0, 9, (len(seeds), 1, 8, 8))
            return {"images": pictures.astype(np.uint8), "features": rng.standard_normal((len(seeds), 3))}

        result = run_chunks(root / "cells" / cell.folder, cell.facts(), generate, 16, chunk=8)
        metrics = {"fd": [3.0 - i / 2, 2.8 - i / 2, 3.2 - i / 2], "accuracy": [0.9, 0.8, float("nan")]}
        cells.append(
            {**cell.facts(), "folder": cell.folder, "calls": nfe, "n": 16, "sha256": result.sha256,
             "seconds": 1.0, "not_finite": int(i == 3), "metrics": metrics}
        )  # fmt: skip
    results = {
        "format": 1, "model": "toy", "model_sha256": "ab" * 32, "distance": "FD[toy]", "extractor_sha256": "cd" * 32,
        "protocol": {"name": "custom", "extractor": "toy", "resize": "tf1", "n": 16, "dtype": "float64"},
        "reference": {"name": "r", "n": 99, "floor": 0.1, "floor_note": "half against half", "fingerprint": "e"},
        "samples_from": None, "seed": 0, "chunk": 8, "replicates": 5, "warnings": ["few pictures"],
        "environment": {"torch": "2"}, "cells": cells,
    }  # fmt: skip
    (root / "results.json").write_text(json.dumps(results))
    return root


class Outside(HTMLParser):
    """Collects every address that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "data", "action") and v]


def test_report_is_whole_and_draws_in_a_browser(bench_folder, tmp_path):
    path = write_report([bench_folder], tmp_path / "report.html", pictures=6)
    page = path.read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.found == [] and parser.tags.count("script") == 2 and parser.tags.count("style") == 1
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1).replace("<\\/", "</"))
    assert [c["metrics"]["fd"]["v"][0] for c in data[0]["cells"]] == [3.0, 2.5, 2.0, 1.5]
    assert all(c["strip"].startswith("data:image/png;base64,") for c in data[0]["cells"])
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    print(f"browser: {browser or 'none on PATH, the page was checked by parsing alone'}")
    if browser is None:
        return
    checked = tmp_path / "checked.html"
    checked.write_text(page.replace("<title>", CATCH + "<title>", 1).replace("</body>", CHECK + "</body>", 1))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    # On a loaded machine a browser may give up before the page's scripts have run: it is asked again.
    for turn in range(4):
        fresh = [f"--user-data-dir={tmp_path / f'profile{turn}'}", checked.as_uri()]
        done = subprocess.run(command + fresh, capture_output=True, text=True, timeout=120)
        found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
        if found:
            break
    assert found, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["errors"] == [] and "CONSOLE" not in done.stderr
    # The cell whose pictures are not all finite is in the table and on no chart.
    assert (seen["charts"], seen["dots"], seen["titles"], seen["pictures"]) == (2, 6, 1, 4)
    assert seen["off"] == "Off this chart: diffusers:X at 10."
    assert sorted(v for v in seen["best"] if v.endswith("0.20")) == ["2.00 ± 0.20", "2.50 ± 0.20"]
    assert seen["bars"] == 3  # an interval without an end is not drawn
    assert seen["alone"] == ["unipc", "unipc"]  # one curve in each chart once its solver is chosen
    assert seen["before"] == ["3.00 ± 0.20", "2.50 ± 0.20", "2.00 ± 0.20", "1.50 ± 0.20"]
    assert seen["up"] == seen["before"][::-1] and seen["down"] == seen["before"]
    assert seen["widths"] == [48] * 4  # six pictures of eight pixels, decoded


def test_tables_carry_intervals_and_mark_the_best(bench_folder):
    results = read_results([bench_folder])[0][1]
    text = markdown(results)
    assert "**2.50 ± 0.20**" in text and "**2.00 ± 0.20**" in text and "FD[toy]" in text and "FID" not in text
    assert "| `diffusers:X` (1 not finite) | 10 | 1.50 ± 0.20 |" in text  # told, and never the best
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert [float(r["fd"]) for r in rows] == [3.0, 2.5, 2.0, 1.5] and float(rows[0]["fd_high"]) == 3.2


def test_a_figure_of_many_solvers_draws_the_best_of_ours_and_of_stock():
    curves = {f"own-{i}": [(3, [5.0 + i] * 3), (5, [2.0 + i] * 3)] for i in range(9)}
    curves |= {f"diffusers:S{i}": [(3, [1.0 + i] * 3), (5, [1.0 + i] * 3)] for i in range(9)}
    curves["short"] = [(3, [0.1] * 3)]  # not at every budget: no curve to compare
    found = _chosen(curves, lower=True)
    assert found == [f"own-{i}" for i in range(5)] + [f"diffusers:S{i}" for i in range(5)]
    assert _chosen(curves, lower=False)[0] == "own-8"
    few = dict(list(curves.items())[:4])
    assert _chosen(few, lower=True) == list(few)


@pytest.mark.parametrize("kind", ["html", "png", "csv", "json", "md"])
def test_report_command_writes_every_kind_and_replaces_nothing(bench_folder, tmp_path, kind):
    out = tmp_path / f"r.{kind}"
    done = CliRunner().invoke(build(), ["report", str(bench_folder), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and out.stat().st_size > 100
    assert kind != "png" or out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DiffsampError, match="exists"):
        CliRunner().invoke(build(), ["report", str(bench_folder), "--out", str(out)], catch_exceptions=False)


def test_bad_reports_are_one_clear_line(bench_folder, tmp_path):
    for arguments, told in (
        ([str(tmp_path)], "holds no results.json"),
        ([str(bench_folder), "--out", str(tmp_path / "r.pdf")], "accepted: .html"),
        ([str(bench_folder), "--out", str(tmp_path / "r.png"), "--metric", "kid"], "was not measured"),

    ):
        with pytest.raises(DiffsampError, match=told) as caught:
            CliRunner().invoke(build(), ["report", *arguments], catch_exceptions=False)
        assert "\n" not in str(caught.value)
