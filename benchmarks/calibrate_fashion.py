"""Make the artifacts that ship with the embedded image model: one command, to be run again when its weights change.

    python benchmarks/calibrate_fashion.py            # everything, continuing what is there for these weights
    python benchmarks/calibrate_fashion.py --quick    # one setting per method, to a temporary folder

Files of other weights are replaced. Statistics of the data need Fashion-MNIST (--data; see benchmarks/training).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "training"))

from diffsamp import calibrate, teleport
from diffsamp.calibrate.artifact import SHIPPED, Artifact, filename
from diffsamp.errors import DiffsampError

SCALES = (1.0, 3.0, 7.5)
FEW = (4, 5, 6, 8, 10)
MANY = {"points": 32, "held_out": 32}
ALL = {"points": 64, "held_out": 32, "reference_steps": 200}
# Some tables are refined for their pictures: most of them where it counts most.
PICTURES, SHORT = {"extractor": "fashion-cnn"}, {"reference_steps": 60}
# Where the distance hardly moves: twice the pictures, and more weight on it.
HARD = {**PICTURES, "pictures": 2048, "weight": 4.0}
# (method, base, function, calls, options, guidance scales); five calls first in what takes longest.
JOBS = (
    ("dc", "unipc", calibrate.calibrate_dc, FEW, {}, SCALES),
    ("dc", "dpmpp-2m", calibrate.calibrate_dc, FEW, {}, SCALES),
    ("dc", "dpmpp-3m", calibrate.calibrate_dc, FEW, {}, SCALES),
    ("dc", "ddim", calibrate.calibrate_dc, FEW, {"k": 1}, SCALES),
    ("dc", "deis", calibrate.calibrate_dc, FEW, {}, SCALES),
    ("dualfast", "ddim", calibrate.calibrate_dualfast, FEW, {}, SCALES),
    ("dualfast", "dpmpp-2m", calibrate.calibrate_dualfast, FEW, {}, SCALES),
    ("all", "unipc", calibrate.calibrate_all, (5,), {**ALL, **PICTURES, "pictures": 1024}, SCALES[:1]),
    ("all", "unipc", calibrate.calibrate_all, (5,), {**ALL, **PICTURES, "pictures": 384, **SHORT}, SCALES[1:2]),
    ("all", "unipc", calibrate.calibrate_all, (5,), {**ALL, **HARD}, SCALES[2:]),
    ("all", "unipc", calibrate.calibrate_all, (4, 6), {**ALL, **PICTURES, "pictures": 512, **SHORT}, SCALES[:1]),
    ("grid", "unipc", calibrate.calibrate_grid, FEW, MANY, SCALES),
    ("grid", "dpmpp-2m", calibrate.calibrate_grid, FEW, MANY, SCALES),
    ("dc", "unipc", calibrate.calibrate_dc, (7, 9, 11, 12, 13, 14, 15), {}, SCALES),
    ("all", "unipc", calibrate.calibrate_all, (4, 6), ALL, SCALES[1:]),
    ("all", "unipc", calibrate.calibrate_all, (8, 10), ALL, SCALES),
)


def statistics(model: calibrate.Model, data: str | None, folder: Path) -> Path:
    """Mean and covariance of the training pictures, per class too, in [-1, 1]; and the level where runs can start."""
    from fashion_data import load_split

    images, labels = load_split("train", data)
    x = torch.from_numpy(images.copy()).float()[:, None] / 127.5 - 1
    y = torch.from_numpy(labels.copy()).long()
    parts = zip(x.split(5000), y.split(5000), strict=True)
    key: dict = {"dataset": "Fashion-MNIST, training split", "range": [-1, 1], "resolution": [28, 28]}
    stats = teleport.network_means(teleport.gather(parts, rank=96, key=key), model)
    key = dict(stats.key)
    choices = teleport.lowest_starts(stats, model, SCALES, tell=lambda line: print(line, file=sys.stderr))
    for scale, choice in choices.items():
        for ratio, gap, whole in choice.table:
            print(f"guidance {scale:g}: sigma {ratio:.4g}, error {gap:.3g}, whole run's {whole:.3g}", file=sys.stderr)
    found = {scale: choice.level.noise_to_signal for scale, choice in choices.items()}
    key["start_by_guidance_scale"] = {f"{scale:g}": value for scale, value in found.items()}
    # One number for every use: the strictest.
    start = max(found.values()) if len(found) == len(SCALES) else None
    return replace(stats, start=start, key=key).save(folder / "fashion-gaussian.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--only", help="one method, such as grid")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp()) if args.quick else args.out
    model = calibrate.embedded("fashion")
    rows = []
    if not args.quick and args.only in (None, "gaussian"):
        try:
            statistics(model, args.data, folder)
        except (OSError, SystemExit) as error:
            print(f"statistics skipped: {error}", file=sys.stderr)
    jobs = [job for job in JOBS if args.only in (None, job[0])]
    if args.quick:
        jobs = list({job[0]: job for job in reversed(jobs)}.values())[::-1]
    for method, base, run, nfe, options, scales in jobs:
        if args.quick and method in ("grid", "all"):
            few = {"pictures": 64, **SHORT} if "extractor" in options else {}
            options = {**options, "points": 10, "held_out": 8, **few}
        path = folder / filename("fashion", method, base)
        if path.exists() and Artifact.load(path).model["sha256"] != model.sha256:
            path.unlink()
        began = time.process_time()

        def progress(what: str, done: int, total: int, method=method, base=base, began=began) -> None:
            spent = time.process_time() - began
            print(f"{method} {base}: {what} ({done}/{total}, {spent:.0f} CPU-s)", file=sys.stderr, flush=True)

        extra: dict[str, Any] = {"held_out": 6, "reference_steps": 60, **options}
        artifact = run(
            model, nfe=nfe[:1] if args.quick else nfe, guidance_scale=scales[:1] if args.quick else scales, solver=base,
            out=path, progress=progress, **extra,
        )  # fmt: skip
        for setting in artifact.settings.values():
            rows.append(
                {
                    "method": method, "solver": base, "nfe": setting.nfe, "guidance_scale": setting.guidance_scale,
                    "kept": setting.kept, "calls": setting.calls, "before": setting.before, "after": setting.after,
                    "held_out_before": setting.held_out_before, "held_out_after": setting.held_out_after,
                }
            )  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'method':9s} {'solver':9s} NFE guidance  held-out error before   after  calls")
    for r in rows:
        print(
            f"{r['method']:9s} {r['solver']:9s} {r['nfe']:3d} {r['guidance_scale']:8g}  {r['held_out_before']:21.5f} "
            f"{r['held_out_after']:7.5f} {r['calls']:6d}"
        )


if __name__ == "__main__":
    try:
        main()
    except DiffsampError as error:
        raise SystemExit(f"error: {error}") from None
