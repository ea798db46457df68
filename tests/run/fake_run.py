"""A run with a cheap generator, started as a process by the tests: numpy and safetensors only, no torch.

python fake_run.py FOLDER N CHUNK SECONDS ENGINE   prints the result hash

FAKE_RUN_LOG names a file that gets one line for every chunk begun.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np


def generator(seconds: float):
    def generate(seeds: np.ndarray) -> dict[str, np.ndarray]:
        if "FAKE_RUN_LOG" in os.environ:
            handle = os.open(os.environ["FAKE_RUN_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, b"%d\n" % seeds[0])
            os.close(handle)
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
