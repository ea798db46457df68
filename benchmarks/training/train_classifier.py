"""Train the embedded classifier `fashion-cnn` on the Fashion-MNIST training split, on one CPU thread.

    python benchmarks/training/train_classifier.py --work build/fashion-cnn

One cycle of the learning rate, random shifts of up to 2 pixels, no mirror images (all shoes point left: a mirrored one
should look wrong to a judge of samples). The official test split is read once, at the end, for the reported accuracy.
Repeatable from its seed on the same machine and torch version.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_data import load_split
from safetensors.torch import save
from torch import nn

from diffsamp.files import write_whole
from diffsamp.models.fashion_cnn import FashionClassifier


class WithBatchNorm(nn.Module):
    """The shipped network with batch normalisation after every convolution, for training."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = FashionClassifier()
        convolutions: Any = self.plain.convolutions
        self.norms: Any = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for layer in convolutions)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.plain.normalise(pictures).contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.plain.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)))
        return self.plain.head(x.mean((2, 3)))

    @torch.no_grad()
    def folded(self) -> FashionClassifier:
        """The same function without batch normalisation: its affine map goes into the convolutions."""
        result = FashionClassifier()
        result.head.load_state_dict(self.plain.head.state_dict())
        layers: Any = zip(result.convolutions, self.plain.convolutions, self.norms, strict=True)
        for target, source, norm in layers:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            target.weight.copy_(source.weight * scale[:, None, None, None])
            target.bias.copy_((source.bias - norm.running_mean) * scale + norm.bias)
        return result.eval()


def shifted(pictures: torch.Tensor, generator: np.random.Generator, reach: int = 2) -> torch.Tensor:
    """Every picture moved by its own whole number of pixels in both directions; what comes in is black."""
    n, size = len(pictures), pictures.shape[-1]
    padded = nn.functional.pad(pictures, (reach,) * 4)
    down, right = (torch.from_numpy(generator.integers(0, 2 * reach + 1, n)) for _ in range(2))
    rows = (down[:, None] + torch.arange(size))[:, :, None]
    columns = (right[:, None] + torch.arange(size))[:, None, :]
    return padded[torch.arange(n)[:, None, None], rows, columns]


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    right = [model(part).argmax(1) == truth for part, truth in zip(images.split(500), labels.split(500), strict=True)]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder of the idx files (default: $DIFFSAMP_FASHION_DATA, else Debian's)")
    parser.add_argument("--work", type=Path, default=Path("build/fashion-cnn"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    images, labels = (torch.from_numpy(a.copy()) for a in load_split("train", args.data))
    model = WithBatchNorm().to(memory_format=torch.channels_last).train()
    per_epoch = len(images) // args.batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * per_epoch)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    begun = time.process_time()
    for epoch in range(args.epochs):
        generator = np.random.default_rng([args.seed, epoch])
        order = torch.from_numpy(generator.permutation(len(images)))
        total = 0.0
        for i in range(per_epoch):
            chosen = order[i * args.batch : (i + 1) * args.batch]
            loss = criterion(model(shifted(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.4f}, {time.process_time() - begun:.0f} CPU-s", flush=True)
    final = model.eval().folded()
    test_images, test_labels = (torch.from_numpy(a.copy()) for a in load_split("test", args.data))
    facts = {
        "seed": args.seed,
        "epochs": args.epochs,
        "batch": args.batch,
        "peak_learning_rate": args.lr,
        "cpu_seconds": round(time.process_time() - begun),
        "test_accuracy": round(accuracy(final, test_images, test_labels), 4),
        "train_accuracy": round(accuracy(final, images, labels), 4),
        "torch": torch.__version__,
    }
    tensors = {name: tensor.contiguous() for name, tensor in final.state_dict().items()}
    whole = save(tensors, metadata={"facts": json.dumps(facts)})
    write_whole(args.work / "classifier.safetensors", whole, overwrite=True)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
