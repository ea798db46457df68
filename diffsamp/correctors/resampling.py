"""Resampling: from weights and uniforms to ancestors, as pure functions over groups.

Every scheme takes weights of shape (groups, particles) that sum to 1 and uniforms in [0, 1) of shape
(groups, 2·particles), and gives ancestors of the same shape as the weights: entry k is the particle that slot k
continues. The expected number of children is particles·weight, and every slot has the law of the weights (rotated or
permuted at random): with sorted ancestors "take slot 0" would always be one of the first particles.

Sources: Douc, Cappé and Moulines 2005 (multinomial, stratified, systematic, residual); Gerber, Chopin and Whiteley
2019, arXiv:1708.04845 (SSP); Deville and Tillé 1998 (the pivotal draw that SSP makes of the fractions).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import DiffsampError

Scheme = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _search(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For every point the particle whose share of [0, 1) holds it; a particle of weight 0 is never found."""
    groups, particles = weights.shape
    edges = np.cumsum(weights, 1)
    # The last particle with weight owns the rest: rounding must not let a point fall beyond it.
    last = particles - 1 - (weights[:, ::-1] > 0).argmax(1)
    edges[np.arange(particles)[None] >= last[:, None]] = 1.0
    # One sorted array for all groups: group g owns the interval [g, g + 1). The offset costs at most 1e-16·groups.
    shift = np.arange(groups)[:, None]
    found = np.searchsorted((edges + shift).ravel(), (np.minimum(points, 1 - 1e-12) + shift).ravel(), side="right")
    found = found.reshape(groups, -1) - shift * particles
    return np.minimum(found, last[:, None])


def systematic(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One uniform, points (u + k/K) mod 1: |children − K·weight| < 1."""
    particles = weights.shape[1]
    return _search(weights, (u[:, :1] + np.arange(particles) / particles) % 1.0)


def stratified(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One uniform in each of K strata, slots rotated at random."""
    particles = weights.shape[1]
    turn = np.floor(u[:, particles : particles + 1] * particles)
    return _search(weights, ((np.arange(particles) + turn) % particles + u[:, :particles]) / particles)


def multinomial(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """K independent draws. More noise than the others; only sensible when resampling is rare."""
    return _search(weights, u[:, : weights.shape[1]])


def residual(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """floor(K·weight) children each, the rest multinomial from the fractions."""
    particles = weights.shape[1]
    sure, fractions = _whole(weights)
    left = particles - sure.sum(1)
    total = fractions.sum(1, keepdims=True)
    extra = _search(np.where(total > 0, fractions / np.where(total > 0, total, 1.0), weights), u[:, :particles])
    drawn = np.arange(particles)[None] < left[:, None]
    np.add.at(sure, (np.nonzero(drawn)[0], extra[drawn]), 1)
    return _shuffled(sure, u[:, particles:])


def ssp(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Srinivasan sampling: fractions meet in pairs, one of each pair is settled. |children − K·weight| < 1."""
    groups, particles = weights.shape
    children, fractions = _whole(weights)
    rows = np.arange(groups)
    holder, held = np.zeros(groups, dtype=np.int64), fractions[:, 0].copy()
    for j in range(1, particles):
        other = fractions[:, j]
        total = held + other
        below = total < 1.0
        with np.errstate(invalid="ignore", divide="ignore"):
            # below 1: one of the two takes all; above: one of them takes a child, the other keeps the rest
            wins = np.where(below, held / total, (1.0 - other) / (2.0 - total))
        first = u[:, j] < np.nan_to_num(wins, nan=1.0)
        settled = np.where(first, holder, j)
        children[rows[~below], settled[~below]] += 1
        holder = np.where(below == first, holder, j)
        held = np.where(below, total, total - 1.0)
    short = particles - children.sum(1)
    children[rows, holder] += short
    return _shuffled(children, u[:, particles:])


def _whole(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sure children and the fractions left; a fraction within rounding of 0 or 1 is settled."""
    scaled = weights * weights.shape[1]
    sure = np.floor(scaled + 1e-10)
    return sure.astype(np.int64), np.clip(scaled - sure, 0.0, None) * (scaled - sure > 1e-10)


def _shuffled(children: np.ndarray, u: np.ndarray) -> np.ndarray:
    particles = children.shape[1]
    order = np.argsort(u[:, :particles], 1)
    listed = np.stack([np.repeat(np.arange(particles), row) for row in children])
    return np.take_along_axis(listed, order, 1)


SCHEMES: dict[str, Scheme] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
    "ssp": ssp,
}


def scheme(name: str) -> Scheme:
    """A scheme by name; DiffsampError where there is none."""
    if name not in SCHEMES:
        raise DiffsampError(f"resampling: {name!r} is not known; accepted: {', '.join(SCHEMES)}")
    return SCHEMES[name]
