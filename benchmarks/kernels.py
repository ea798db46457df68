"""Kernels against their peers, on whatever device there is. Correctness first: a case that fails it gets no time.

    python benchmarks/kernels.py [--quick] [--compile] [--json FILE]

One CSV row per case: median, 20th and 80th percentile in milliseconds (thread CPU time on a CPU, one thread; events
on a
GPU), bytes that must move, the share of a copy's bandwidth in the same run, and the speed-up over the first peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]

from diffsamp_kernels import guided_coefficients, guided_step, linear_step, sample_categorical  # noqa: E402


def times(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each repetition, sorted, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            start = time.thread_time()
            run()
            found.append((time.thread_time() - start) * 1e3)
    return sorted(found)


def llada(logits: torch.Tensor) -> torch.Tensor:
    """The float64 Gumbel draw as published with LLaDA: exp(logit) / (-log u)."""
    wide = logits.double()
    noise = (-torch.log(torch.rand_like(wide))) ** 1.0
    return (wide.exp() / noise).argmax(-1)


def exponential(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Softmax over exponential variates."""
    p = logits.softmax(-1, dtype=dtype)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def draw_cases(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[str, int, bool, dict[str, Any]]:
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(device, dtype)
    got = sample_categorical(logits, seed=1)
    want = sample_categorical(logits, seed=1, backend="naive")
    right = float((got.tokens == want.tokens).float().mean()) > 0.98 and bool((got.lse - want.lse).abs().max() < 1e-4)
    return (
        f"draw {list(shape)} {str(dtype)[6:]}", logits.numel() * logits.element_size(), right,
        {
            "torch.multinomial": lambda: torch.multinomial(logits.softmax(-1, dtype=torch.float32), 1),
            "LLaDA float64": lambda: llada(logits),
            "exponential float32": lambda: exponential(logits, torch.float32),
            "exponential float64": lambda: exponential(logits, torch.float64),
            "diffsamp tile": lambda: sample_categorical(logits, seed=1),
        },
    )  # fmt: skip


def guided_cases(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], compiled: bool
) -> tuple[str, int, bool, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    g = torch.Generator().manual_seed(0)
    c, u, x, h1 = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(4))
    coef = guided_coefficients((0.9, 0.2, -0.1), scale=5.0, eta=0.2, norm_threshold=15.0)[None].to(device)

    def ours() -> Any:
        return guided_step(c, u, x, (h1,), coef=coef, guidance="apg")

    want = guided_step(c, u, x, (h1,), coef=coef, guidance="apg", backend="naive")
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    right = all(
        float((a.double() - b.double()).abs().max()) < limit * float(b.double().abs().max())
        for a, b in zip(ours()[:2], want[:2], strict=True)
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample")
    scheduler.set_timesteps(20, device=device)
    middle = scheduler.timesteps[10]
    scheduler.step(h1, scheduler.timesteps[9], x)

    def eager() -> Any:
        guided = normalized_guidance(c, u, 4.0, None, 0.2, 15.0, True)
        scheduler._step_index, scheduler.lower_order_nums = 10, 1
        scheduler.model_outputs = [h1, h1]
        return scheduler.step(guided, middle, x)

    runs: dict[str, Any] = {"diffusers APG + 2M": eager, "diffsamp": ours}
    if compiled:

        def five_sums() -> Any:
            d = c - u
            dims = tuple(range(1, d.ndim))
            dd, cc, cd = ((a * b).sum(dims, keepdim=True) for a, b in ((d, d), (c, c), (c, d)))
            clamp = (15.0 / dd.sqrt()).clamp_max(1.0)
            x0 = (1.0 - 4.0 * 0.8 * clamp * cd / cc) * c + 4.0 * clamp * d
            return 0.9 * x + 0.2 * x0 - 0.1 * h1, x0

        runs["torch.compile of five sums"] = torch.compile(five_sums)
    return f"APG + 2M {list(shape)} {str(dtype)[6:]}", 9 * c.numel() * c.element_size(), right, runs


def linear_cases(device: torch.device, shape: tuple[int, ...]) -> tuple[str, int, bool, dict[str, Any]]:
    from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler

    g = torch.Generator().manual_seed(0)
    bank = [torch.randn(shape, generator=g).to(device) for _ in range(5)]
    table = torch.randn(1, 2, 5, generator=g, dtype=torch.float64).to(device)
    out = [torch.empty_like(bank[0]) for _ in range(2)]
    want = linear_step(bank, table, 0, backend="naive")
    right = all(float((a - b).abs().max()) < 1e-5 for a, b in zip(linear_step(bank, table), want, strict=True))

    def scheduler_step(kind: Any) -> Callable[[], Any]:
        scheduler = kind()
        scheduler.set_timesteps(20, device=device)
        steps = scheduler.timesteps
        if kind is EulerDiscreteScheduler:

            def run() -> Any:
                scheduler._step_index, scheduler.is_scale_input_called = 10, True
                return scheduler.step(bank[0], steps[10], bank[1])
        else:
            for t in steps[:10]:
                scheduler.step(bank[0], t, bank[1])

            def run() -> Any:
                scheduler._step_index = 10
                return scheduler.step(bank[0], steps[10], bank[1])

        return run

    return f"UniPC-2 row {list(shape)} float32", 7 * bank[0].numel() * 4, right, {
        "diffusers UniPC": scheduler_step(UniPCMultistepScheduler),
        "diffusers Euler": scheduler_step(EulerDiscreteScheduler),
        "diffsamp": lambda: linear_step(bank, table, 0, out),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    repeats = 3 if options.quick else 9
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, one thread"
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    block = torch.empty(1 << (28 if gpu else 24), device=device)
    target = torch.empty_like(block)
    copy = times(lambda: target.copy_(block), device, repeats)
    bandwidth = 2 * block.numel() * 4 / copy[len(copy) // 2]
    cases = [linear_cases(device, s) for s in ((1, 4, 64, 64), (4, 4, 128, 128), (1, 16, 128, 128))]
    if gpu:
        cases += [guided_cases(device, torch.bfloat16, (8, 16, 128, 128), options.compile),
                  draw_cases(device, torch.bfloat16, (4096, 131072))]  # fmt: skip
    else:
        cases += [guided_cases(device, torch.float32, (4, 4, 128, 128), options.compile),
                  draw_cases(device, torch.float32, (64, 32768)), draw_cases(device, torch.bfloat16, (64, 32768))]  # fmt: skip  # noqa: E501
    rows = []
    print("case,form,device,torch,commit,p20_ms,p50_ms,p80_ms,bytes,share_of_copy,speedup")
    for case, size, right, forms in cases:
        if not right:
            print(f"{case},WRONG RESULT: not timed")
            rows.append({"case": case, "error": "wrong result"})
            continue
        first = None
        for form, run in forms.items():
            found = times(run, device, repeats)
            p20, p50, p80 = (found[round(q * (len(found) - 1))] for q in (0.2, 0.5, 0.8))
            first = first or p50
            row = {"case": case, "form": form, "device": name, "torch": torch.__version__, "commit": commit.stdout.strip(),  # noqa: E501
                   "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "bytes": size, "share_of_copy": size / p50 / bandwidth,
                   "speedup": first / p50}  # fmt: skip
            rows.append(row)
            print(
                ",".join(f"{v:.4g}" if isinstance(v, float) else '"' + str(v) + '"' for v in row.values()), flush=True
            )
    if options.json:
        part = options.json.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        part.replace(options.json)
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
