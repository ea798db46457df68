"""Reference statistics: the real pictures that generated ones are compared with.

Sources: "embedded" (the data set of the embedded model), a folder of pictures, an .npz of EDM's kind (keys mu and
sigma) or of pictures (one uint8 array [n, h, w, c]), or a .safetensors that `FrechetStats.save` wrote. What is
computed from pictures is cached under a fingerprint of the pictures and the extractor.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import NotWritten, write_whole
from diffsamp.metrics.arrays import as_features
from diffsamp.metrics.frechet import factor, frechet_distance
from diffsamp.metrics.kernel import within
from diffsamp.metrics.moments import FrechetStats

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# An .npz of the EDM kind does not say how many pictures it was made from; the covariance is stored already divided.
NPZ_PICTURES = 50_000


@dataclass
class Reference:
    """Statistics of real pictures, with their features where they are at hand (KID and precision need them)."""

    name: str
    stats: FrechetStats
    features: np.ndarray | None = field(default=None, repr=False)
    floor: float | None = None
    floor_note: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            digest = hashlib.sha256(self.stats.mean.tobytes() + self.stats.covariance.tobytes())
            self.fingerprint = digest.hexdigest()[:16]
        self.factor = factor(self.stats.covariance)

    @cached_property
    def within(self) -> float | None:
        """The reference's own part of the kernel distance, computed once; None without features."""
        return None if self.features is None else within(as_features(self.features, "reference"))

    def floor_at(self, n: int, draws: int = 5) -> tuple[float | None, str]:
        """What real pictures score at n, the least that a perfect model would, and how it was found.

        The Fréchet distance is biased upwards in 1/n, so a floor from more pictures than n is out of reach. It is the
        mean over `draws` of n reference pictures against the others; the floor at full size when n is too many for it.
        """
        if self.features is None or n < 2 or 2 * n > len(self.features):
            return self.floor, self.floor_note
        found, rng = [], np.random.default_rng(0)
        for _ in range(draws):
            rows = rng.permutation(len(self.features))
            found.append(frechet_distance(self.features[rows[:n]], self.features[rows[n:]]))
        others = len(self.features) - n
        return float(np.mean(found)), f"{n} real pictures against {others} others, mean of {draws} draws"


def reference(source: str | Path, extractor: Any, *, size: tuple[int, int] | None = None) -> Reference:
    """The reference by source for an extractor; raises DiffsampError with one line when it cannot be had."""
    if str(source) == "embedded":
        return _embedded(extractor)
    path = Path(source)
    if not path.exists():
        raise DiffsampError(
            f"reference={str(source)!r}: no such file or folder; accepted: embedded, a folder, .npz, .safetensors"
        )
    if path.is_dir():
        return _pictures(path.name, list_pictures(path), extractor, size)
    if path.suffix == ".safetensors":
        stats = FrechetStats.load(path)
        made_with = stats.facts.get("extractor_sha256")
        if made_with and made_with != extractor.fingerprint:
            raise DiffsampError(
                f"reference={path} was made with extractor {stats.facts.get('extractor')} {made_with[:8]}, this run "
                "uses "
                f"{extractor.name} {extractor.fingerprint[:8]}"
            )
        return Reference(path.stem, stats)
    if path.suffix == ".npz":
        return _npz(path, extractor)
    raise DiffsampError(f"reference={path}: unknown kind {path.suffix!r}; accepted: a folder, .npz, .safetensors")


def _embedded(extractor: Any) -> Reference:
    from diffsamp import models

    tensors, facts = models.reference()
    if facts["extractor_sha256"] != extractor.fingerprint:
        raise DiffsampError(
            f"reference='embedded' holds features of {facts['extractor']}, not of {extractor.name}; pass --reference "
            "FOLDER"
        )
    test_n, train_n = int(facts["test_n"]), int(facts["train_n"])
    stats = FrechetStats.from_covariance(test_n, tensors["test_mean"].numpy(), tensors["test_cov"].numpy())
    train = FrechetStats.from_covariance(train_n, tensors["train_mean"].numpy(), tensors["train_cov"].numpy())
    note = f"{train_n} training against {test_n} test pictures"
    features = tensors["test_features"].numpy().astype(np.float32)
    return Reference("Fashion-MNIST test", stats, features, frechet_distance(train, stats), note)


def _npz(path: Path, extractor: Any) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError) as error:
        raise DiffsampError(f"reference={path} cannot be read as a plain .npz ({str(error)[:120]})") from None
    if {"mu", "sigma"} <= arrays.keys():
        return Reference(path.stem, FrechetStats.from_covariance(NPZ_PICTURES, arrays["mu"], arrays["sigma"]))
    stacks = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4 and a.shape[-1] in (1, 3)]
    if len(stacks) != 1:
        raise DiffsampError(f"reference={path} holds {sorted(arrays)}; accepted: mu and sigma, or uint8 [n, h, w, c]")
    batches = (stacks[0][i : i + 64].transpose(0, 3, 1, 2) for i in range(0, len(stacks[0]), 64))
    return _featurise(path.stem, batches, hashlib.sha256(stacks[0].tobytes()).hexdigest(), extractor)


def list_pictures(folder: Path) -> list[Path]:
    """The picture files under a folder, sorted; raises DiffsampError when there are none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise DiffsampError(f"reference={folder} holds no pictures; accepted: files {', '.join(SUFFIXES)}")
    return found


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 [c, h, w], c = 1 or 3; raises DiffsampError for a broken file."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            found = np.asarray(picture.convert("L" if picture.mode in ("L", "1", "I;16") else "RGB"))
    except Exception as error:
        raise DiffsampError(f"reference: {path} is not a readable picture ({str(error)[:100]})") from None
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)


def _pictures(name: str, files: list[Path], extractor: Any, size: tuple[int, int] | None) -> Reference:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    shape = size or read_picture(files[0]).shape[-2:]

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(files), 64):
            batch = [read_picture(file) for file in files[start : start + 64]]
            for file, picture in zip(files[start : start + 64], batch, strict=True):
                if picture.shape != (len(batch[0]), *shape):
                    raise DiffsampError(
                        f"reference: {file} is {picture.shape}, expected {(len(batch[0]), *shape)}; all must be one "
                        "size"
                    )
            yield np.stack(batch)

    return _featurise(name, batches(), digest.hexdigest(), extractor)


def _featurise(name: str, batches: Iterator[np.ndarray], pictures: str, extractor: Any) -> Reference:
    from safetensors.numpy import load_file, save

    made_by = f"{pictures} {extractor.name} {extractor.fingerprint} {extractor.resize}"
    key = hashlib.sha256(made_by.encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsamp" / "reference"
    cached = home / f"{key}.safetensors"
    if cached.is_file():
        features = load_file(cached)["features"]
    else:
        features = np.concatenate([extractor(batch)["features"] for batch in batches])
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(NotWritten):
            write_whole(cached, save({"features": features}), overwrite=True)
    stats = FrechetStats.of(features)
    half = len(features) // 2
    floor, note = None, ""
    if half >= 2:
        floor = frechet_distance(FrechetStats.of(features[::2]), FrechetStats.of(features[1::2]))
        note = f"one half of the {len(features)} reference pictures against the other"
    return Reference(name, stats, features, floor, note, key)
