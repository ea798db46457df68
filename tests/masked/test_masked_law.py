"""Masked samplers reproduce the laws they claim: joint, ancestral, parallel, extrapolated, legacy.

Statistical tests are seeded. A total variation is compared with 1.5 times its expectation under the claimed law; with
hundreds of cells its spread is a few per cent, so a false alarm would be below 1e-5 for a fresh seed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_toy import Toy, toy, tv
from scipy import stats

from diffsamp import masked
from diffsamp.masked.events import Events, FirstHitting


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def run(toy_: Toy, rows: int, seed: int = 0, chunk: int = 250_000, **options) -> tuple[np.ndarray, float]:
    """Histogram of `rows` samples and the mean number of calls of a row."""
    total, events = 0.0, []
    for first in range(0, rows, chunk):
        n = min(chunk, rows - first)
        keys = np.arange(first, first + n) + (seed << 40)
        x, facts = masked.sample(
            toy_.denoiser,
            toy_.blank(n),
            mask_id=toy_.width,
            seeds=keys.tolist() if n < 1000 else torch.from_numpy(keys),
            record_entropy=False,
            **options,
        )
        events.append(np.array([len(np.unique(r)) for r in facts["step_of"][:2000].numpy()]).mean())
        total = total + toy_.histogram(x) * n
    return total / rows, float(np.mean(events))


@pytest.mark.parametrize("name", ["A", "B", "C", "D"])
def test_exact_operator_of_first_hitting_is_the_joint(name):
    t = toy(name)
    assert tv(t.random_groups(1), t.joint) < 1e-12


def test_first_hitting_samples_the_joint_chi_square_two_million():
    t, rows = toy("A"), 2_000_000
    seen, _ = run(t, rows, chunk=500_000)
    expected = (t.joint * rows).reshape(-1)
    small = expected < 10
    observed = (seen * rows).reshape(-1)
    obs = np.append(observed[~small], observed[small].sum())
    exp = np.append(expected[~small], expected[small].sum())
    obs, exp = obs[exp > 0], exp[exp > 0]
    chi2 = ((obs - exp) ** 2 / exp).sum()
    p = stats.chi2.sf(chi2, len(obs) - 1)
    assert 1e-3 < p < 1 - 1e-3, (chi2, len(obs), p)


class MixedTimes(Toy):
    """A network that looks at the time: mu_t = (1 - t) mu + t rho, with a rho that shifts mass to class 0."""

    def denoiser(self, x, t):
        p = super().denoiser(x, t)[..., : self.width].exp()
        rho = torch.zeros_like(p)
        rho[..., 0] = 1.0
        return torch.cat(
            [
                ((1 - t)[:, None, None] * p + t[:, None, None] * rho).log(),
                torch.full((*x.shape, 1), 9.0, dtype=p.dtype),
            ],
            -1,
        )

    def ancestral_in_time(self, steps):
        source, target, _, bits, count = self.transitions
        n, p = self.masks[source], self.start()
        values = self.states[target]
        for i in range(steps):
            time, r = 1 - i / steps, 1.0 / (steps - i)
            mu = (1 - time) * self.conditional + time * (np.arange(self.width) == 0)
            product = np.ones(len(source))
            for j in range(self.length):
                product *= np.where(bits >> j & 1, mu[source, j, np.minimum(values[:, j], self.width - 1)], 1.0)
            p = np.bincount(target, p[source] * r**count * (1 - r) ** (n - count) * product, minlength=len(p))
        return p[self.full].reshape(self.joint.shape)


class OldTime(FirstHitting):
    """The mistake: the network is told the time before the jump."""

    def events(self, masked_, seeds):
        right = super().events(masked_, seeds)
        return Events(
            right.sizes, np.concatenate([np.ones((len(seeds), 1)), right.times[:, :-1]], 1), right.token_times
        )


def test_network_is_told_the_new_time_and_the_old_time_fails():
    t = MixedTimes(np.random.default_rng(5).dirichlet(np.ones(8)).reshape(2, 2, 2))
    rows = 2_000_000
    limit = 2 * t.ancestral_in_time(512) - t.ancestral_in_time(256)  # Richardson: the bias is first order
    floor = t.floor(limit, rows)
    seen, _ = run(t, rows, seed=1, chunk=1_000_000)
    assert tv(seen, limit) < 1.5 * floor + 1e-4, (tv(seen, limit), floor)
    wrong, _ = run(t, rows // 4, seed=2, sampler=OldTime())
    assert tv(wrong, limit) > 5 * t.floor(limit, rows // 4)


@pytest.mark.parametrize("steps", [4, 16])
def test_count_first_has_the_ancestral_law_and_its_calls(steps):
    t, rows = toy("A"), 400_000
    law = t.ancestral(steps)
    seen, _ = run(t, rows, seed=3, chunk=400_000, sampler=masked.CountFirst(steps))
    assert tv(seen, law) < 1.5 * t.floor(law, rows)
    assert tv(law, t.joint) > 3 * t.floor(law, rows)  # the two laws are told apart
    planned = masked.CountFirst(steps).events(np.full(rows, t.length), np.arange(rows))
    calls = (planned.sizes > 0).sum(1)
    expected = masked.expected_calls(steps, t.length)
    assert abs(calls.mean() - expected) < 4.5 * calls.std() / math.sqrt(rows)
    assert (planned.sizes.sum(1) == t.length).all()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_ancestral_loop_that_races_everywhere_has_the_ancestral_law(precision):
    t, rows = toy("A"), 100_000
    x, calls = masked.ancestral(
        t.denoiser,
        t.blank(rows),
        mask_id=t.width,
        steps=4,
        precision=precision,
        generator=torch.Generator().manual_seed(10),
    )
    law = t.ancestral(4)
    assert calls == 4 and tv(t.histogram(x), law) < 1.5 * t.floor(law, rows)


def test_published_loop_of_the_benchmark_has_the_ancestral_law(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import published_ancestral

    t, rows = toy("A"), 100_000
    torch.manual_seed(11)
    x, calls = published_ancestral.sample(lambda x: t.denoiser(x, x), t.blank(rows), t.width, 4, torch.float64)
    law = t.ancestral(4)
    assert calls == 4 and tv(t.histogram(x), law) < 1.5 * t.floor(law, rows)


def test_ancestral_bias_is_first_order_in_the_number_of_steps():
    t = toy("A")
    scaled = [n * tv(t.ancestral(n), t.joint) for n in (64, 256, 1024)]
    assert max(scaled) / min(scaled) < 1.05, scaled


@pytest.mark.parametrize(("name", "size"), [("A", 2), ("A", 3), ("C", 2)])
def test_parallel_groups_have_the_exact_law_and_number_of_calls(name, size):
    t, rows = toy(name), 200_000
    law = t.random_groups(size)
    seen, calls = run(t, rows, seed=4, sampler=masked.FirstHitting(tokens_per_step=size))
    assert calls == -(-t.length // size)
    assert tv(seen, law) < 1.5 * t.floor(law, rows)


def test_extrapolation_helps_on_a_and_does_not_hurt_on_c_and_d():
    gains = {}
    for name, rows in (("A", 400_000), ("C", 1_000_000), ("D", 400_000)):
        t = toy(name)
        plain = tv(t.random_groups(2), t.joint)
        seen, calls = run(t, rows, seed=5, sampler=masked.FirstHitting(tokens_per_step=2, extrapolate=True))
        assert calls == -(-t.length // 2)
        gains[name] = tv(seen, t.joint) / plain
    assert gains["A"] < 0.85 and gains["C"] < 1.05 and gains["D"] < 1.05, gains


@pytest.mark.parametrize(
    "rule",
    [
        masked.Order("confidence"),
        masked.Order("margin"),
        masked.Order("entropy"),
        masked.EntropyBounded(gamma=0.0),
        masked.Threshold(threshold=1.0),
    ],
    ids=lambda r: r.name,
)
@pytest.mark.parametrize("name", ["A", "B"])
def test_choose_then_sample_one_token_at_a_time_is_exact(name, rule):
    t = toy(name)
    logp = t.logits[..., : t.width]
    keep = rule.choose(logp, torch.from_numpy(t.masked), torch.ones(len(t.states), dtype=torch.int64)).numpy()
    assert (keep.sum(1)[t.masks > 0] >= 1).all() and not (keep & ~t.masked).any()
    if rule.name not in ("entropy-bounded",):  # entropies of exactly zero may be revealed together
        assert (keep.sum(1) <= 1).all()
    assert tv(t.chosen(keep), t.joint) < 1e-12


@pytest.mark.parametrize("order", ["confidence", "entropy"])
def test_sampler_follows_the_rule_it_is_given(order):
    t, rows = toy("D"), 100_000
    seen, _ = run(t, rows, seed=6, order=order)
    assert tv(seen, t.joint) < 1.5 * t.floor(t.joint, rows)


def test_sample_then_choose_reproduces_its_bias_worse_than_one_shot():
    t, rows = toy("E"), 200_000
    law = t.sample_then_choose()
    one_shot = tv(t.random_groups(t.length), t.joint)
    assert tv(law, t.joint) > one_shot > 0.05, (tv(law, t.joint), one_shot)
    seen, _ = run(t, rows, seed=7, order="low-confidence")
    assert tv(seen, law) < 1.5 * t.floor(law, rows)
    assert tv(seen, t.joint) == pytest.approx(tv(law, t.joint), abs=0.01)


@pytest.mark.parametrize("gamma", [0.05, 0.5, math.inf])
def test_entropy_bound_holds_on_every_committed_set(gamma):
    t = toy("C")
    logp = t.logits[..., : t.width]
    counts = torch.ones(len(t.states), dtype=torch.int64)
    keep = masked.EntropyBounded(gamma=gamma).choose(logp, torch.from_numpy(t.masked), counts)
    h = -(logp.exp() * logp.clamp_min(-1e30)).sum(-1)
    total = (h * keep).sum(1) - torch.where(keep, h, 0.0).amax(1)
    assert bool((total <= gamma + 1e-12).all())
    if gamma == math.inf:
        assert torch.equal(keep, torch.from_numpy(t.masked))
        _, calls = run(t, 1000, order=masked.EntropyBounded(gamma=gamma))
        assert calls == 1


def test_remdm_without_remasking_is_ancestral_and_p2_without_eta_never_remasks():
    t, rows = toy("A"), 200_000
    law = t.ancestral(4)
    seen, _ = run(t, rows, seed=8, sampler=masked.ReMDM(4, eta=0.0))
    assert tv(seen, law) < 1.5 * t.floor(law, rows)
    state = masked.init(masked.P2(6, eta=0.0), t.blank(500), mask_id=t.width, seeds=range(500))
    while not state.done:
        before = state.x
        state = masked.step(state, t.denoiser)
        assert torch.equal(state.x[before != t.width], before[before != t.width])
    assert not bool((state.x == t.width).any())


@pytest.mark.parametrize("steps", [1, 3, 16, 200])
@pytest.mark.parametrize("curve", ["linear", "cosine", "geometric"])
def test_remdm_without_remasking_has_the_tokens_of_count_first(steps, curve):
    t = toy("D")
    x = t.blank(300)
    x[:100, 2] = 1
    x[50:120, 0] = 3
    x[7] = 2  # nothing to do in this row
    options = {"mask_id": t.width, "seeds": range(300), "record_entropy": False}
    base, facts = masked.sample(t.denoiser, x, sampler=masked.CountFirst(steps, curve), **options)
    for strategy in ("cap", "rescale", "conf"):
        same, other = masked.sample(t.denoiser, x, sampler=masked.ReMDM(steps, strategy, 0.0, curve), **options)
        assert torch.equal(same, base) and torch.equal(other["order"], facts["order"])
    single = {"mask_id": t.width, "seeds": [4], "record_entropy": False}
    want, facts = masked.sample(t.denoiser, x[:1], sampler=masked.CountFirst(steps, curve), **single)
    got, other = masked.sample(t.denoiser, x[:1], sampler=masked.ReMDM(steps, eta=0.0, schedule=curve), **single)
    assert torch.equal(want, got) and other["calls"] == facts["calls"]
    if steps > 1:
        remasked, _ = masked.sample(t.denoiser, x, sampler=masked.ReMDM(steps, "rescale", 0.9, curve), **options)
        assert not torch.equal(remasked, base)


@pytest.mark.parametrize("sampler", [masked.ReMDM(8, "rescale", 0.6), masked.ReMDM(8, "cap", 0.2)], ids=str)
def test_remasking_keeps_the_share_of_masks_on_the_schedule(sampler):
    # Masks of one step are independent with probability m(s), remasked or never revealed: 5 sigma a step.
    t, rows = toy("A"), 20_000
    state = masked.init(sampler, t.blank(rows), mask_id=t.width, seeds=torch.arange(rows), record_entropy=False)
    while not state.done:
        state = masked.step(state, t.denoiser)
        m = 1 - state.event / 8
        share = float((state.x == t.width).double().mean())
        assert abs(share - m) <= 5 * math.sqrt(m * (1 - m) / (rows * t.length)) + 1e-12, state.event


@pytest.mark.parametrize(
    "sampler",
    [
        masked.ReMDM(12, "rescale", 0.9),
        masked.ReMDM(12, "conf", 1.0),
        masked.ReMDM(12, "cap", 0.3, loop=(0.6, 0.3)),
        masked.P2(12, eta=2.0),
    ],
    ids=["rescale", "conf", "loop", "p2"],
)
def test_remasking_happens_leaves_no_mask_and_respects_given_tokens(sampler):
    t = toy("A")
    x = t.blank(200)
    x[:, 2] = 1
    state, remasked = masked.init(sampler, x, mask_id=t.width, seeds=range(200)), 0
    while not state.done:
        before = state.x
        state = masked.step(state, t.denoiser)
        remasked += int(((before != t.width) & (state.x == t.width)).sum())
        assert bool((state.x[:, 2] == 1).all())
    assert remasked > 0 and not bool((state.x == t.width).any())
    assert state.calls <= 12


@pytest.mark.parametrize("name", sorted(masked.SCHEDULES))
def test_hitting_times_follow_their_beta_law(name):
    curve, length, rows = masked.schedule(name), 64, 50_000
    t = np.linspace(0.0, 1.0, 1001)
    steep = np.abs(np.gradient(curve.m(t), t)) > 1e-2  # a flat end of m turns a rounding of 1e-16 into 1e-8
    assert np.abs(curve.inverse(curve.m(t)) - t)[steep].max() < 1e-10 and steep.mean() > 0.7
    assert np.abs(curve.inverse(curve.m(t)) - t).max() < 1e-7
    assert np.abs(curve.m(curve.inverse(curve.m(t))) - curve.m(t)).max() < 1e-10
    u = np.random.default_rng(9).random((rows, length))
    times = masked.hitting_times(curve, np.full(rows, length), u)
    assert (times >= 0).all() and (times <= 1).all()
    down = np.diff(times, axis=1)
    assert (down <= 0).all() and (down[times[:, 1:] > 0] < 0).all()
    for n in (length, length // 2, 1):  # masks left before the event
        m = curve.m(times[:, length - n]) / curve.m(1.0)
        inside = times[:, length - n] > 0
        assert inside.mean() > 0.98 or name == "geometric"
        # Below m(0), which only some curves have above 0, times are clipped: what is left is a Beta cut off there.
        law, cut = stats.beta(n, length + 1 - n), curve.m(0.0) / curve.m(1.0)
        ks = stats.kstest(m[inside], lambda v, law=law, cut=cut: (law.cdf(v) - law.cdf(cut)) / law.sf(cut))
        assert inside.sum() > 1000 and ks.pvalue > 1e-6, (n, ks)
    recursive, level = [], np.full(rows, curve.m(1.0))
    for j in range(length):  # equation 11, with the same numbers
        level = level * (1 - u[:, j]) ** (1.0 / (length - j))
        recursive.append(level)
    log_form = np.exp(np.log(curve.m(1.0)) + (np.log1p(-u) / (length - np.arange(length))).cumsum(1))
    assert np.abs(np.stack(recursive, 1) - log_form).max() < 1e-12
    assert np.abs(curve.inverse(log_form) - times).max() < 1e-12


@pytest.mark.parametrize("eta", [1, 2, 5])
def test_groups_by_steps_are_even_and_never_exceed_the_masks(eta):
    sizes = masked.FirstHitting(steps=eta).sizes(np.array([0, 1, 3, 7]))
    assert (sizes.sum(1) == [0, 1, 3, 7]).all()
    assert sizes.shape[1] == min(eta, 7)
    assert all(row[row > 0].max(initial=0) - row[row > 0].min(initial=9) <= 1 for row in sizes[1:])
