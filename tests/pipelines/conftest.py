"""Pipelines run on one thread and say nothing."""

from __future__ import annotations

import diffusers
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)
    torch.set_num_threads(threads)
