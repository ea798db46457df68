"""What one scheduler step costs: ours against diffusers' own, in the same process, interleaved.

Time is thread CPU time of ``scale_model_input`` and ``step`` together (what a pipeline pays besides the network), per
step of a 20-step run, fp32 latents, one thread; on a GPU it is wall time up to a final synchronisation. The schedulers
take turns, so load on the machine falls on all of them; the minimum over the rounds is the figure, the median is
printed beside it. Tensor operations are counted at torch's dispatcher, host synchronisations as the operations that
make the host read a tensor's value.

    python benchmarks/step_cost.py            # the table
    python benchmarks/step_cost.py --quick    # fewer rounds
    python benchmarks/step_cost.py --json     # figures on stdout
    python benchmarks/step_cost.py --save     # writes benchmarks/results/step_cost.{md,json}
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import diffsamp  # noqa: E402
from diffsamp import fused  # noqa: E402
from diffsamp.files import write_whole  # noqa: E402

SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (1, 16, 128, 128))
STEPS = 20
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# (ours, stock, largest ratio of the two that passes)
BARS = (
    ("diffsamp unipc-2", "UniPC-2", 1 / 12),
    ("diffsamp unipc-2", "DPM-Solver++ 2M", 1 / 5),
    ("diffsamp unipc-2", "Euler", 1.0),
)
EAGER = ", torch operations only"
READS_A_VALUE = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "_linalg_check_errors")


def schedulers() -> dict[str, Callable[[], Any]]:
    """Name -> factory. The names of ours start with ``diffsamp``."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def ours(name: str, config: dict[str, Any] | Any) -> Any:
        return diffsamp.scheduler_class(name).from_config(config)

    vp = diffusers.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1).config
    return {
        "diffsamp unipc-2": lambda: ours("unipc", vp),
        f"diffsamp unipc-2{EAGER}": lambda: ours("unipc", vp),
        "diffsamp dpmpp-2m": lambda: ours("dpmpp-2m", vp),
        "diffsamp euler": lambda: ours("euler", vp),
        "diffsamp unipc-2 flow": lambda: ours("unipc", euler.config),
        "diffsamp euler flow": lambda: ours("euler", euler.config),
        "UniPC-2": lambda: diffusers.UniPCMultistepScheduler(**VP),
        "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**VP),
        "Euler": lambda: diffusers.EulerDiscreteScheduler(**VP),
        "UniPC-2 flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
        "DPM-Solver++ 2M flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
        "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def trajectory(scheduler: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The scheduler's share of a run: the network is replaced by a fixed output."""
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def compiled(on: bool) -> None:
    """Let the compiled one-pass rows run, or not."""
    os.environ["DIFFSAMP_BACKEND"] = "auto" if on else "torch"
    fused.available.cache_clear()


class Counter(TorchDispatchMode):
    """Counts tensor operations and those that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.syncs += func._schema.name.split("::")[-1] in READS_A_VALUE
        return func(*args, **(kwargs or {}))


def counts(make: Callable[[], Any], device: str) -> tuple[float, float]:
    """(tensor operations, host syncs) per step, iteration over ``timesteps`` not included."""
    scheduler = make()
    scheduler.set_timesteps(STEPS, device=device)
    x = output = torch.randn(1, 4, 32, 32, device=device)
    times = list(scheduler.timesteps)
    with Counter() as counter:
        for t in times:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return counter.operations / len(times), counter.syncs / len(times)


def measure(shape: tuple[int, ...], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Name -> (minimum, median) in microseconds per step."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=source).to(device)
    output = torch.randn(shape, generator=source).to(device)
    made = {name: make() for name, make in schedulers().items()}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 2):
        for name, scheduler in made.items():
            scheduler.set_timesteps(STEPS, device=device)
            compiled(not name.endswith(EAGER))
            if device == "cpu":
                start = time.thread_time()
                trajectory(scheduler, x, output)
                spent = time.thread_time() - start
            else:
                torch.cuda.synchronize()
                start = time.perf_counter()
                trajectory(scheduler, x, output)
                torch.cuda.synchronize()
                spent = time.perf_counter() - start
            if turn >= 2:
                taken[name].append(spent / len(scheduler.timesteps) * 1e6)
    return {name: (min(values), median(values)) for name, values in taken.items()}


def machine(device: str) -> str:
    cpu = f"{os.cpu_count()}-core {platform.machine()} CPU, 1 thread"
    where = cpu if device == "cpu" else torch.cuda.get_device_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{where}, {versions}"


def report(rounds: int, device: str) -> dict[str, Any]:
    times = {"x".join(map(str, shape)): measure(shape, rounds, device) for shape in SHAPES}
    counted = {}
    for name, make in schedulers().items():
        compiled(not name.endswith(EAGER))
        counted[name] = counts(make, device)
    compiled(True)
    bars = [
        {"ours": ours, "stock": stock, "shape": shape, "ratio": found[ours][0] / found[stock][0],
         "ratio_of_medians": found[ours][1] / found[stock][1], "bar": bar,
         "met": found[ours][0] / found[stock][0] <= bar}
        for shape, found in times.items() for ours, stock, bar in BARS
    ]  # fmt: skip
    return {
        "machine": machine(device),
        "compiled rows": fused.available(),
        "rounds": rounds,
        "steps": STEPS,
        "microseconds_per_step": {
            shape: {name: {"min": a, "median": b} for name, (a, b) in found.items()} for shape, found in times.items()
        },
        "operations_per_step": {name: a for name, (a, _) in counted.items()},
        "host_syncs_per_step": {name: b for name, (_, b) in counted.items()},
        "bars": bars,
    }


def table(found: dict[str, Any]) -> str:
    shapes = list(found["microseconds_per_step"])
    lines = [
        "# Cost of a scheduler step",
        "",
        f"{found['machine']}. {found['rounds']} interleaved rounds of {found['steps']} steps, fp32 latents; "
        "µs per step, minimum (median).",
        "Ours runs its rows in one pass compiled by numba (`diffsamp[fast]`), not counted as a torch operation."
        if found["compiled rows"]
        else "numba is not installed: ours runs torch operations.",
        "",
        "| scheduler | " + " | ".join(shapes) + " | tensor ops/step | host syncs/step |",
        "| --- |" + " ---: |" * (len(shapes) + 2),
    ]
    for name in found["operations_per_step"]:
        cells = [found["microseconds_per_step"][shape][name] for shape in shapes]
        numbers = " | ".join(f"{cell['min']:.0f} ({cell['median']:.0f})" for cell in cells)
        operations, syncs = found["operations_per_step"][name], found["host_syncs_per_step"][name]
        lines.append(f"| {name} | {numbers} | {operations:.1f} | {syncs:.1f} |")
    lines += ["", "| ours / stock | shape | ratio | ratio of medians | bar | met |"]
    lines += ["| --- | --- | ---: | ---: | ---: | --- |"]
    for bar in found["bars"]:
        lines.append(
            f"| {bar['ours']} / {bar['stock']} | {bar['shape']} | 1/{1 / bar['ratio']:.1f} | "
            f"1/{1 / bar['ratio_of_medians']:.1f} | 1/{1 / bar['bar']:.0f} | {'yes' if bar['met'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds in place of 60")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step_cost.{md,json}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    found = report(5 if options.quick else 60, options.device)
    print(json.dumps(found, indent=1) if options.json else table(found))
    if options.save:
        folder = Path(__file__).resolve().parent / "results"
        name = "step_cost" if options.device == "cpu" else f"step_cost_{options.device}"
        write_whole(folder / f"{name}.md", table(found).encode(), overwrite=True)
        write_whole(folder / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
