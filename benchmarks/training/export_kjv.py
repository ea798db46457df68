"""Turn a run of `train_kjv.py` into the files of the package, with the figures of its card.

    python benchmarks/training/export_kjv.py run diffsamp/models --text kjv.txt

Writes kjv.safetensors (float16), kjv.tokenizer.json, kjv.json, and the held-out token ids that `benchmarks/masked.py`
reads. The baselines are interpolated Kneser-Ney models over the same tokens, scored on the test chapters: a unigram and
a trigram trained on the judge's chapters (3 of 20), and with `--text` a trigram trained on those that the model was
trained on (16 of 20). The model's figure is its ELBO on the test chapters, an upper bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from kneser_ney import KneserNey  # noqa: E402
from train_kjv import encode, read_chapters, split_of  # noqa: E402

from diffsamp.files import write_whole  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--text", type=Path, help="the text that the run was trained on")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; the script takes seconds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    content = (args.run / "kjv.safetensors").read_bytes()
    network = json.loads((args.run / "kjv.json").read_text())
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "test_elbo" in line][-1]
    heldout = load_file(str(args.run / "kjv_heldout.safetensors"))
    judge, test = heldout["judge"].tolist(), heldout["test"].tolist()
    tokenizer = Tokenizer.from_file(str(args.run / "kjv.tokenizer.json"))
    characters = len(tokenizer.decode(test)) / len(test)
    baselines = {f"{n}-gram": KneserNey(judge, n, network["mask_id"]).nats(test) for n in (1, 3)}
    if args.text is not None:
        verses = [v for i, chapter in enumerate(read_chapters(args.text)) if split_of(i) == "train" for v in chapter]
        same = encode(tokenizer, verses)[0].tolist()
        baselines["3-gram_same_chapters"] = KneserNey(same, 3, network["mask_id"]).nats(test)
    facts = {
        "kind": "masked text", "weights": "kjv.safetensors", "sha256": hashlib.sha256(content).hexdigest(),
        "network": network, "parameters": last["parameters"],
        "training": {"steps": last["step"], "tokens": last["tokens"], "cpu_seconds": last["cpu_seconds"],
                     "text": "King James Bible, chapters 0-15 of every 20"},
        "figures": {"test_elbo_nats_per_token": round(last["test_elbo"], 4),
                    "test_perplexity_bound": round(math.exp(last["test_elbo"]), 2),
                    "test_bits_per_character_bound": round(last["test_elbo"] / math.log(2) / characters, 3),
                    **{f"test_perplexity_{k}": round(math.exp(v), 2) for k, v in baselines.items()}},
    }  # fmt: skip
    load(content)  # readable
    for name in ("kjv.safetensors", "kjv.tokenizer.json"):
        write_whole(args.models / name, (args.run / name).read_bytes(), overwrite=True)
    write_whole(args.models / "kjv.json", (json.dumps(facts, indent=1) + "\n").encode(), overwrite=True)
    data = Path(__file__).parents[1] / "data"
    held_out = (args.run / "kjv_heldout.safetensors").read_bytes()
    write_whole(data / "kjv_heldout.safetensors", held_out, overwrite=True)
    shutil.copy(args.run / "log.jsonl", Path(__file__).parent / "kjv_log.jsonl")
    print(json.dumps(facts) if args.json else json.dumps(facts["figures"], indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
