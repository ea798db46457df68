"""Whole runs: identities, groups, chunks, noise of duplicates, bad input, the command line's grammar."""

import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from analytic_targets import ERRORS, Mixture, denoiser, karras, process_of

import diffsamp
from diffsamp.correctors import Corrector, Recipe, Steering, Twist, annealed, cfg, fkc, parse, slot_seeds
from diffsamp.errors import DiffsampError

EXPERTS = [
    Mixture([0.35, 0.3, 0.35], [-2, 0, 2], [0.4, 0.4, 0.25]),
    Mixture([0.35, 0.3, 0.35], [-2, 0, 2], [0.5, 0.5, 0.8]),
]


def plan_of(steps=12, solver="sde-dpmpp-2m"):
    process = process_of("vp")
    return diffsamp.solver(solver)(process, karras(process, steps))


def begin(plan, seeds, particles, dims=3):
    slots = slot_seeds(seeds, len(seeds), particles)
    return plan.first_level.sigma * diffsamp.rng.normal(slots, (dims,), dtype=torch.float64), slots


def separable(x, level):
    """Both experts on every coordinate."""
    flat = x.reshape(-1, 1)
    return tuple(d.reshape(x.shape) for d in denoiser(EXPERTS)(flat, level))


@pytest.mark.parametrize("target", [cfg(1.0), annealed(1.0)])
@pytest.mark.parametrize("particles", [1, 4])
def test_trivial_targets_give_the_base_samplers_samples_to_the_bit(target, particles):
    plan = plan_of()
    x, slots = begin(plan, [3, 4], particles)

    def epsilon(x, level):
        made = tuple((x - level.alpha * d) / level.sigma for d in separable(x, level))
        return made[: target.conditions]

    result = Corrector(target, particles).run(plan, epsilon, x, prediction="epsilon", seeds=slots)
    plain = diffsamp.sample(plan, lambda x, at: epsilon(x, at)[0], x, prediction="epsilon", seeds=slots)
    assert torch.equal(result.samples, plain)


def test_one_particle_gives_plain_guidance_to_the_bit():
    plan = plan_of()
    x, slots = begin(plan, [3, 4], 1)
    target = cfg(3.0)
    result = Corrector(target, 1).run(plan, separable, x, seeds=slots)
    plain = diffsamp.sample(plan, lambda x, at: target.mix(separable(x, at), x, at), x, seeds=slots)
    assert torch.equal(result.samples, plain)


@pytest.mark.parametrize("beta", [0.5, 1.5, 3.0])
def test_long_first_step_of_an_annealed_run_stays_on_the_scale_of_the_data(beta):
    # A trailing grid starts at sigma/alpha in the thousands; a drift of B times the base overshoots by (1 - B) of it.
    process = process_of("ve")
    grid = diffsamp.Grid(process, tuple(process.level(s) for s in (4000.0, 6.0, 3.0, 1.5, 0.7, 0.3, 0.1, 0.0)))
    plan = diffsamp.solver("sde-dpmpp-2m")(process, grid)
    generator = torch.Generator().manual_seed(0)
    x = 4000.0 * torch.randn(64, 50, generator=generator, dtype=torch.float64)

    def unit_gaussian(x, level):
        return x / (1 + level.sigma**2)

    result = Corrector(annealed(beta), 8).run(plan, unit_gaussian, x, generator=generator)
    assert 0.3 < float(result.samples.std()) < 2.5


def test_groups_are_independent_and_permute_with_their_seeds():
    plan, corrector = plan_of(), Corrector(cfg(4.0), 6, 0.9)
    x, _ = begin(plan, [5, 6, 7], 6)
    one = corrector.run(plan, separable, x, seeds=[5, 6, 7])
    x, _ = begin(plan, [7, 5], 6)
    other = corrector.run(plan, separable, x, seeds=[7, 5])
    first = one.samples.reshape(3, 6, 3)
    assert one.resamplings.sum() > 0
    assert torch.equal(other.samples.reshape(2, 6, 3), first[[2, 0]])
    assert np.array_equal(other.roots, one.roots[[2, 0]])
    assert all((info.ancestors >= 0).all() and (info.ancestors < 6).all() for info in one.info)


def test_duplicates_part_after_a_resampling():
    plan, corrector = plan_of(), Corrector(cfg(6.0), 8, 1.0)
    x, _ = begin(plan, [1], 8)
    result = corrector.run(plan, separable, x, seeds=[1])
    assert result.unique_ancestors[0] < 8
    assert len({tuple(row.tolist()) for row in result.samples}) == 8


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_of_any_size_give_the_same_particles(chunk):
    plan = plan_of()
    x, _ = begin(plan, [5, 6], 6)
    whole = Corrector(cfg(4.0), 6, 0.9).run(plan, separable, x, seeds=[5, 6])
    parts = Corrector(cfg(4.0), 6, 0.9, chunk=chunk).run(plan, separable, x, seeds=[5, 6])
    assert torch.allclose(parts.samples, whole.samples, atol=1e-5)
    assert np.array_equal(parts.roots, whole.roots)


def scalar_reward(x):
    return x[:, 0]


@pytest.mark.parametrize("kind", ["difference", "maximum", "sum"])
def test_potentials_of_a_path_add_up_to_the_reward_of_its_end(kind):
    plan = plan_of()
    x, _ = begin(plan, [5, 6], 6)
    corrector = Corrector(None, 6, 1e-6, potential=Steering(scalar_reward, 0.7, kind))
    result = corrector.run(plan, lambda x, at: separable(x, at)[0], x, seeds=[5, 6])
    assert result.resamplings.sum() == 0
    end = result.samples[:, 0].numpy().reshape(2, 6) / plan.last_level.alpha
    assert np.allclose(result.log_weights, 0.7 * end, atol=1e-9)


@pytest.mark.parametrize("potential", [Steering(scalar_reward), Twist(scalar_reward)])
def test_steering_and_twists_reach_the_tilted_law_of_the_discrete_sampler(potential):
    # A Gaussian of variance v tilted by exp(x) moves by v; 40 groups of 256, standard error of the mean below .03.
    process = process_of("ve")
    plan = diffsamp.solver("sde-dpmpp-1")(process, karras(process, 30, low=0.05))
    predict = denoiser([Mixture([1.0], [0.0], [1.0])])
    generator = torch.Generator().manual_seed(0)
    x = plan.first_level.sigma * torch.randn(40 * 256, 1, generator=generator, dtype=torch.float64)
    result = Corrector(None, 256, 0.5, potential=potential).run(plan, predict, x, generator=generator)
    plain = Corrector(None, 256).run(plan, predict, x, generator=generator)
    means = (result.weights * result.samples.numpy().reshape(40, 256)).sum(1)
    variance = float(plain.samples.var())
    # Of the mean over groups, and of the variance of 40·256 Gaussians: false alarms below 1e-5.
    error = math.hypot(means.std(ddof=1) / 40**0.5, variance * (2 / (40 * 256)) ** 0.5)
    assert ERRORS * error < 0.13
    assert abs(means.mean() - variance) < 0.13, (means.mean(), variance)
    # The mean of the plain run is 0; its standard error is sqrt(variance/(40·256)).
    assert ERRORS * (variance / (40 * 256)) ** 0.5 < 0.1
    assert abs(float(plain.samples.mean())) < 0.1


def test_bad_input_is_refused_in_one_line():
    def refused(match, work):
        with pytest.raises(DiffsampError, match=match) as error:
            work()
        assert "\n" not in str(error.value)

    plan = plan_of()
    x, _ = begin(plan, [1], 4)
    refused("deterministic", lambda: Corrector(cfg(2.0), 4).run(plan_of(solver="unipc"), separable, x, seeds=[1]))
    refused("particles: got 1", lambda: fkc("cfg", particles=1))
    for bad in (0.0, 1.5, -1, math.nan):
        refused("ess", lambda bad=bad: fkc("cfg", ess=bad))
    nan = Steering(lambda x: x[:, 0] * math.nan)
    refused("NaN", lambda: Corrector(cfg(2.0), 4, potential=nan).run(plan, separable, x, seeds=[1]))
    shape = Steering(lambda x: x)
    refused("shape", lambda: Corrector(cfg(2.0), 4, potential=shape).run(plan, separable, x, seeds=[1]))
    refused("does not divide", lambda: Corrector(cfg(2.0), 3).run(plan, separable, x, seeds=[1]))
    refused("share a seed", lambda: Corrector(cfg(2.0), 4).run(plan, separable, x, seeds=[1, 1, 2, 3]))
    refused("predictions", lambda: Corrector(annealed(2.0), 4).run(plan, separable, x, seeds=[1]))
    refused("resampling", lambda: fkc("cfg", resampling="sistematic"))
    refused("did you mean 'anneal'", lambda: parse("fkc:target=aneal"))
    refused("is no option", lambda: parse("fkc:partikles=4"))
    refused("whole number", lambda: parse("fkc:particles=four"))


def test_written_form():
    made = parse("fkc:target=cfg,particles=4,ess=0.7")
    assert isinstance(made, Recipe) and made.at(3.0).target.powers == (3.0, -2.0)
    assert parse("fkc:target=anneal,beta=1.5").target.powers == (1.5,)
    assert parse("fkc:target=composed,scales=2+1.5,resampling=ssp").target.powers == (2.0, 1.5, -2.5)
    from diffsamp.cli.corrected import class_terms

    assert class_terms("3*5,8", [0, 1, 2], ["a"] * 10) == [(3, 5), (8,), (3, 5)]


def test_sample_takes_a_corrector_as_text():
    plan = plan_of()
    x, slots = begin(plan, [5, 6], 4)
    text = "fkc:target=cfg,scale=4,particles=4,ess=1,choose=all"
    found = diffsamp.sample(plan, separable, x, seeds=slots, corrector=text)
    made = Corrector(cfg(4.0), 4, 1.0, choose="all").run(plan, separable, x, seeds=slots)
    assert made.resamplings.sum() > 0 and torch.equal(found, made.samples)
    one = diffsamp.sample(plan, separable, x, seeds=slots, corrector=text.replace("choose=all", "choose=best"))
    assert torch.equal(one, made.samples[[int(w.argmax()) + 4 * g for g, w in enumerate(made.weights)]])
    wrong = (("fkc:target=cfg,particles=4", "scale"), ("fck:target=cfg", "'fck' is not known"), (3, "got int"))
    for bad, match in wrong:
        with pytest.raises(DiffsampError, match=match) as error:
            diffsamp.sample(plan, separable, x, seeds=slots, corrector=bad)
        assert "\n" not in str(error.value)


def test_noise_of_the_caller_takes_the_place_of_the_drawn_one_and_seeds_still_resample():
    plan = plan_of()
    x, slots = begin(plan, [5, 6], 4)
    text = "fkc:target=cfg,scale=4,particles=4,ess=1,choose=all"
    own = lambda i: diffsamp.rng.normal(slots, (3,), i, dtype=torch.float64)  # noqa: E731
    drawn = diffsamp.sample(plan, separable, x, seeds=slots, corrector=text)
    given = diffsamp.sample(plan, separable, x, seeds=slots, corrector=text, noise=own)
    assert torch.equal(given, drawn)
    other = diffsamp.sample(plan, separable, x, seeds=slots, corrector=text, noise=lambda i: -own(i))
    assert not torch.allclose(other, drawn)
    with pytest.raises(DiffsampError, match=r"noise: got shape \(4, 3\) at row 0; needs \(8, 3\)") as error:
        diffsamp.sample(plan, separable, x, seeds=slots, corrector=text, noise=lambda i: own(i)[:4])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["cfg,scale=4", "cfg,scale=1"])
def test_prediction_that_is_not_finite_is_named_with_its_sample_and_step(target):
    plan = plan_of()
    x, slots = begin(plan, [5, 6], 4)

    def broken(x, level):
        cond, uncond = separable(x, level)
        if level.sigma == plan.rows[3].level.sigma:
            uncond[5, 1] = math.inf
        return cond, uncond

    with pytest.raises(DiffsampError, match=r"prediction of sample \[5\] at step 3 .* not finite") as error:
        diffsamp.sample(plan, broken, x, seeds=slots, corrector=f"fkc:target={target},particles=4", check_finite=True)
    assert "\n" not in str(error.value)


def test_two_processes_give_the_particles_of_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            torch.set_num_threads(1)
            from test_corrector_runs import plan_of, begin, separable
            from diffsamp.correctors import Corrector, Shared, cfg
            import torch.distributed as dist
            rank = int(sys.argv[1])
            dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
            plan = plan_of()
            x, _ = begin(plan, [5, 6, 7], 6)
            result = Corrector(cfg(4.0), 6, 0.9, shard=Shared()).run(plan, separable, x, seeds=[5, 6, 7])
            torch.save((result.samples, torch.from_numpy(result.roots)), f"{tmp_path}/{{rank}}.pt")
            dist.destroy_process_group()
            """
        )
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [subprocess.Popen([sys.executable, str(script), str(r)], env=path) for r in range(2)]
    assert [p.wait(timeout=240) for p in ranks] == [0, 0]
    plan = plan_of()
    x, _ = begin(plan, [5, 6, 7], 6)
    one = Corrector(cfg(4.0), 6, 0.9).run(plan, separable, x, seeds=[5, 6, 7])
    assert one.resamplings.sum() > 0
    for rank in range(2):
        samples, roots = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(samples, one.samples)
        assert np.array_equal(roots.numpy(), one.roots)


def test_embedded_pipeline_with_particles():
    from diffsamp.adapters.particles import attached

    pipe = diffsamp.load("fashion")
    pipe.set_progress_bar_config(disable=True)

    def run(scale, **options):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        return pipe(class_labels=[3], num_images_per_prompt=4, num_inference_steps=4, guidance_scale=scale,
                    generator=generators, output_type="pt", **options).images  # fmt: skip

    diffsamp.use(pipe, "sde-dpmpp-2m")
    plain = run(1.0)
    diffsamp.use(pipe, corrector="fkc:target=cfg,particles=4,ess=1,choose=all")
    assert torch.equal(run(1.0), plain)  # w = 1: the base sampler to the bit
    assert run(5.0).shape == plain.shape
    assert attached(pipe).result.resamplings.sum() > 0 and np.isfinite(attached(pipe).result.log_z).all()
    diffsamp.use(pipe, corrector="fkc:target=cfg,particles=4")
    assert run(5.0).shape[0] == 1
    with pytest.raises(DiffsampError, match="num_images_per_prompt"):
        pipe(class_labels=[3], num_images_per_prompt=3, num_inference_steps=2, guidance_scale=2.0)
    with pytest.raises(DiffsampError, match="deterministic"):
        diffsamp.use(pipe, "unipc", corrector="fkc:target=cfg")
    diffsamp.restore(pipe)
    assert "step" not in pipe.scheduler.__dict__
