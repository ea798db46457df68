"""Read Fashion-MNIST from the idx files that Debian's package `dataset-fashion-mnist` installs.

Data: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; MIT licence. No download happens here:
`apt-get install dataset-fashion-mnist` (or `apt-get download` and `dpkg -x`) brings the files.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
VARIABLE = "DIFFSAMP_FASHION_DATA"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def data_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the four idx files: the argument, else $DIFFSAMP_FASHION_DATA, else Debian's own place."""
    folder = Path(given or os.environ.get(VARIABLE) or DEBIAN_FOLDER)
    missing = [name for names in FILES.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"data folder {folder} lacks {missing[0]}: install Debian's dataset-fashion-mnist, "
            f"or name its folder with --data or {VARIABLE}"
        )
    return folder


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    zero, kind, dimensions = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 8:
        raise SystemExit(f"{path.name} is not an idx file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_split(split: str, folder: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of the "train" (60,000) or "test" (10,000) split."""
    images, labels = (read_idx(data_folder(folder) / name) for name in FILES[split])
    return images, labels.astype(np.int64)
