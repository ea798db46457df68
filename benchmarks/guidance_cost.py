"""Cost of a guided step: adaptive projected guidance and UniPC-2, ours against diffusers', in the same run.

    python benchmarks/guidance_cost.py [--quick] [--json FILE]

Both are given the same two predictions per step at 4x4x128x128 fp32 and do everything between the network and the next
latents: momentum, clamp, projection, prediction conversion, solver. Ours works on x0 (which costs two conversions that
theirs does without). One thread, CPU time, the smaller half of the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

SHAPE = (4, 4, 128, 128)
STEPS = 20
SCALE, ETA, NORM, MOMENTUM = 7.5, 0.0, 15.0, -0.5


def predictions(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(conditional, unconditional) network outputs of a run."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        cond = torch.randn(SHAPE, generator=generator)
        made.append((cond, cond + 0.3 * torch.randn(SHAPE, generator=generator)))
    return made


def ours(outputs: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A trajectory of diffsamp's guidance and engine."""
    import diffsamp
    from diffsamp import engine
    from diffsamp.guidance import APG
    from diffsamp.guidance.step import guided_step

    process = diffsamp.Process.vp(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    plan = diffsamp.solver("unipc", order=2)(process, diffsamp.grid("linspace", process, STEPS))
    method = APG(SCALE, eta=ETA, norm=NORM, momentum=MOMENTUM)

    def trajectory() -> torch.Tensor:
        state, memory = engine.init(plan, x), method.init(SHAPE[0], STEPS)
        for cond, uncond in outputs:
            state, memory = guided_step(plan, state, method, memory, cond, uncond, prediction="epsilon")
        return state.input

    return trajectory


def theirs(outputs: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A trajectory of diffusers' APG guider and UniPC scheduler."""
    from diffusers import AdaptiveProjectedGuidance, UniPCMultistepScheduler
    from diffusers.utils import logging

    logging.set_verbosity_error()
    guider = AdaptiveProjectedGuidance(
        guidance_scale=SCALE, adaptive_projected_guidance_momentum=MOMENTUM, adaptive_projected_guidance_rescale=NORM,
        eta=ETA,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)
    inputs = {"prompt_embeds": (x, x)}

    def trajectory() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        latents = x
        for i, (t, (cond, uncond)) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
            guider.set_state(i, STEPS, t)  # type: ignore
            batches = guider.prepare_inputs(inputs)
            for batch, prediction in zip(batches, (cond, uncond), strict=True):
                batch.noise_pred = prediction  # type: ignore
            guided = guider(batches)[0]
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents

    return trajectory


def solver_only(outputs: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Our solver without guidance, to see what guidance adds."""
    import diffsamp
    from diffsamp import engine

    process = diffsamp.Process.vp(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    plan = diffsamp.solver("unipc", order=2)(process, diffsamp.grid("linspace", process, STEPS))

    def trajectory() -> torch.Tensor:
        state = engine.init(plan, x)
        for cond, _ in outputs:
            state = engine.step(plan, state, cond, prediction="epsilon")
        return state.input

    return trajectory


def measure(runs: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time per step, runs taken in turn so that a noisy machine troubles all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.thread_time()
                run()
                times[name].append((time.thread_time() - start) / STEPS * 1e3)
    return {name: statistics.mean(sorted(values)[: (len(values) + 1) // 2]) for name, values in times.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 repeats in place of 15")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outputs, x = predictions(STEPS), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    runs = {
        "diffusers APG guider + UniPC": theirs(outputs, x),
        "diffsamp APG + UniPC": ours(outputs, x),
        "diffsamp UniPC without guidance": solver_only(outputs, x),
    }
    found = measure(runs, 3 if options.quick else 15)
    ratio = found["diffsamp APG + UniPC"] / found["diffusers APG guider + UniPC"]
    print(f"guided step, {'x'.join(map(str, SHAPE))} fp32, {STEPS} steps, one thread, torch {torch.__version__}")
    for name, value in found.items():
        print(f"  {name:<34} {value:7.3f} ms")
    print(f"  ratio ours / theirs                {ratio:7.3f}   (goal: 0.25 or below)")
    if options.json is not None:
        record = {
            "shape": SHAPE, "steps": STEPS, "ms_per_step": found, "ratio": ratio, "torch": torch.__version__,
            "machine": f"{platform.machine()}, 1 thread",
        }  # fmt: skip
        part = options.json.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1))
        part.replace(options.json)


if __name__ == "__main__":
    main()
