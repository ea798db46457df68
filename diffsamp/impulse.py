"""The table of any diffusers scheduler, found by its impulse response.

A linear sampler is run once on vectors: the start is one basis vector, every network output another, every noise draw
another. What comes back are its coefficients. Each network input is then written in terms of the few newest registers.
"""

from __future__ import annotations

import copy
import importlib
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np

from .errors import DiffsampError
from .grids import Grid
from .plan import Mix, Plan, Row
from .process import Process

_TOLERANCE = 1e-9


def respond(
    scheduler: Any, num_inference_steps: int | None = None, *, exact: bool = True, sigmas: Any = None
) -> tuple[np.ndarray, Any]:
    """Impulse response of a scheduler: every sample as a combination of the start, the raw outputs and the noises.

    Args:
        scheduler: of diffusers; it is copied, not changed.
        num_inference_steps: calls ``set_timesteps``; None where that was done.
        exact: feed it float64 noise levels in place of its float32 ones.
        sigmas: noise levels (without the final one) to put in place of its own.

    Returns:
        (response, scheduler copy): response of shape (calls + 1, 1 + 2·calls), columns start, outputs, noises, in the
        scheduler's own sample scale.
    """
    import torch

    run = copy.deepcopy(scheduler)
    if num_inference_steps is not None:
        run.set_timesteps(num_inference_steps)
    if exact:
        _sharpen(run, sigmas)
    if hasattr(run, "set_begin_index"):
        run.set_begin_index(0)
    n = len(run.timesteps)
    unit = torch.eye(1 + 2 * n, dtype=torch.float64)
    drawn = 0

    def randn(*args: Any, **kwargs: Any) -> Any:
        nonlocal drawn
        if drawn >= n:
            raise DiffsampError("scheduler: draws noise more than once a step; it has no plan")
        drawn += 1
        return unit[n + drawn][None]

    rows = [unit[0]]
    x = unit[0][None]
    module = importlib.import_module(type(run).step.__module__)
    with ExitStack() as stack:
        if exact:
            stack.enter_context(mock.patch.object(module, "torch", _Doubled(torch)))
        if hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", randn))
        for i, t in enumerate(run.timesteps):
            drawn = max(drawn, i)
            x = run.step(unit[1 + i][None], t, x, return_dict=False)[0].to(torch.float64)
            rows.append(x[0])
    response = torch.stack(rows).numpy()
    if not np.isfinite(response).all():
        raise DiffsampError("scheduler: its coefficients are not finite")
    return response, run


class _Doubled:
    """torch with float32 meaning float64: some schedulers cast the sample down inside a step."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def _sharpen(run: Any, sigmas: Any) -> None:
    """Put float64 noise levels into a scheduler whose own are float32."""
    import torch

    if hasattr(run, "alphas_cumprod"):
        betas = run.betas.double()
        c = run.config
        if c.get("trained_betas") is None and c.get("beta_schedule") in (
            "linear",
            "scaled_linear",
            "squaredcos_cap_v2",
        ):
            process = Process.vp(
                c["beta_schedule"], c["beta_start"], c["beta_end"], c["num_train_timesteps"],
                rescale_betas_zero_snr=bool(c.get("rescale_betas_zero_snr")),
            )  # fmt: skip
            table = process.table
            assert table is not None
            bar = torch.from_numpy(1 / (1 + table**2))
        else:
            bar = torch.cumprod(1 - betas, 0)
        run.alphas_cumprod = bar
        if hasattr(run, "final_alpha_cumprod"):
            one = torch.tensor(1.0, dtype=torch.float64)
            run.final_alpha_cumprod = one if c.get("set_alpha_to_one", True) else bar[0]
        run.one = torch.tensor(1.0, dtype=torch.float64)
        run.alphas = 1 - betas
    if getattr(run, "sigmas", None) is not None:
        if sigmas is not None:
            last = run.sigmas[len(sigmas) :].double()
            run.sigmas = torch.cat([torch.as_tensor(np.array(sigmas), dtype=torch.float64), last])
        else:
            run.sigmas = run.sigmas.double()


def from_scheduler(
    scheduler: Any, num_inference_steps: int | None = None, *, process: Process | None = None, exact: bool = True
) -> Plan:
    """The plan of a diffusers scheduler.

    Args:
        scheduler: any whose step is linear in the sample and the outputs. Prediction type epsilon, sample,
            v_prediction or flow_prediction; no clipping, no thresholding.
        num_inference_steps: None where ``set_timesteps`` was called.
        process: its process; recognised from the config by default.
        exact: with float64 noise levels (its own float32 ones otherwise).

    Raises:
        DiffsampError: not linear, not a recurrence over a short history, or a process that is not recognised.
    """
    config = scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        raise DiffsampError("scheduler: clips or thresholds the prediction, which is not linear; switch that off first")
    response, run = respond(scheduler, num_inference_steps, exact=exact)
    n = len(run.timesteps)
    flow = "FlowMatch" in type(run).__name__ or bool(config.get("use_flow_sigmas"))
    if process is None:
        process = _process_of(config, flow)
    grid, scale = _grid_of(run, process, flow, n)
    prediction = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    # In our own sample scale (Euler and its kin keep x/alpha).
    response = response * scale[:, None]
    response[:, 0] /= scale[0]
    rows, units = [], _outputs(response, process, grid, prediction, n)
    for i in range(n):
        noise = np.eye(1 + 2 * n)[1 + n + i]
        for depth in range(1, i + 2):
            bank = [response[i], *(units[j] for j in range(i, i - depth, -1)), noise]
            names = np.stack(bank)
            weights, *_ = np.linalg.lstsq(names.T, response[i + 1], rcond=None)
            error = np.abs(names.T @ weights - response[i + 1]).max()
            if error <= _TOLERANCE * max(1.0, np.abs(response[i + 1]).max()):
                break
        else:
            raise DiffsampError(f"scheduler: step {i} is not a combination of its sample and outputs")
        weights[np.abs(weights) < 1e-13] = 0.0
        level, following = grid.levels[i], grid.levels[i + 1]
        rows.append(Row(level, following, Mix(input=weights[0], m=tuple(weights[1:-1]), noise=weights[-1])))
    return Plan(tuple(rows), process, grid, solver=type(scheduler).__name__, check=False)


def _outputs(response: np.ndarray, process: Process, grid: Grid, prediction: str, n: int) -> list[np.ndarray]:
    """x0 prediction of every call as a combination of start, outputs and noises."""
    unit = np.eye(1 + 2 * n)
    made = []
    for i in range(n):
        p, q = process.x0_coefficients(grid.levels[i], prediction)
        made.append(p * response[i] + q * unit[1 + i])
    return made


def _process_of(config: Any, flow: bool) -> Process:
    if flow:
        return Process.flow(config.get("shift") or config.get("flow_shift") or 1.0, config["num_train_timesteps"])
    if "beta_schedule" not in config:
        raise DiffsampError("process: is not recognised from the scheduler's config; give it")
    return Process.vp(
        config["beta_schedule"], config["beta_start"], config["beta_end"], config["num_train_timesteps"],
        trained_betas=config.get("trained_betas"), rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
    )  # fmt: skip


def _grid_of(run: Any, process: Process, flow: bool, n: int) -> tuple[Grid, np.ndarray]:
    """The visited levels, and alpha where the scheduler keeps x/alpha (1 otherwise)."""
    times = run.timesteps.double().tolist()
    levels = []
    if getattr(run, "sigmas", None) is not None and len(run.sigmas) == n + 1:
        for i, sigma in enumerate(run.sigmas.double().tolist()):
            ratio = sigma / (1 - sigma) if flow and sigma < 1 else (float("inf") if flow else sigma)
            levels.append(process.level(ratio, i, times[i] if i < n else None))
    else:
        levels = [process.level_at(t, i) for i, t in enumerate(times)]
        last = getattr(run, "final_alpha_cumprod", None)
        bar = 1.0 if last is None else float(last)
        levels.append(process.level(((1 - bar) / bar) ** 0.5, n))
    grid = Grid(process, tuple(levels), "scheduler")
    kept = "Euler" in type(run).__name__ or "Heun" in type(run).__name__ or "LMS" in type(run).__name__
    scale = np.array([level.alpha if kept and not flow else 1.0 for level in grid.levels])
    return grid, scale
