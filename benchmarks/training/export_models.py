"""Put trained weights into the package: fp16 or fp32 safetensors, config with sha256, reference features, the log.

python benchmarks/training/export_models.py fashion --work build/fashion
python benchmarks/training/export_models.py fashion-cnn --work build/fashion-cnn
python benchmarks/training/export_models.py reference
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from diffsamp.files import write_whole  # noqa: E402

MODELS = ROOT / "diffsamp" / "models"


def ship(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str], facts: dict[str, Any]) -> None:
    """Write `<name>.safetensors` and `<name>.json`; figures that a benchmark added to an earlier config are dropped."""
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=metadata)
    facts = {"name": name, "weights": f"{name}.safetensors", "sha256": hashlib.sha256(content).hexdigest(), **facts}
    write_whole(MODELS / facts["weights"], content, overwrite=True)
    write_whole(MODELS / f"{name}.json", (json.dumps(facts, indent=2) + "\n").encode(), overwrite=True)
    print(f"{name}: {len(content):,} bytes, sha256 {facts['sha256'][:16]}")


def export_fashion(work: Path) -> None:
    from train_fashion import MODEL, NULL_CLASS, PROCESS

    from diffsamp.models.registry import FASHION_CLASSES

    with safe_open(work / "checkpoint.safetensors", "pt") as file:
        run = json.loads(file.metadata()["facts"])
        tensors = {key[4:]: file.get_tensor(key).half() for key in file.keys() if key.startswith("ema.")}  # noqa: SIM118
    run["cpu_seconds"] = round(run["cpu_seconds"])
    for passing in ("loss_sum", "loss_count"):
        run.pop(passing, None)
    facts = {
        "kind": "pipeline",
        "licence": "MIT",
        "dataset": "Fashion-MNIST, training split (60,000 pictures)",
        "classes": list(FASHION_CLASSES),
        "null_class": NULL_CLASS,
        "guidance_scale": 2.0,
        "num_inference_steps": 20,
        "unet": MODEL,
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler", **PROCESS, "timestep_spacing": "trailing"},
        "training": run,
    }
    ship("fashion", tensors, {"format": "pt", "licence": "MIT", "images": str(run["images"])}, facts)
    if (work / "log.csv").exists():
        shutil.copyfile(work / "log.csv", ROOT / "benchmarks" / "training" / "fashion-log.csv")


def export_classifier(work: Path) -> None:
    from diffsamp.models.registry import FASHION_CLASSES

    with safe_open(work / "classifier.safetensors", "pt") as file:
        run = json.loads(file.metadata()["facts"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    facts = {
        "kind": "classifier",
        "licence": "MIT",
        "dataset": "Fashion-MNIST, training split (60,000 pictures)",
        "classes": list(FASHION_CLASSES),
        "feature_size": 128,
        "training": run,
    }
    ship("fashion-cnn", tensors, {"format": "pt", "licence": "MIT"}, facts)


@torch.inference_mode()
def export_reference(data: str | None) -> None:
    from fashion_data import load_split

    import diffsamp.models as models

    network = models.classifier()
    tensors: dict[str, torch.Tensor] = {}
    for split in ("train", "test"):
        images, labels = load_split(split, data)
        pictures = torch.from_numpy(images.copy())
        features = torch.cat([network.features(chunk) for chunk in pictures.split(500)])
        exact = features.double()
        tensors[f"{split}_mean"] = exact.mean(0)
        tensors[f"{split}_cov"] = torch.cov(exact.T)
        if split == "train":
            training_features = features
        else:
            tensors["test_features"] = features.half()
            tensors["test_labels"] = torch.from_numpy(labels).to(torch.uint8)
    from embedded_model import frechet_distance

    floor = {
        str(n): round(frechet_distance(training_features[:n], tensors["test_mean"], tensors["test_cov"]), 4)
        for n in (200, 300, 500, 1000, 2000, 5000, 10000, 60000)
    }
    facts = {
        "kind": "reference",
        "licence": "MIT",
        "dataset": "fashion-mnist",
        "extractor": "fashion-cnn",
        "extractor_sha256": models.fingerprint("fashion-cnn"),
        "train_n": 60000,
        "test_n": 10000,
    }
    metadata = {"format": "pt"} | {key: str(value) for key, value in facts.items()}
    # FD[fashion-cnn] of the first n training pictures to the test split: what a perfect model would get with n.
    ship("fashion-reference", tensors, metadata, facts | {"floor": floor})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["fashion", "fashion-cnn", "reference"])
    parser.add_argument("--work", type=Path, help="the folder that the training script wrote")
    parser.add_argument("--data", help="folder of the idx files, for the reference")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "reference":
        export_reference(args.data)
    elif args.work is None:
        raise SystemExit("--work is missing: the folder that the training script wrote")
    else:
        (export_fashion if args.what == "fashion" else export_classifier)(args.work)


if __name__ == "__main__":
    main()
