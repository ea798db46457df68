"""A run with a cheap generator, started as a process by the tests: numpy and safetensors only, no torch.

python fake_run.py FOLDER N CHUNK SECONDS ENGINE   prints the result hash
"""

from __future__ import annotations

import sys
import time

import numpy as np


def generator(seconds: float):
    def generate(seeds: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        rows = [np.random.default_rng(int(seed)).standard_normal(16) for seed in seeds]
        return {"features": np.stack(rows).astype(np.float32), "labels": seeds % 10}

    return generate


def main() -> None:
    from diffsamp.run import run_on

    folder, n, chunk, seconds, engine = sys.argv[1:6]
    result = run_on(engine, folder, {"fake": 1}, generator(float(seconds)), int(n), chunk=int(chunk))
    print(result.sha256, flush=True)


if __name__ == "__main__":
    main()
