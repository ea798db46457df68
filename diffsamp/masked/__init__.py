"""Masked (absorbing) diffusion over tokens: samplers, orders, categorical draws, and a small text model.

>>> from diffsamp import masked
>>> model = masked.load_text_model("kjv")
>>> tokens, facts = masked.sample(model, model.prompt("In the beginning"), mask_id=model.mask_id, seeds=[0])
>>> print(model.decode(tokens[0].tolist()))
"""

from __future__ import annotations

from typing import Any

from diffsamp.masked.ancestral import ancestral
from diffsamp.masked.categorical import sample_categorical
from diffsamp.masked.denoisers import ClassifierFreeGuidance, MaskedLM
from diffsamp.masked.events import CountFirst, Events, FirstHitting, expected_calls, hitting_times
from diffsamp.masked.filters import filter_logits
from diffsamp.masked.generate import PAD, Generated, generate
from diffsamp.masked.orders import ORDERS, EntropyBounded, Order, SampleThenChoose, Threshold, order
from diffsamp.masked.remask import P2, ReMDM
from diffsamp.masked.sampler import Draw, MaskedState, info, init, sample, step
from diffsamp.masked.schedules import SCHEDULES, MaskSchedule, schedule
from diffsamp.masked.text_model import TextModel, load_text_model

__all__ = [
    "ORDERS", "P2", "PAD", "SCHEDULES", "ClassifierFreeGuidance", "CountFirst", "Draw", "EntropyBounded", "Events",
    "FirstHitting", "Generated", "MaskSchedule", "MaskedLM", "MaskedScheduler", "MaskedState", "Order", "ReMDM",
    "SampleThenChoose", "TextModel", "Threshold", "ancestral", "expected_calls", "filter_logits", "generate",
    "hitting_times", "info", "init", "load_text_model", "order", "sample", "sample_categorical", "schedule", "step",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # The scheduler needs diffusers, which `import diffsamp` must not load.
    if name == "MaskedScheduler":
        from diffsamp.masked.diffusers_scheduler import MaskedScheduler

        return MaskedScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
