"""``diffsamp doctor``: versions, devices, backends, plug-ins."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from typing import Annotated, Any

import typer

_PACKAGES = (
    "torch", "diffusers", "transformers", "triton", "einops", "safetensors", "torchmetrics", "torchvision", "numpy",
    "scipy", "matplotlib", "accelerate", "typer", "rich",
)  # fmt: skip


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Report versions, devices, backends and plug-ins; exit 1 where something that is needed does not work."""
    facts = gather()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, title="diffsamp doctor")
        for key, value in facts.items():
            lines = value.items() if isinstance(value, dict) else [("", value)]
            for i, (name, text) in enumerate(lines):
                table.add_row(key if i == 0 else "", str(name), str(text))
        Console().print(table)
    if facts["problems"]:
        raise typer.Exit(1)


def gather() -> dict[str, Any]:
    """What a bug report needs to say about this installation."""
    problems: list[str] = []
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    devices = {}
    try:
        import torch

        devices["cpu"] = f"{torch.get_num_threads()} threads"
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
        if torch.backends.mps.is_available():
            devices["mps"] = "available"
    except Exception as error:  # noqa: BLE001 - the doctor reports, whatever it is
        problems.append(f"torch does not import: {error}")
    backends = {"torch": "available"}
    has_triton = importlib.util.find_spec("triton") is not None
    on_gpu = any(name.startswith("cuda") for name in devices)
    missing = "triton is not installed" if not has_triton else "no GPU; kernels run in Triton's interpreter only"
    backends["triton"] = "available" if has_triton and on_gpu else missing
    from ..models import names
    from ..registry import plugin_errors, solvers

    plugins = {name: f"did not load: {reason}" for name, reason in plugin_errors().items()}
    plugins |= {info.name: info.origin for info in solvers().values() if info.origin != "diffsamp"}
    return {
        "system": {"python": platform.python_version(), "platform": platform.platform()},
        "packages": packages,
        "devices": devices,
        "backends": backends,
        "solvers": len(solvers()),
        "models": ", ".join(names()),
        "plug-ins": plugins or "none",
        "problems": problems,
    }
