"""Text for ``diffsamp generate``: the embedded masked language model, shown as it is revealed."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..errors import DiffsampError


def generate_text(
    *,
    model: str = "kjv",
    prompt: str | None = None,
    infill: str | None = None,
    steps: int | None = None,
    order: str | None = None,
    seeds: str | None = None,
    length: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = 0.95,
    as_json: bool = False,
    dry_run: bool = False,
) -> None:
    """Print text of the embedded model, one per seed; in a terminal it is shown while it is revealed.

    Args:
        prompt: how the text begins. infill: text with holes instead, `[mask]` (8 tokens), `[mask:N]` or `___N`.
        steps: network calls; one per token when None. order: see `diffsamp.masked.ORDERS`; "random" when None.
        seeds: range expression, "0" when None. length: tokens of the whole text, all that the model takes when None.

    Raises:
        DiffsampError: both prompt and infill, no hole, too long, or an unknown order.
    """
    from .. import masked
    from ..rng import parse_seeds

    if prompt is not None and infill is not None:
        raise DiffsampError("infill: give either --prompt or --infill, not both")
    if steps is not None and steps < 1:
        raise DiffsampError(f"steps: got {steps}; must be 1 or above")
    rule = masked.order(order or "random")
    chosen = parse_seeds(seeds) if seeds is not None else [0]
    text_model = masked.load_text_model(model)
    start = text_model.holes(infill) if infill is not None else text_model.prompt(prompt or "", length)
    holes = int((start == text_model.mask_id).sum())
    facts: dict[str, Any] = {
        "model": model,
        "order": rule.name,
        "seeds": chosen,
        "tokens": holes,
        "calls": min(steps or holes, holes),
    }
    if dry_run:
        print(json.dumps(facts))
        return
    sampler = masked.FirstHitting() if steps is None else masked.FirstHitting(steps=steps)
    results = []
    for seed in chosen:
        with _view(text_model, show=not as_json and sys.stdout.isatty()) as show:
            tokens, run = masked.sample(
                text_model,
                start,
                mask_id=text_model.mask_id,
                sampler=sampler,
                order=rule,
                temperature=temperature,
                top_p=top_p,
                seeds=[seed],
                callback=show,
            )
        text = text_model.decode(tokens[0].tolist())
        results.append(
            {
                "seed": seed,
                "text": text,
                "calls": run["calls"],
                "order": [i for i in run["order"][0].tolist() if i >= 0],
                "entropy": [round(h, 4) for h in run["entropy"]],
            }
        )
        if not as_json and not sys.stdout.isatty():
            print(text)
    if as_json:
        print(json.dumps({**{k: v for k, v in facts.items() if k != "calls"}, "results": results}))


class _view:
    """A live panel of the text so far, the newest tokens highlighted; nothing when `show` is false."""

    def __init__(self, model: Any, *, show: bool) -> None:
        self.model = model
        self.live: Any = None
        if show:
            from rich.live import Live

            self.live = Live(refresh_per_second=20)

    def __enter__(self) -> Any:
        if self.live is None:
            return None
        self.live.start()
        return lambda state: self.live.update(self._render(state))

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def _render(self, state: Any) -> Any:
        from rich.text import Text

        text, newest = Text(), state.event - 1
        for token, when in zip(state.x[0].tolist(), state.step_of[0].tolist(), strict=True):
            if token == self.model.mask_id:
                text.append("·", style="dim")
            else:
                style = "bold green" if when == newest else "bold" if when < 0 else ""
                text.append(self.model.decode([token]), style=style)
        text.append(f"\n{state.calls} calls, {int(state.masked.sum())} masks left", style="dim")
        return text
