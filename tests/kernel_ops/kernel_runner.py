"""Runs a case of ``interpreter_cases.py`` in a process of its own: the interpreter must be on before Triton is
imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with one thread and the repository on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIFFSAMP_BACKEND")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext"), env.get("PYTHONPATH", "")])
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=600)


def interpreted(case: str) -> None:
    """Run one case in the interpreter; its output is the assertion message."""
    script = str(Path(__file__).with_name("interpreter_cases.py"))
    result = python(script, case, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"passed {case}" in result.stdout
