"""What is installed is what is in the checkout."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_package_of_the_checkout_is_not_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("diffsamp/**/*.py")}
    kernels = ROOT / "kernels" / "torch-ext"
    here |= {".".join(p.parent.relative_to(kernels).parts) for p in kernels.glob("**/*.py")}
    assert listed == here


def test_a_folder_named_kernels_shadows_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_model_s_file_is_not_installed():
    import diffsamp.models

    installed = Path(diffsamp.models.__file__).parent
    for path in (ROOT / "diffsamp" / "models").rglob("*"):
        if path.suffix in (".json", ".safetensors", ".md"):
            assert (installed / path.relative_to(ROOT / "diffsamp" / "models")).exists(), path.name


def test_diffusers_does_not_import_from_the_checkout_s_root(monkeypatch):
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", "import diffusers, diffsamp; diffusers.UNet2DModel"], cwd=ROOT, check=True)


def test_a_notebook_is_not_valid():
    import nbformat

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.validate(nbformat.reads(path.read_text(), as_version=4))
        assert json.loads(path.read_text())["cells"]
