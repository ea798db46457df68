"""Reference statistics from folders and files: cached, checked, one clear line when they are bad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffsamp.errors import DiffsampError
from diffsamp.metrics import FrechetStats, extractor, reference


class Pooled(torch.nn.Module):
    """Means of the four quarters of a picture."""

    def forward(self, pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)


@pytest.fixture
def pooled(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return extractor(f"{__name__}:Pooled")


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "pictures"
    home.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(home / f"{i:02d}.png")
    return home


def test_folder_and_npz_of_pictures_agree_and_are_cached(folder, pooled, tmp_path):
    found = reference(folder, pooled)
    assert found.features.shape == (12, 4) and found.floor > 0
    stack = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])[..., None]
    np.savez(tmp_path / "set.npz", images=stack)
    other = reference(tmp_path / "set.npz", pooled)
    assert np.array_equal(found.features, other.features)
    cached = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(cached) == 2
    for path in cached:  # what the cache holds is what is used
        stamp = path.stat().st_mtime_ns
        assert np.array_equal(reference(folder, pooled).features, found.features) and path.stat().st_mtime_ns == stamp


def test_npz_of_the_edm_kind_is_read_without_pickle(pooled, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.arange(4.0), sigma=np.eye(4))
    assert reference(tmp_path / "ref.npz", pooled).stats.width == 4
    np.savez(tmp_path / "bad.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(4))
    with pytest.raises(DiffsampError, match="cannot be read as a plain .npz"):
        reference(tmp_path / "bad.npz", pooled)


def test_broken_picture_other_size_and_empty_folder_are_named(folder, pooled, tmp_path):
    (folder / "zz.png").write_bytes((folder / "00.png").read_bytes()[:40])
    with pytest.raises(DiffsampError, match=r"zz\.png is not a readable picture"):
        reference(folder, pooled)
    Image.new("L", (9, 8)).save(folder / "zz.png")
    with pytest.raises(DiffsampError, match=r"zz\.png is \(1, 8, 9\), expected \(1, 8, 8\)"):
        reference(folder, pooled)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffsampError, match="holds no pictures"):
        reference(tmp_path / "empty", pooled)
    with pytest.raises(DiffsampError, match="no such file or folder"):
        reference(tmp_path / "nowhere", pooled)


def test_statistics_of_another_extractor_are_refused(pooled, tmp_path):
    facts = {"extractor": "other", "extractor_sha256": "ab" * 32}
    FrechetStats.of(np.random.default_rng(0).standard_normal((9, 4)), facts).save(tmp_path / "s.safetensors")
    with pytest.raises(DiffsampError, match="was made with extractor other"):
        reference(tmp_path / "s.safetensors", pooled)
    with pytest.raises(DiffsampError, match="embedded"):
        reference("embedded", pooled)
