"""Train the embedded image model: class-conditional v-prediction diffusion on Fashion-MNIST, on one CPU thread.

    python benchmarks/training/train_fashion.py --work build/fashion --steps 5000

Everything depends on (seed, step) only: the order of the data, the noise, the levels, the dropped labels, the learning
rate. So a run that was stopped and resumed, or extended while its learning rate is still flat, equals one that was
never interrupted. `--steps` sets where the run ends; the learning rate is flat after a short warm-up and falls to zero
as 1 - sqrt(progress) over the last `--decay` steps, so a longer run shares its beginning with a shorter one.

Levels are stratified over the batch (one uniform draw per batch, shifted by i/B): less noise in the gradient and in the
logged loss than independent draws (Kingma et al. 2021, arXiv:2107.00630, appendix I).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from fashion_data import load_split
from safetensors import safe_open
from safetensors.torch import save

from diffsamp.files import write_whole

NULL_CLASS = 10
MODEL: dict[str, Any] = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
    "num_class_embeds": 11,
    "resnet_time_scale_shift": "scale_shift",
}
PROCESS = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "v_prediction"}


def learning_rate(step: int, peak: float, warmup: int, steps: int, decay: int) -> float:
    """Warm up linearly, stay flat, fall as 1 - sqrt over the last `decay` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = steps - step
    return peak if left >= decay else peak * (1.0 - math.sqrt(1.0 - left / decay))


class Data:
    """Batches by step number: each epoch is one permutation drawn from (seed, epoch)."""

    def __init__(self, folder: str | None, seed: int) -> None:
        images, labels = load_split("train", folder)
        self.images = torch.from_numpy(images.copy())[:, None]
        self.labels = torch.from_numpy(labels)
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.images))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        return int(self._order[place])

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor([self._index(step * size + i) for i in range(size)])
        return self.images[chosen].float() / 127.5 - 1.0, self.labels[chosen]


def build() -> UNet2DModel:
    return UNet2DModel(**MODEL)


def save_checkpoint(path: Path, model: torch.nn.Module, average: list, optimizer: Any, facts: dict[str, Any]) -> None:
    """Raw weights, their average, the optimiser's moments, and the facts of the run, in one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for (name, parameter), mean in zip(model.named_parameters(), average, strict=True):
        state = optimizer.state[parameter]
        tensors[f"raw.{name}"] = parameter.detach().contiguous()
        tensors[f"ema.{name}"] = mean.contiguous()
        tensors[f"first.{name}"] = state["exp_avg"].contiguous()
        tensors[f"second.{name}"] = state["exp_avg_sq"].contiguous()
    write_whole(path, save(tensors, metadata={"facts": json.dumps(facts)}), overwrite=True)


def load_checkpoint(path: Path, model: torch.nn.Module, average: list, optimizer: Any) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        with torch.no_grad():
            for (name, parameter), mean in zip(model.named_parameters(), average, strict=True):
                parameter.copy_(file.get_tensor(f"raw.{name}"))
                mean.copy_(file.get_tensor(f"ema.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": torch.empty_like(parameter).copy_(file.get_tensor(f"first.{name}")),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(file.get_tensor(f"second.{name}")),
                }
    return facts


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder of the idx files (default: $DIFFSAMP_FASHION_DATA, else Debian's)")
    parser.add_argument("--work", type=Path, default=Path("build/fashion"), help="checkpoint and log go here")
    parser.add_argument("--steps", type=int, default=5000, help="where the run ends")
    parser.add_argument("--decay", type=int, default=1000, help="steps at the end over which the rate falls to zero")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds between checkpoints")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = build().to(memory_format=torch.channels_last).train()  # type: ignore
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    data = Data(args.data, args.seed)
    alphas_bar = DDPMScheduler(**PROCESS).alphas_cumprod.double()
    alpha, sigma = alphas_bar.sqrt().float(), (1.0 - alphas_bar).sqrt().float()

    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.work / "checkpoint.safetensors", args.work / "log.csv"
    step, spent = 0, 0.0
    total, count = 0.0, 0  # of the losses since the last row of the log
    if checkpoint.exists():
        facts = load_checkpoint(checkpoint, model, average, optimizer)
        for name in ("seed", "batch", "lr", "ema", "dropout", "warmup"):
            if facts[name] != getattr(args, name):
                raise SystemExit(f"--{name} {getattr(args, name)} differs from the checkpoint's {facts[name]}")
        step, spent = facts["step"], facts["cpu_seconds"]
        total, count = facts.get("loss_sum", 0.0), facts.get("loss_count", 0)
    rows = list(csv.reader(log.open())) if log.exists() else []
    kept = [["step", "images", "loss", "learning_rate", "cpu_seconds"]]
    kept += [row for row in rows[1:] if int(row[0]) <= step]
    with log.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(kept)

    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    begun, saved = time.process_time(), time.monotonic()

    def save() -> None:
        names = ("seed", "batch", "lr", "ema", "dropout", "warmup", "steps", "decay")
        facts = {name: getattr(args, name) for name in names}
        facts |= {"step": step, "images": step * args.batch, "cpu_seconds": spent + time.process_time() - begun}
        facts |= {"loss_sum": total, "loss_count": count}
        save_checkpoint(checkpoint, model, average, optimizer, facts)

    while step < args.steps and not stop:
        clean, labels = data.batch(step, args.batch)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(clean.shape, generator=generator)
        level = (torch.rand(1, generator=generator) + torch.arange(args.batch) / args.batch) % 1.0
        level = (level * len(alpha)).long().clamp_(max=len(alpha) - 1)
        dropped = torch.rand(args.batch, generator=generator) < args.dropout
        labels = torch.where(dropped, NULL_CLASS, labels)
        a, s = alpha[level][:, None, None, None], sigma[level][:, None, None, None]
        noisy = (a * clean + s * noise).contiguous(memory_format=torch.channels_last)
        loss = (model(noisy, level, labels).sample - (a * noise - s * clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = learning_rate(step, args.lr, args.warmup, args.steps, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1.0 - min(args.ema, (1 + step) / (10 + step)))
        total, count = total + loss.item(), count + 1
        if step % 50 == 0:
            row = [step, step * args.batch, f"{total / count:.5f}", f"{rate:.3e}"]
            row.append(f"{spent + time.process_time() - begun:.0f}")
            with log.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            print(*row, flush=True)
            total, count = 0.0, 0
        if time.monotonic() - saved > args.save_every:
            save()
            saved = time.monotonic()
    save()


if __name__ == "__main__":
    main()
