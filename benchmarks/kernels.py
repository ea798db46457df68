"""Kernels against their peers, on whatever device there is. Correctness first: a form that fails it gets no time.

    python benchmarks/kernels.py [--quick] [--compile] [--json FILE] [--csv FILE] [--markdown FILE]

One CSV row per form: 20th, 50th and 80th percentile in milliseconds (thread CPU time on a CPU, one thread; events on a
GPU), bytes that the operation must move, the share of a copy's bandwidth in the same run, and the speed-up over the
first peer of the case. The forms of a case take turns, each with an untimed call first, so that a busy machine troubles
all alike. ``--compile`` adds torch.compile of the peers and of our own forms; it needs a C++ compiler on a CPU. The GPU
peer FlashInfer is named as not installable where it is.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]

from diffsamp_kernels import guided_coefficients, guided_step, linear_step, sample_categorical  # noqa: E402
from diffsamp_kernels.dispatch import compiler_missing  # noqa: E402


@dataclass
class Form:
    """One way to do it; ``error`` returns what is wrong with its result, None for a peer that is taken as it is."""

    run: Callable[[], Any]
    error: Callable[[], str | None] | None = None


@dataclass
class Case:
    """The forms of one operation on one input; the first is the peer that speed-ups are over."""

    name: str
    bytes: int
    forms: dict[str, Form]
    notes: list[str] = field(default_factory=list)


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    start = time.thread_time()
    run()
    return (time.thread_time() - start) * 1e3


def in_turn(
    forms: dict[str, Callable[[], Any]], device: torch.device, rounds: int, each: int
) -> dict[str, list[float]]:
    """Sorted milliseconds of each form: ``each`` calls in each of ``rounds`` rounds, after an untimed one."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in forms.items():
                run()
                found[name] += [once(run, device) for _ in range(each)]
    return {name: sorted(values) for name, values in found.items()}


def differs(run: Callable[[], Any], wanted: tuple[torch.Tensor, ...], limit: float) -> Callable[[], str | None]:
    """The gate of tensors: the largest error over the largest value."""

    def check() -> str | None:
        for a, b in zip(run(), wanted, strict=False):
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
            if not error < limit:
                return f"error {error:.2g}, limit {limit:.2g}"
        return None

    return check


def linear_case(device: torch.device, shape: tuple[int, ...], compiled: bool) -> Case:
    """A second-order predictor-corrector row: five registers, two outputs."""
    from diffusers import EulerDiscreteScheduler, UniPCMultistepScheduler

    g = torch.Generator().manual_seed(0)
    block = torch.randn((5, *shape), generator=g).to(device)
    bank = [b.clone() for b in block]
    table = torch.randn(1, 2, 5, generator=g, dtype=torch.float64).to(device)
    out = [torch.empty_like(bank[0]) for _ in range(2)]
    want = linear_step(bank, table, 0, backend="naive")

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

    forms = {
        "diffusers UniPC": Form(scheduler_step(UniPCMultistepScheduler)),
        "diffusers Euler": Form(scheduler_step(EulerDiscreteScheduler)),
    }
    ours: dict[str, Callable[[], Any]] = {
        "diffsamp": lambda: linear_step(bank, table, 0, out),
        "diffsamp, registers in one storage": lambda: linear_step(list(block), table, 0, out),
    }
    if compiled:
        ours["diffsamp compiled"] = lambda: linear_step(bank, table, 0, backend="compiled")
    forms |= {name: Form(run, differs(run, want, 1e-5)) for name, run in ours.items()}
    return Case(f"UniPC-2 row {list(shape)} float32", 7 * bank[0].numel() * 4, forms)


def guided_case(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], compiled: bool) -> Case:
    """Adaptive projected guidance and a step of DPM-Solver++ 2M; predictions are x0 on both sides."""
    from diffusers import AdaptiveProjectedGuidance, DPMSolverMultistepScheduler

    g = torch.Generator().manual_seed(0)
    c, u, x, h1 = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(4))
    coef = guided_coefficients((0.9, 0.2, -0.1), scale=5.0, eta=0.2, norm_threshold=15.0)[None].to(device)
    options = {"coef": coef, "guidance": "apg"}
    want = guided_step(c, u, x, (h1,), backend="naive", **options)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    guider = AdaptiveProjectedGuidance(
        guidance_scale=4.0, adaptive_projected_guidance_momentum=None, adaptive_projected_guidance_rescale=15.0,
        eta=0.2, use_original_formulation=True,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample")
    scheduler.set_timesteps(20, device=device)
    middle = scheduler.timesteps[10]
    guider.set_state(10, 20, middle)  # type: ignore[arg-type]
    scheduler.step(h1, scheduler.timesteps[9], x)

    def theirs(guide: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            guided = guide(pred_cond=c, pred_uncond=u)[0]
            scheduler._step_index, scheduler.lower_order_nums = 10, 1
            scheduler.model_outputs = [h1, h1]
            return scheduler.step(guided, middle, x)

        return run

    def guider_error() -> str | None:
        return differs(lambda: (guider.forward(pred_cond=c, pred_uncond=u)[0],), want[1:2], 10 * limit)()

    def ours(backend: str | None) -> Callable[[], Any]:
        return lambda: guided_step(c, u, x, (h1,), backend=backend, **options)[:2]

    forms = {
        "diffusers APG guider + DPM++ 2M": Form(theirs(guider.forward), guider_error),
        "diffsamp": Form(ours(None), differs(ours(None), want[:2], limit)),
    }
    if compiled:
        forms["torch.compile of diffusers' guider, and its scheduler"] = Form(theirs(torch.compile(guider.forward)))
        plain = torch.compile(as_published)
        forms["torch.compile of the naive form"] = Form(
            lambda: plain(c, u, x, h1), differs(lambda: plain(c, u, x, h1), want[:2], limit)
        )
        forms["diffsamp compiled"] = Form(ours("compiled"), differs(ours("compiled"), want[:2], limit))
    # c and u in the reduction; c, u, x, h1 in the write pass; two results.
    return Case(f"APG + 2M {list(shape)} {str(dtype)[6:]}", 8 * c.numel() * c.element_size(), forms)


def as_published(
    c: torch.Tensor, u: torch.Tensor, x: torch.Tensor, h1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guided step as its papers write it, float64 inside, with the numbers of :func:`guided_case`."""
    dims = tuple(range(1, c.ndim))
    wide, d = c.double(), c.double() - u.double()
    d = d * (15.0 / torch.linalg.vector_norm(d, dim=dims, keepdim=True)).clamp_max(1.0)
    unit = wide / torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
    parallel = (d * unit).sum(dims, keepdim=True) * unit
    x0 = wide + 4.0 * (d - parallel + 0.2 * parallel)
    return (0.9 * x.double() + 0.2 * x0 - 0.1 * h1.double()).to(x.dtype), x0.to(x.dtype)


def llada(logits: torch.Tensor) -> torch.Tensor:
    """The float64 Gumbel draw as published with LLaDA: exp(logit) / (-log u)."""
    wide = logits.double()
    noise = (-torch.log(torch.rand_like(wide))) ** 1.0
    return (wide.exp() / noise).argmax(-1)


def exponential(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Softmax over exponential variates."""
    p = logits.softmax(-1, dtype=dtype)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def uniform_exponential(logits: torch.Tensor) -> torch.Tensor:
    """The same with float32 uniforms, on all 24 bits that they have: the floor of a draw with a float32 tail."""
    p = logits.softmax(-1, dtype=torch.float32)
    return (p / torch.rand_like(p).neg_().log1p_().neg_()).argmax(-1)


def cut_multinomial(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """top-k and top-p by a sort and torch.multinomial, as samplers of text do it."""
    values, indices = logits.float().topk(top_k, -1)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return indices.gather(1, torch.multinomial(p, 1))


def flashinfer_forms(logits: torch.Tensor) -> tuple[dict[str, Form], list[str]]:
    """FlashInfer's two draws, or why they are not here."""
    if not logits.is_cuda:
        return {}, ["FlashInfer: not installable here: its sampler needs a CUDA device"]
    try:
        sampling = importlib.import_module("flashinfer.sampling")
        sampling.sampling_from_logits(logits[:1].float())
    except Exception as error:  # an import error, a missing compiler, a device it does not know: all are the reason
        return {}, [f"FlashInfer: not installable here: {type(error).__name__}: {str(error).splitlines()[0][:120]}"]
    return {
        "FlashInfer sampling_from_logits": Form(lambda: sampling.sampling_from_logits(logits.float())),
        "FlashInfer sampling_from_probs": Form(lambda: sampling.sampling_from_probs(logits.float().softmax(-1))),
    }, []


def draw_gate(logits: torch.Tensor, **options: Any) -> Callable[[], str | None]:
    """The gate of a draw: tokens and log-sum-exp of the definition, but for rows on the edge of a float32 rounding."""

    def check() -> str | None:
        definition: dict[str, Any] = options | {"backend": "naive"}
        got, want = sample_categorical(logits, seed=1, **options), sample_categorical(logits, seed=1, **definition)
        same, error = float((got.tokens == want.tokens).float().mean()), float((got.lse - want.lse).abs().max())
        return None if same > 0.98 and error < 1e-4 else f"{same:.1%} of the tokens, log-sum-exp off by {error:.2g}"

    return check


def draw_case(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], compiled: bool) -> Case:
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(device, dtype)
    others, notes = flashinfer_forms(logits)
    forms = {
        "torch.multinomial": Form(lambda: torch.multinomial(logits.softmax(-1, dtype=torch.float32), 1)),
        "LLaDA float64": Form(lambda: llada(logits)),
        "exponential float32": Form(lambda: exponential(logits, torch.float32)),
        "exponential float64": Form(lambda: exponential(logits, torch.float64)),
        "uniform float32, tail of 24 bits": Form(lambda: uniform_exponential(logits)),
    } | others
    if compiled:
        made = torch.compile(llada)
        forms["torch.compile of LLaDA float64 (tail of float32)"] = Form(lambda: made(logits))
    forms["diffsamp tile"] = Form(lambda: sample_categorical(logits, seed=1), draw_gate(logits))
    if device.type == "cuda":  # on a CPU the race is the definition itself
        forms["diffsamp race"] = Form(
            lambda: sample_categorical(logits, seed=1, method="race"), draw_gate(logits, method="race")
        )
    size = logits.numel() * logits.element_size()
    return Case(f"draw {list(shape)} {str(dtype)[6:]}", size, forms, notes)


def cut_case(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(device, dtype)
    options: dict[str, Any] = {"top_k": 50, "top_p": 0.9}
    forms = {
        "topk + torch.multinomial": Form(lambda: cut_multinomial(logits, 50, 0.9)),
        "diffsamp tile": Form(lambda: sample_categorical(logits, seed=1, **options), draw_gate(logits, **options)),
    }
    return Case(f"top-50, top-0.9 draw {list(shape)} {str(dtype)[6:]}", logits.numel() * logits.element_size(), forms)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, one thread"


def measure(cases: list[Case], device: torch.device, rounds: int, each: int) -> list[dict[str, Any]]:
    """The rows of all cases, printed as they come."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    common = {"device": device_name(device), "torch": torch.__version__, "commit": commit.stdout.strip()}
    block = torch.empty(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(block)
    copies = in_turn({"copy": lambda: target.copy_(block)}, device, rounds, 2)["copy"]
    bandwidth = 2 * block.numel() * 4 / copies[len(copies) // 2]
    print(f"# copy of {block.numel() * 4 >> 20} MiB: {bandwidth / 1e6:.1f} GB/s")
    print("case,form,device,torch,commit,p20_ms,p50_ms,p80_ms,bytes,share_of_copy,speedup")
    rows: list[dict[str, Any]] = []
    for case in cases:
        for note in case.notes:
            print(f"# {case.name}: {note}")
        right = {}
        for name, form in case.forms.items():
            error = None if form.error is None else form.error()
            if error is None:
                right[name] = form.run
            else:
                print(f"# {case.name}, {name}: WRONG RESULT, not timed: {error}")
                rows.append({"case": case.name, "form": name, **common, "error": error})
        first = None
        for name, found in in_turn(right, device, rounds, each).items():
            p20, p50, p80 = (found[round(q * (len(found) - 1))] for q in (0.2, 0.5, 0.8))
            first = first or p50
            row = {
                "case": case.name, "form": name, **common, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "bytes": case.bytes, "share_of_copy": case.bytes / p50 / bandwidth, "speedup": first / p50,
            }  # fmt: skip
            rows.append(row)
            print(table([row]), end="", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """CSV lines, numbers with four digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in row.values()])
    return text.getvalue()


def markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """A table to read."""
    head = rows[0]
    lines = [
        f"# Kernels: {head['device']}, torch {head['torch']}, commit {head['commit']}",
        "",
        "Milliseconds: thread CPU time on a CPU, events on a GPU. Bytes are what the operation must move; the share is",
        "of a copy's bandwidth in the same run (it can exceed 1 where the data fit in the cache). Forms take turns.",
        "",
        "| case | form | p20 | p50 | p80 | MB | share of copy | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        start = f"| {row['case']} | {row['form']} | "
        if "error" in row:
            lines.append(f"{start}wrong result, not timed: {row['error']} | | | | | |")
            continue
        figures = [f"{row[k]:.3g}" for k in ("p20_ms", "p50_ms", "p80_ms")]
        figures += [f"{row['bytes'] / 1e6:.2f}", f"{row['share_of_copy']:.1%}", f"{row['speedup']:.2f}"]
        lines.append(start + " | ".join(figures) + " |")
    return "\n".join([*lines, "", *notes, ""])


def write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and shapes")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--markdown", type=Path, help="also write a table to read here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled, half = options.compile, torch.bfloat16
    if compiled and (missing := compiler_missing(device.type, None, None)) is not None:
        raise SystemExit(f"--compile: {missing}")
    shapes = [(1, 4, 64, 64), (4, 4, 128, 128), (1, 16, 128, 128)]
    # Shapes of a case are compiled one by one, so only the middle one is.
    cases = [linear_case(device, s, compiled and s == shapes[1]) for s in (shapes[1:2] if options.quick else shapes)]
    if device.type == "cuda":
        cases += [
            guided_case(device, half, (8, 16, 128, 128), compiled),
            draw_case(device, half, (4096, 131072), compiled),
            cut_case(device, half, (4096, 131072)),
        ]
    else:
        cases += [
            guided_case(device, torch.float32, (4, 4, 128, 128), compiled),
            draw_case(device, torch.float32, (64, 32768), compiled),
            draw_case(device, half, (64, 32768), False),
            cut_case(device, torch.float32, (64, 32768)),
        ]
        if not options.quick:
            cases.insert(-3, guided_case(device, torch.float32, (2, 16, 128, 128), False))
    rows = measure(cases, device, *((2, 3) if options.quick else (6, 5)))
    if options.json:
        write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.csv:
        names = [k for k in rows[0]] if "error" not in rows[0] else []
        write(options.csv, ",".join(names) + "\n" + table([r for r in rows if "error" not in r]))
    if options.markdown:
        notes = sorted({note for case in cases for note in case.notes})
        write(options.markdown, markdown(rows, notes))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
