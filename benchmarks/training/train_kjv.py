"""Train the embedded text model: a masked diffusion language model on the King James Bible.

    apt-get download bible-kjv bible-kjv-text        # Debian; the text is in the public domain
    bible -f gen1:1-rev22:21 < /dev/null > kjv.txt   # one verse a line, each with its reference
    python benchmarks/training/train_kjv.py kjv.txt --out run --steps 3000

The loss is the ELBO of the absorbing process in its exact count form. With a time-free network and x masked at t the
ELBO per token is E_t[(1/t) sum over masked positions of CE] / L; integrating t out leaves the number k of masked
positions uniform on 1..L and the weight L/k, so each sequence contributes the mean cross-entropy of its k masked
positions. k is stratified over the batch (one low-discrepancy point in each of B equal cells).

Every random choice of step s comes from a generator seeded by (seed, s), and the learning rate is constant until the
last quarter of `--steps` and then falls linearly to zero. A run that is interrupted and resumed, also one resumed with
a larger `--steps` before its decay began, is therefore the run that would have come out without the interruption.
Chapters are split by their running number modulo 20: 0-15 train, 16-18 the judge of `benchmarks/masked.py`, 19 test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diffsamp.masked.text_model import MaskedTransformer, TextModelConfig

MASK = "[MASK]"


def read_chapters(path: Path) -> list[list[str]]:
    """Verses without their references, grouped by chapter."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\d?\s?[A-Za-z]+\d+):\d+\s+(.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(" ".join(match[2].split()))
    if len(chapters) != 1189:
        raise SystemExit(f"{path} holds {len(chapters)} chapters; the whole King James Bible has 1189")
    return list(chapters.values())


def split_of(chapter: int) -> str:
    rest = chapter % 20
    return "train" if rest < 16 else "judge" if rest < 19 else "test"


def train_tokenizer(verses: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({c for verse in verses for c in verse} | {"\n"})
    byte_level = {
        c
        for piece in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("".join(alphabet))
        for c in piece[0]
    }
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(byte_level), show_progress=False)
    tokenizer.train_from_iterator((verse + "\n" for verse in verses), trainer)
    tokenizer.add_special_tokens([MASK])
    return tokenizer


def encode(tokenizer: Tokenizer, verses: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the verses joined by newlines, and the index where each verse starts."""
    encoded = [e.ids for e in tokenizer.encode_batch([verse + "\n" for verse in verses])]
    starts = torch.tensor([0] + [len(ids) for ids in encoded]).cumsum(0)[:-1]
    return torch.tensor([i for ids in encoded for i in ids], dtype=torch.int64), starts


def masked_batch(
    tokens: torch.Tensor, starts: torch.Tensor, batch: int, length: int, mask_id: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(clean ids, which are masked, k) for `batch` windows that begin at verse starts."""
    usable = starts[starts <= tokens.numel() - length]
    begin = usable[torch.randint(usable.numel(), (batch,), generator=generator)]
    clean = tokens[begin[:, None] + torch.arange(length)]
    t = (torch.arange(batch, dtype=torch.float64) + torch.rand(1, generator=generator, dtype=torch.float64)) / batch
    k = (t * length).ceil().long().clamp(1, length)
    rank = torch.rand(batch, length, generator=generator).argsort(-1).argsort(-1)
    return clean, rank < k[:, None], k


def elbo(model: MaskedTransformer, clean: torch.Tensor, masked: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the ELBO in nats per token."""
    hidden = model.hidden(clean.masked_fill(masked, model.config.mask_id))
    logits = model.head(hidden[masked])
    losses = F.cross_entropy(logits, clean[masked], reduction="none")
    weight = (1.0 / k.to(losses.dtype))[:, None].expand_as(masked)[masked]
    return (losses * weight).sum() / clean.shape[0]


@torch.no_grad()
def evaluate(model: MaskedTransformer, tokens: torch.Tensor, starts: torch.Tensor, batches: int) -> float:
    model.eval()
    total = 0.0
    for i in range(batches):
        generator = torch.Generator().manual_seed(10_000 + i)
        total += elbo(
            model, *masked_batch(tokens, starts, 32, model.config.max_length, model.config.mask_id, generator)
        ).item()
    model.train()
    return total / batches


def optimizers(model: MaskedTransformer, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embedding" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, warmup: int = 60) -> float:
    decay_from = steps * 3 // 4
    return min(1.0, (step + 1) / warmup) * (1.0 if step < decay_from else (steps - step) / (steps - decay_from))


def write_whole(path: Path, write) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    write(temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the King James Bible, one verse a line with its reference")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--stop-at", type=int, default=None, help="stop early at this step, keeping the schedule")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=180)
    parser.add_argument("--json", action="store_true", help="print the final line as JSON only")
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps = 20

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = read_chapters(args.text)
    verses = {s: [v for i, c in enumerate(chapters) if split_of(i) == s for v in c] for s in ("train", "judge", "test")}
    tokenizer = train_tokenizer(verses["train"], 1024)
    mask_id = tokenizer.token_to_id(MASK)
    assert mask_id is not None
    write_whole(args.out / "kjv.tokenizer.json", lambda p: tokenizer.save(str(p)))
    data = {s: encode(tokenizer, v) for s, v in verses.items()}
    write_whole(
        args.out / "kjv_heldout.safetensors",
        lambda p: save_file({s: data[s][0].to(torch.int16) for s in ("judge", "test")}, str(p)),
    )

    torch.manual_seed(args.seed)
    model = MaskedTransformer(TextModelConfig(vocab_size=mask_id + 1, mask_id=mask_id))
    parameters = sum(p.numel() for p in model.parameters())
    optims = optimizers(model, args.lr)
    checkpoint = args.out / "state.pt"
    step, cpu_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["step"] > args.steps * 3 // 4 and state["steps"] != args.steps:
            raise SystemExit("the learning rate of this run is already falling: --steps cannot change any more")
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        step, cpu_before = state["step"], state["cpu_seconds"]
    config = model.config

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optims],
            "step": step,
            "steps": args.steps,
            "cpu_seconds": cpu_before + time.process_time(),
        }
        write_whole(checkpoint, lambda p: torch.save(state, p))
        half = {n: p.detach().half().contiguous() for n, p in model.state_dict().items()}
        write_whole(args.out / "kjv.safetensors", lambda p: save_file(half, str(p)))
        write_whole(args.out / "kjv.json", lambda p: p.write_text(json.dumps(config.__dict__, indent=1) + "\n"))

    train_tokens, train_starts = data["train"]
    log = (args.out / "log.jsonl").open("a")
    last_save, running = time.monotonic(), []
    stop = min(args.steps, args.stop_at or args.steps)
    model.train()
    while step < stop:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = args.lr * learning_rate(step, args.steps)
        loss = elbo(model, *masked_batch(train_tokens, train_starts, args.batch, config.max_length, mask_id, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        running.append(loss.item())
        if step % 50 == 0 or step == stop:
            line = {
                "step": step,
                "tokens": step * args.batch * config.max_length,
                "elbo": sum(running) / len(running),
                "cpu_seconds": round(cpu_before + time.process_time(), 1),
                "parameters": parameters,
            }
            if step % 250 == 0 or step == stop:
                line["test_elbo"] = evaluate(model, *data["test"], batches=4 if step < stop else 32)
            running = []
            log.write(json.dumps(line) + "\n")
            log.flush()
            if not args.json:
                print(line, flush=True)
        if math.isnan(loss.item()):
            raise SystemExit(f"the loss is NaN at step {step}")
        if time.monotonic() - last_save > args.save_seconds or step == stop:
            save()
            last_save = time.monotonic()
    if args.json:
        print(json.dumps({"step": step, "parameters": parameters}))


if __name__ == "__main__":
    main()
