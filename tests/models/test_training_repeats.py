"""The training script gives the same weights from the same seed, also when it is stopped, resumed and extended."""

from __future__ import annotations

import gzip
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = str(Path(__file__).resolve().parents[2] / "benchmarks" / "training")


@pytest.fixture(scope="module")
def train():
    """The script's `main`, without what it changes in this process: threads, signal handlers, the import path."""
    threads, handlers = torch.get_num_threads(), [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    sys.path.insert(0, SCRIPTS)
    try:
        import train_fashion

        yield train_fashion.main
    finally:
        sys.path.remove(SCRIPTS)
        torch.set_num_threads(threads)
        for number, handler in handlers:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        image_head, label_head = struct.pack(">HBBIII", 0, 8, 3, 20, 28, 28), struct.pack(">HBBI", 0, 8, 1, 20)
        labels = (np.arange(20) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_head + pictures.tobytes()))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(label_head + labels.tobytes()))
    return folder


def test_a_resumed_and_extended_run_equals_an_uninterrupted_one(train, data, tmp_path):
    # 8 pictures a step from 20: an epoch ends inside a step.
    common = ["--data", str(data), "--batch", "8", "--warmup", "2"]
    train([*common, "--work", str(tmp_path / "whole"), "--steps", "7", "--decay", "3"])
    train([*common, "--work", str(tmp_path / "parts"), "--steps", "3", "--decay", "0"])
    train([*common, "--work", str(tmp_path / "parts"), "--steps", "7", "--decay", "3"])
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("ema.") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    train([*common, "--work", str(tmp_path / "other"), "--steps", "7", "--decay", "3", "--seed", "1"])
    other = load_file(tmp_path / "other" / "checkpoint.safetensors")
    assert not torch.equal(whole["raw.conv_in.weight"], other["raw.conv_in.weight"])


def test_resuming_with_other_settings_is_refused(train, data, tmp_path):
    common = ["--data", str(data), "--work", str(tmp_path), "--batch", "2", "--decay", "0"]
    train([*common, "--steps", "1"])
    with pytest.raises(SystemExit, match="--lr 0.1 differs from the checkpoint's 0.0012"):
        train([*common, "--steps", "2", "--lr", "0.1"])


def test_missing_data_says_how_to_get_it(train, tmp_path):
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        train(["--data", str(tmp_path), "--work", str(tmp_path / "run"), "--steps", "1"])
