"""Joint laws small enough to know everything: exact conditionals, exact operators of samplers, total variation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor


class Toy:
    """A joint law over V^L sequences with its conditionals at every partly masked state; the mask id is V.

    States are numbered in base V + 1, position 0 being the most significant digit. `transitions` lists every way to
    reveal a set of masked positions: source, target, product of conditionals, which set (bit mask), masks before.
    """

    def __init__(self, joint: np.ndarray) -> None:
        self.joint = joint / joint.sum()
        self.length, self.width = joint.ndim, joint.shape[0]
        base = self.width + 1
        self.states = np.array(list(itertools.product(range(base), repeat=self.length)))
        self.place = base ** np.arange(self.length)[::-1]
        self.masked = self.states == self.width
        self.masks = self.masked.sum(1)
        padded = self.joint
        for axis in range(self.length):  # index V along an axis is the sum over it
            padded = np.concatenate([padded, padded.sum(axis, keepdims=True)], axis)
        self.marginal = padded.reshape(-1)
        self.conditional = np.zeros((len(self.states), self.length, self.width))
        for i in range(self.length):
            for v in range(self.width):
                known = np.arange(len(self.states)) + (v - self.states[:, i]) * self.place[i]
                self.conditional[:, i, v] = self.marginal[known] / self.marginal
        self.transitions = self._transitions()
        self.full = np.flatnonzero(self.masks == 0)

    def _transitions(self) -> tuple[np.ndarray, ...]:
        parts = []
        for size in range(self.length + 1):
            for chosen in itertools.combinations(range(self.length), size):
                source = np.flatnonzero(self.masked[:, chosen].all(1)) if size else np.arange(len(self.states))
                for values in itertools.product(range(self.width), repeat=size):
                    target, product = source.copy(), np.ones(len(source))
                    for i, v in zip(chosen, values, strict=True):
                        target = target + (v - self.width) * self.place[i]
                        product = product * self.conditional[source, i, v]
                    bits = sum(1 << i for i in chosen)
                    parts.append((source, target, product, np.full(len(source), bits), np.full(len(source), size)))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def start(self) -> np.ndarray:
        p = np.zeros(len(self.states))
        p[-1] = 1.0
        return p

    def push(self, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """One step of a sampler that uses transition k with probability `weight[k]`, given its source."""
        source, target, product, _, _ = self.transitions
        return np.bincount(target, p[source] * weight * product, minlength=len(p))

    def law(self, weights: Callable[[int], np.ndarray], steps: int) -> np.ndarray:
        p = self.start()
        for i in range(steps):
            p = self.push(p, weights(i))
        return p[self.full].reshape(self.joint.shape)

    def random_groups(self, size: int) -> np.ndarray:
        """Law of revealing `size` uniformly random masked positions a call."""
        source, _, _, _, count = self.transitions
        n = self.masks[source]
        from scipy.special import comb

        weight = (count == np.minimum(size, n)) / comb(n, np.minimum(size, n))
        return self.law(lambda i: weight, -(-self.length // size))

    def ancestral(self, steps: int) -> np.ndarray:
        """Law of ancestral sampling on the even grid of the linear schedule."""
        source, _, _, _, count = self.transitions
        n = self.masks[source]

        def weights(i: int) -> np.ndarray:
            r = 1.0 / (steps - i)
            return r**count * (1 - r) ** (n - count)

        return self.law(weights, steps)

    def chosen(self, keep: np.ndarray) -> np.ndarray:
        """Law of a rule that reveals the positions `keep` (S, L) of each state."""
        source, _, _, bits, _ = self.transitions
        wanted = (keep * (1 << np.arange(self.length))).sum(1)
        return self.law(lambda i: (bits == wanted[source]).astype(float), self.length)

    def sample_then_choose(self) -> np.ndarray:
        """Law of drawing everywhere and keeping the one most probable draw; ties go to the left."""
        mu = self.conditional
        flat = np.zeros((len(self.states), self.length, self.width))
        for i in range(self.length):
            win = mu[:, i].copy()
            for j in range(self.length):
                if j != i:
                    below = mu[:, j, None, :] < mu[:, i, :, None]
                    if i < j:
                        below |= mu[:, j, None, :] == mu[:, i, :, None]
                    other = (mu[:, j, None, :] * below).sum(-1)
                    win = win * np.where(self.masked[:, j, None], other, 1.0)
            flat[:, i] = np.where(self.masked[:, i, None], win, 0.0)
        p = self.start()
        for _ in range(self.length):
            after = np.where(self.masks == 0, p, 0.0)
            for i in range(self.length):
                for v in range(self.width):
                    at = np.flatnonzero(self.masked[:, i])
                    np.add.at(after, at + (v - self.width) * self.place[i], p[at] * flat[at, i, v])
            p = after
        return p[self.full].reshape(self.joint.shape)

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """Exact log-conditionals with a column for the mask that a careless network would like."""
        index = (x.numpy() * self.place).sum(1)
        return self.logits[torch.from_numpy(index)]

    @property
    @cache  # noqa: B019 - one table per toy
    def logits(self) -> Tensor:
        with np.errstate(divide="ignore"):
            table = np.log(self.conditional)
        return torch.from_numpy(np.concatenate([table, np.full((*table.shape[:2], 1), 50.0)], -1))

    def blank(self, rows: int) -> Tensor:
        return torch.full((rows, self.length), self.width)

    def histogram(self, x: Tensor) -> np.ndarray:
        place = self.width ** np.arange(self.length)[::-1]
        counts = np.bincount((x.numpy() * place).sum(1), minlength=self.joint.size)
        return (counts / counts.sum()).reshape(self.joint.shape)

    def floor(self, law: np.ndarray, rows: int) -> float:
        """Expected total variation between `law` and the histogram of `rows` samples of it."""
        return float(0.5 * np.sqrt(2 * law * (1 - law) / (np.pi * rows)).sum())


def tv(p: np.ndarray, q: np.ndarray) -> float:
    return float(0.5 * np.abs(p - q).sum())


def markov(length: int, width: int, sharpness: float, seed: int) -> Toy:
    rng = np.random.default_rng(seed)
    first = rng.dirichlet(np.ones(width))
    step = rng.dirichlet(np.full(width, sharpness), size=width)
    joint = first
    for _ in range(length - 1):
        joint = joint[..., None] * step.reshape((1,) * (joint.ndim - 1) + (width, width))
    return Toy(joint)


@cache
def toy(name: str) -> Toy:
    """A: Markov, L=6, V=3. B: Dirichlet, L=6, V=3. C: soft Markov, L=8, V=2. D: sharp Markov, L=5, V=4.

    E: Markov, L=5, V=3, no conditional within rounding of another, so that no rule meets a tie.
    """
    if name == "A":
        return markov(6, 3, 0.5, 1)
    if name == "B":
        return Toy(np.random.default_rng(2).dirichlet(np.full(3**6, 0.1)).reshape((3,) * 6) + 1e-9)
    if name == "C":
        return markov(8, 2, 8.0, 3)
    if name == "E":
        return markov(5, 3, 2.0, 1)
    return markov(5, 4, 0.3, 4)
