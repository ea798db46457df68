"""diffusers scheduler classes for every registered solver, made by one factory.

    pipe.scheduler = diffsamp.UniPCScheduler.from_config(pipe.scheduler.config)

``set_timesteps`` compiles the plan, ``step`` applies a row. Steps are followed by index, never found by value alone;
a run that starts inside the schedule (image-to-image) gets a plan of its own whose history is empty there.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .. import engine, rng
from ..errors import DiffsampError
from ..grids import Grid, dynamic_shift, grid, shift_sigmas, stretch_to_terminal
from ..plan import Plan
from ..process import Process
from ..registry import Solver, solver, solvers
from .per_call import for_run

_WORDS = {
    "ddim": "DDIM", "ddpm": "DDPM", "dpmpp": "DPMPP", "unipc": "UniPC", "deis": "DEIS", "ipndm": "IPNDM", "sde": "SDE",
    "er": "ER", "sa": "SA", "dc": "DC", "dualfast": "DualFast",
    "1m": "1M", "2m": "2M", "3m": "3M", "2s": "2S", "3s": "3S",
}  # fmt: skip
_FLOW_KEYS = ("shift", "base_shift", "max_shift", "invert_sigmas")  # no stock VP class has these
_MODEL_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "snr_shift_scale",
)  # fmt: skip
_IGNORED_STEP_OPTIONS = ("use_clipped_model_output", "variance_noise")


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """``prev_sample``: the next network input; ``pred_original_sample``: the x0 prediction of this step."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """A registered solver as a diffusers scheduler. The classes that users see are made by :func:`scheduler_class`.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: VP schedule.
        snr_shift_scale: divides the signal-to-noise ratio (CogVideoX).
        prediction_type: epsilon, sample, v_prediction or flow_prediction.
        timestep_spacing, steps_offset, final_sigmas_type, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas:
            the grid, as stock schedulers name it.
        grid: a grid of diffsamp by name, in place of those.
        process: ``vp``, ``flow``, ``vp-continuous`` (Stable Video Diffusion) or ``edm``; ``from_config`` recognises it.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, invert_sigmas,
        shift_terminal, time_shift_type: flow schedule, as FlowMatchEulerDiscreteScheduler treats them.
        sigma_min, sigma_max, sigma_data: range and data scale of continuous processes.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: wrap the x0
            prediction before the solver sees it.
        solver: registry name with options or composition, in place of the class's own.
        solver_options: keyword options of the solver.
        seed: seed of the solver's own noise where the pipeline passes no generator (sample s uses seed + s).
    """

    _compatibles = [entry.name for entry in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1
    solver_name = "unipc"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        grid: str | None = None,
        process: str = "vp",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float = 0.5,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        solver: str | None = None,
        solver_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if solver is None:
            self.register_to_config(solver=self.solver_name)
        self.process = self._make_process()
        self.solver: Solver = self._make_solver()
        self._flow_shift = float(shift)
        self.num_inference_steps: int | None = None
        self._plans: dict[int, Plan] = {}
        self._grid: Grid | None = None
        self._reset()
        self._read_config()
        table = self.process.table
        if table is not None:
            bar = 1.0 / (1.0 + table**2)
            self.alphas_cumprod = torch.from_numpy(bar).to(torch.float32)
            ratios = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
            self.alphas = torch.from_numpy(ratios).to(torch.float32)
            self.betas = 1.0 - self.alphas
            self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
            self.sigmas = torch.from_numpy(np.append(table[::-1], 0.0)).to(torch.float32)
        else:
            sigmas = np.linspace(1.0, 1.0 / num_train_timesteps, num_train_timesteps)
            if process == "flow" and not use_dynamic_shifting:
                sigmas = shift_sigmas(sigmas, shift)
            self.timesteps = torch.from_numpy(sigmas * num_train_timesteps).to(torch.float32)
            self.sigmas = torch.from_numpy(np.append(sigmas, 0.0)).to(torch.float32)
        # Pipelines may set these (Z-Image does): the range that a flow's own grid spans, before its shift.
        ends = np.array([1.0, 1.0 / num_train_timesteps])
        if process == "flow" and not use_dynamic_shifting:
            ends = shift_sigmas(ends, shift)
        self.sigma_max, self.sigma_min = (float(e) for e in ends)

    # -- what the config says ---------------------------------------------------------------------------------------

    def _make_process(self) -> Process:
        c = self.config
        if c["process"] == "flow":
            return Process.flow(c["shift"], c["num_train_timesteps"], inverted=bool(c["invert_sigmas"]))
        if c["process"] == "vp-continuous":
            return Process.vp_continuous(c["sigma_min"] or 0.002, c["sigma_max"] or 700.0)
        if c["process"] == "edm":
            low, high = c["sigma_min"] or 0.002, c["sigma_max"] or 80.0
            return Process.ve(low, high, sigma_data=c["sigma_data"], clock="c_noise")
        if c["process"] != "vp":
            raise DiffsampError(f"process: got {c['process']!r}; accepted: vp, flow, vp-continuous, edm")
        schedule = (c["beta_schedule"], c["beta_start"], c["beta_end"], c["num_train_timesteps"])
        rescale, shift = c["rescale_betas_zero_snr"], c["snr_shift_scale"]
        if shift == 1.0:
            return Process.vp(*schedule, trained_betas=c["trained_betas"], rescale_betas_zero_snr=rescale)
        table = Process.vp(*schedule, trained_betas=c["trained_betas"]).table
        assert table is not None
        return Process.vp(alphas_cumprod=1.0 / (1.0 + shift * table**2), rescale_betas_zero_snr=rescale)

    def _make_solver(self) -> Solver:
        return solver(self.config["solver"] or self.solver_name, **dict(self.config["solver_options"] or {}))

    @property
    def prediction(self) -> str:
        """Prediction type of the network, as :meth:`diffsamp.Process.x0_coefficients` names it."""
        kind = self.config["prediction_type"]
        if self.config["process"] == "flow":
            return "flow_prediction"
        return "edm" if self.config["process"] == "edm" else kind

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the config of any scheduler. A flow, EDM or continuous config is recognised, and values that a pipeline
        changed after construction are kept."""
        if isinstance(config, dict):
            config = recognise(config)
            # Another solver's name and options are not ours, though its process and grid are.
            named = config.get("solver")
            if named and solver(named).info.name != cls.solver_name:
                config = {k: v for k, v in config.items() if k not in ("solver", "solver_options")}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        library = importlib.import_module("diffusers")
        names = [cls.__name__, *cls._compatibles]
        found = [getattr(library, name) for name in names if hasattr(library, name)]
        stock = [c for c in found if "_backends" not in c.__dict__ and issubclass(c, SchedulerMixin)]
        return [*stock, *(scheduler_class(name) for name in solvers())]

    # -- the schedule -----------------------------------------------------------------------------------------------

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the start noise (1 except for EDM's variance-exploding samples)."""
        return (self.process.noise_to_signal_range[1] ** 2 + 1) ** 0.5 if self.config["process"] == "edm" else 1.0

    @property
    def step_index(self) -> int | None:
        """Row that the next :meth:`step` applies; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def shift(self) -> float:
        return self._flow_shift

    def set_shift(self, shift: float) -> None:
        """Change the static flow shift."""
        self._flow_shift = float(shift)

    @property
    def plan(self) -> Plan:
        """The compiled table of the current schedule."""
        return self._plan_from(0)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where in the schedule a run begins (image-to-image)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Compile the plan of a run.

        Args:
            num_inference_steps: number of steps; may be left out where sigmas or timesteps are given.
            device: where ``timesteps`` goes (``sigmas`` stays on the host).
            sigmas: noise levels in falling order (flow: before the shift, as pipelines pass them).
            mu: dynamic flow shift; ignored where the config does not ask for dynamic shifting.
            timesteps: network times in falling noise.

        Raises:
            DiffsampError: steps out of range, lists of unequal length, noise that does not fall.
        """
        given = None if sigmas is None else _as_array("sigmas", sigmas)
        times = None if timesteps is None else _as_array("timesteps", timesteps)
        if given is None and times is None and num_inference_steps is None:
            raise DiffsampError("num_inference_steps: is needed where neither sigmas nor timesteps are given")
        # The config may have been changed by a pipeline since construction.
        self.process = self._make_process()
        flow = self.config["process"] == "flow"
        self._grid = self._flow_grid(num_inference_steps, given, times, mu) if flow else self._grid_of(
            num_inference_steps, given, times
        )
        self._plans = {}
        self._reset()
        self._read_config()
        engine.programs(self.plan, self._prediction)  # compiled here, so that no step pays for it
        rows = self.plan.rows
        told = np.array([row.level.t for row in rows])
        whole = self.process.clock == "discrete" and bool((told == np.round(told)).all())
        self.timesteps = torch.from_numpy(told).to(device=device, dtype=torch.int64 if whole else torch.float32)
        levels = [row.level for row in rows] + [rows[-1].next_level]
        ratios = np.array([level.sigma if flow else level.noise_to_signal for level in levels])
        self.sigmas = torch.from_numpy(1.0 - ratios if self.config["invert_sigmas"] and flow else ratios).float()
        self.num_inference_steps = len(self._grid)

    def _grid_of(self, n: int | None, sigmas: np.ndarray | None, times: np.ndarray | None) -> Grid:
        c = self.config
        if sigmas is not None:
            return Grid.from_sigmas(self.process, sigmas, times)
        if times is not None:
            if self.process.clock != "discrete":
                return Grid.from_sigmas(self.process, np.exp(4 * times), times)
            return Grid.from_times(self.process, times, final=c["final_sigmas_type"])
        assert n is not None
        name = c["grid"]
        if name is None:
            name = next((k for k in ("karras", "exponential", "beta") if c[f"use_{k}_sigmas"]), None)
        if name is None:
            name = c["timestep_spacing"] if self.process.clock == "discrete" else "karras"
        options = {"steps_offset": c["steps_offset"]} if name == "leading" else {}
        low, high = (c["sigma_min"], c["sigma_max"]) if self.process.clock == "discrete" else (None, None)
        return grid(name, self.process, n, final=c["final_sigmas_type"], sigma_min=low, sigma_max=high, **options)

    def _flow_grid(
        self, n: int | None, sigmas: np.ndarray | None, times: np.ndarray | None, mu: float | None
    ) -> Grid:
        c = self.config
        dynamic = bool(c["use_dynamic_shifting"])
        if dynamic and mu is None:
            raise DiffsampError("mu: is needed where the config has use_dynamic_shifting")
        n = n if n is not None else len(sigmas if sigmas is not None else times)  # type: ignore[arg-type]
        if sigmas is not None and times is not None and len(sigmas) != len(times):
            raise DiffsampError(f"timesteps: got {len(times)} for {len(sigmas)} sigmas; needs one each")
        if sigmas is None and times is not None:
            sigmas = times / c["num_train_timesteps"]
        if sigmas is None and c["grid"] not in (None, "flow"):
            return grid(
                c["grid"], self.process, n, shift=self._flow_shift, mu=mu if dynamic else None,
                time_shift_type=c["time_shift_type"], shift_terminal=c["shift_terminal"],
            )  # fmt: skip
        if sigmas is None:
            if isinstance(n, bool) or int(n) != n or n < 1:
                raise DiffsampError(f"num_inference_steps: got {n!r}; must be a whole number of 1 or above")
            sigmas = np.linspace(self.sigma_max, self.sigma_min, n)
        if dynamic:
            assert mu is not None
            sigmas = dynamic_shift(sigmas, float(mu), c["time_shift_type"])
        else:
            sigmas = shift_sigmas(sigmas, self._flow_shift)
        if c["shift_terminal"]:
            sigmas = stretch_to_terminal(sigmas, c["shift_terminal"])
        kind = next((k for k in ("karras", "exponential", "beta") if c[f"use_{k}_sigmas"]), None)
        if kind is not None and len(sigmas) > 1:
            return grid(kind, self.process, len(sigmas), sigma_min=float(sigmas[-1]), sigma_max=float(sigmas[0]))
        return Grid.from_sigmas(self.process, sigmas, times)

    def _plan_from(self, start: int) -> Plan:
        """The plan of a run that begins at row ``start``; its history is empty there."""
        if self._grid is None:
            raise DiffsampError("num_inference_steps: is not set; call set_timesteps first")
        if start not in self._plans:
            where = 0 if start == 0 else self._plan_from(0).rows[start].level.index
            made = for_run(self.solver, len(self._grid), where)
            self._plans[start] = made(self.process, self._grid.after(where))
        return self._plans[start]

    # -- the run ----------------------------------------------------------------------------------------------------

    def _read_config(self) -> None:
        """What every step needs of the config, read once a run."""
        self._prediction = self.prediction
        self._edm = self.config["process"] == "edm"
        self._negated = self._edm and self.config["prediction_type"] == "v_prediction"
        self._wrapped = bool(self.config["clip_sample"] or self.config["thresholding"])

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._start = 0
        self._state: engine.State | None = None
        self._returned: torch.Tensor | None = None

    def __copy__(self) -> PlanScheduler:
        """A copy that can go on by itself: a step may write over outputs that this object retires."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        if (state := self._state) is not None:
            kept = isinstance(state.committed, tuple) and state.committed[1] is not None
            base, outputs = state.base if kept else state.committed, tuple(m.clone() for m in state.history)
            made._state = replace(state, committed=base, history=outputs)
        return made

    def index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Row of a network time: the second of two equal ones, the nearest where there is none."""
        table = (self.timesteps if schedule_timesteps is None else schedule_timesteps).detach().cpu().double()
        gap = (table - float(timestep)).abs()
        best = (gap == gap.min()).nonzero().flatten()
        exact = bool(gap.min() <= 1e-3 * max(1.0, abs(float(timestep))))
        if not exact and self.config["process"] == "vp":
            return len(table) - 1
        return int(best[1] if len(best) > 1 else best[0])

    def _init_step_index(self, timestep: Any) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
        elif isinstance(timestep, torch.Tensor) and _shares_memory(timestep, self.timesteps):
            # An element of ``timesteps`` says its place itself: no value is read back from the device.
            self._step_index = int(timestep.storage_offset() - self.timesteps.storage_offset())
        else:
            self._step_index = self.index_for_timestep(timestep)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input for a sample: the sample itself, except for EDM networks (c_in·sample)."""
        if not self._edm:
            return sample
        if self._step_index is None:
            self._init_step_index(timestep)
        sigma = self.plan.rows[min(self._step_index or 0, len(self.plan) - 1)].level.sigma
        return sample * (sigma**2 + self.config["sigma_data"] ** 2) ** -0.5

    def _level_at(self, index: int):
        rows = self.plan.rows
        return rows[index].level if index < len(rows) else rows[-1].next_level

    def _noised(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        if self._grid is None:
            # Training: any time of the process.
            levels = [self.process.level_at(float(t)) for t in torch.as_tensor(timesteps).flatten()]
        elif self._begin_index is None:
            levels = [self._level_at(self.index_for_timestep(t)) for t in torch.as_tensor(timesteps).flatten()]
        else:
            at = self._begin_index if self._step_index is None else self._step_index
            levels = [self._level_at(at)] * max(torch.as_tensor(timesteps).numel(), 1)

        def column(values: list[float]) -> torch.Tensor:
            made = torch.tensor(values, dtype=sample.dtype, device=sample.device)
            return made.reshape(-1, *([1] * (sample.ndim - 1)))

        return column([level.alpha for level in levels]) * sample + column([level.sigma for level in levels]) * noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha·original_samples + sigma·noise at the run's current place, or at ``timesteps`` where it is not set."""
        return self._noised(original_samples, noise, timesteps)

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """:meth:`add_noise` with the argument order of flow schedulers."""
        if noise is None:
            raise DiffsampError("noise: is needed")
        return self._noised(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha·noise − sigma·sample at ``timesteps`` (training target of v-prediction)."""
        levels = [self.process.level_at(float(t)) for t in timesteps.flatten()]
        alpha = torch.tensor([v.alpha for v in levels], dtype=sample.dtype, device=sample.device)
        sigma = torch.tensor([v.sigma for v in levels], dtype=sample.dtype, device=sample.device)
        shape = (-1, *([1] * (sample.ndim - 1)))
        return alpha.reshape(shape) * noise - sigma.reshape(shape) * sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> PlanSchedulerOutput | tuple[torch.Tensor]:
        """Apply the next row of the plan.

        Args:
            model_output: raw prediction of the network, guidance applied; learned-variance channels are dropped.
            timestep: read only at the first step of a run whose begin index is not set.
            sample: the network's input, before :meth:`scale_model_input`.
            generator: of a stochastic solver's noise; one per sample keeps samples independent of the batch.
            return_dict: give a :class:`PlanSchedulerOutput`, else a tuple.
        """
        for key, value in options.items():
            if key not in _IGNORED_STEP_OPTIONS and not (key == "eta" and not value):
                raise DiffsampError(f"{key}: got {value!r}; give it as an option of the solver (solver_options)")
        index = self._step_index
        if index is None:
            self._init_step_index(timestep)
            index = self._step_index
            assert index is not None
        state = self._state
        if state is None or state.index + self._start != index:
            # A run begins here, or somebody moved the index: the history is empty either way.
            self._start = min(index, len(self.plan) - 1)
            state = engine.init(self._plan_from(self._start), sample)
        elif sample is not self._returned:
            # Inpainting and callbacks edit the sample between steps.
            edited = sample.to(engine.working_dtype(sample.dtype))
            same = state.committed is state.input
            state = engine.State(
                state.index, edited, edited if same else state.base, state.history, state.pin, state.noise
            )
        plan = self._plans[self._start]
        row = plan.rows[state.index]
        output = model_output
        if output.shape != sample.shape and output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
            output = output[:, : sample.shape[1]]
        if self._negated:
            output = -output
        wrapped = self._wrapped
        x0 = None
        if wrapped or return_dict:
            p, q = plan.process.x0_coefficients(row.level, self._prediction)
            x0 = output.to(state.input.dtype) * q + (state.input * p if p else 0.0)
        if wrapped:
            assert x0 is not None
            x0 = self._threshold(x0) if self.config["thresholding"] else x0.clamp(
                -self.config["clip_sample_range"], self.config["clip_sample_range"]
            )
            level = row.level
            output = x0 if plan.form == "x0" else (state.input - level.alpha * x0) / level.sigma
        noise = self._noise(state, row, generator) if row.uses_noise else None
        # Handed over, not lent: the step can then free what it retires. If it fails, the history is empty afterwards.
        handed, self._state = [state], None
        del state
        state = self._state = engine.step(
            plan, handed.pop(), output, noise, prediction=self._prediction, converted=wrapped, donate=True
        )  # fmt: skip
        self._step_index = index + 1
        following = state.input
        if following.dtype is not sample.dtype:
            following = following.to(sample.dtype)
        self._returned = following
        if not return_dict:
            return (following,)
        return PlanSchedulerOutput(following, None if x0 is None else x0.to(sample.dtype))

    def _noise(self, state: engine.State, row: Any, generator: Any) -> torch.Tensor:
        x = state.input
        if generator is None and self.config["seed"] is not None:
            seeds = [int(self.config["seed"]) + s for s in range(x.shape[0])]
            return rng.normal(seeds, x.shape[1:], row.level.index, x.device, x.dtype)
        return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def _threshold(self, x0: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding, per sample (Saharia et al. 2022, arXiv:2205.11487, Section 2.3)."""
        flat = x0.flatten(1)
        high = torch.quantile(flat.abs().float(), self.config["dynamic_thresholding_ratio"], dim=1)
        high = high.clamp(min=1.0, max=max(1.0, self.config["sample_max_value"])).to(flat.dtype)[:, None]
        return (flat.clamp(-high, high) / high).reshape(x0.shape)


@cache
def _stock_parameters() -> dict[type, dict[str, Any]]:
    """Stock scheduler class -> defaults of its config."""
    library = importlib.import_module("diffusers")
    classes = {getattr(library, name) for name in dir(library) if name.endswith("Scheduler")}
    stock = [c for c in classes if issubclass(c, SchedulerMixin) and "_backends" not in c.__dict__]
    return {
        c: {p.name: p.default for p in inspect.signature(c.__init__).parameters.values() if p.default is not p.empty}
        for c in sorted(stock, key=lambda c: c.__name__)
    }


def _source_of(config: dict[str, Any]) -> type | None:
    """The stock class that a config is of. The config of a live scheduler does not name it; its keys do."""
    name = config.get("_class_name")
    if name:
        return getattr(importlib.import_module("diffusers"), name if isinstance(name, str) else name[-1], None)
    fitting = [(len(keys), c) for c, keys in _stock_parameters().items() if keys and keys.keys() <= config.keys()]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _shares_memory(part: torch.Tensor, whole: torch.Tensor) -> bool:
    same = part.numel() == 1 and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return same and bool(0 <= part.storage_offset() - whole.storage_offset() < len(whole))


def recognise(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler config with the process made explicit and with the values kept that a pipeline changed."""
    known = dict(config)
    ours = known.get("process") in ("vp", "flow", "vp-continuous", "edm")
    source = PlanScheduler if ours and not known.get("_class_name") else _source_of(known)
    ours = ours and source not in _stock_parameters()
    defaults = _stock_parameters().get(source) if source is not None else None  # type: ignore[arg-type]
    if ours:
        parameters = inspect.signature(PlanScheduler.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters}
    untouched = set(known.get("_use_default_values") or ())
    if defaults is not None:
        untouched = {key for key in untouched if key not in defaults or known.get(key) == defaults[key]}
    name = getattr(source, "__name__", "")
    keep: tuple[str, ...] = _MODEL_KEYS  # the source's own defaults describe the model here, so they travel too
    if ours:
        keep = ()
    elif (
        name.startswith("FlowMatch")
        or bool(known.get("use_flow_sigmas"))
        or known.get("prediction_type") == "flow_prediction"
        or any(key in known for key in _FLOW_KEYS)
    ):
        known["process"], known["prediction_type"] = "flow", "flow_prediction"
        if "flow_shift" in known and not name.startswith("FlowMatch"):
            known["shift"] = known["flow_shift"]
        keep = (*keep, "process", "shift", "use_dynamic_shifting", "time_shift_type")
    elif name.startswith("EDM"):
        known["process"] = "edm"
        for key in ("sigma_min", "sigma_max", "sigma_data", "prediction_type"):
            known.setdefault(key, (defaults or {}).get(key))
        keep = (*keep, "sigma_min", "sigma_max", "sigma_data")
    elif known.get("timestep_type") == "continuous":
        known["process"] = "vp-continuous"
    known["_use_default_values"] = sorted(untouched.difference(keep))
    return known


def _as_array(name: str, values: Any) -> np.ndarray:
    made = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    made = made.astype(np.float64).reshape(-1)
    if made.size == 0 or not np.isfinite(made).all():
        raise DiffsampError(f"{name}: needs one or more finite values, got {made.tolist()}")
    return made


def class_name(solver_name: str) -> str:
    """Class name of a solver's scheduler: ``dpmpp-2m`` → ``DPMPP2MScheduler``, ``dc`` → ``DCSolverScheduler``."""
    if solver_name == "dc":
        return "DCSolverScheduler"
    return "".join(_WORDS.get(part, part.capitalize()) for part in solver_name.split("-")) + "Scheduler"


@cache
def _class_of(name: str) -> type[PlanScheduler]:
    info = solvers()[name]
    doc = f"{info.summary}\n\nThe solver {name!r} as a diffusers scheduler; see ``diffsamp solvers show {name}``."
    inner = info
    while inner.transform and inner.base:
        inner = solvers()[inner.base]
    body = {"solver_name": name, "order": inner.evaluations, "__doc__": doc, "__module__": "diffsamp"}
    return type(class_name(name), (PlanScheduler,), body)


def scheduler_class(name: str) -> type[PlanScheduler]:
    """The diffusers scheduler class of a registered solver, e.g. ``scheduler_class("dpmpp-2m")``."""
    from ..registry import solver_info

    return _class_of(solver_info(name).name)


def scheduler_class_by_class_name(name: str) -> type[PlanScheduler] | None:
    """The class called ``name`` (``UniPCScheduler``), or None."""
    return next((scheduler_class(key) for key in solvers() if class_name(key) == name), None)
