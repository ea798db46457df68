"""Interpolated Kneser-Ney n-gram model over token ids: the independent judge of generated text.

p(w | h) = max(c(hw) - d, 0) / c(h) + d N(h) / c(h) p(w | h'), with continuation counts below the highest order and
d = n1 / (n1 + 2 n2) at each order (Kneser and Ney 1995; Chen and Goodman 1999). The lowest order falls back to uniform.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


class KneserNey:
    """An n-gram model of order `order` trained on `tokens`, over `vocabulary` classes."""

    def __init__(self, tokens: Sequence[int], order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        counts = Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
        self.levels = []
        for n in range(order, 0, -1):
            seen = Counter(counts.values())
            discount = seen[1] / max(seen[1] + 2 * seen[2], 1) if seen[1] else 0.5
            total: dict[tuple[int, ...], int] = defaultdict(int)
            kinds: dict[tuple[int, ...], int] = defaultdict(int)
            for gram, c in counts.items():
                total[gram[:-1]] += c
                kinds[gram[:-1]] += 1
            self.levels.append((n, counts, dict(total), dict(kinds), discount))
            counts = Counter(gram[1:] for gram in counts) if n > 1 else counts

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | context), above 0 for every token of the vocabulary."""
        p = 1.0 / self.vocabulary
        for n, counts, total, kinds, discount in reversed(self.levels):
            history = tuple(context[len(context) - n + 1 :]) if n > 1 else ()
            if len(history) < n - 1 or history not in total:
                continue
            t = total[history]
            p = max(counts.get((*history, token), 0) - discount, 0.0) / t + discount * kinds[history] / t * p
        return p

    def nats(self, tokens: Sequence[int]) -> float:
        """Mean cross-entropy in nats per token of one sequence."""
        span = self.order - 1
        return -sum(math.log(self.probability(tokens[max(0, i - span) : i], tokens[i])) for i in range(len(tokens))) / (
            max(len(tokens), 1)
        )
