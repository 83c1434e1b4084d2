"""The measured cost: it finds the curve behind noisy samples, keeps it sane, and follows a machine that changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.engine.cost import NOTHING, CostModel, Work, attention_share, fit
from sidecar.vision.grid import Grid
from sidecar.vision.spec import TowerSpec

# Milliseconds: a run, a patch, a million pairs; like those of a large tower on a CPU, a small one, and a GPU.
CURVES = [(12.0, 0.4, 30.0), (1.0, 0.02, 0.1), (5.0, 0.01, 0.3), (0.0, 0.4, 0.0), (20.0, 0.0, 0.0), (3.0, 0.0, 8.0)]
SIZES = [Work.of([Grid(1, h, w)]) for h, w in itertools.product((8, 16, 32, 64, 96), (8, 24, 64, 100))]
GRIDS = st.builds(Grid, st.integers(1, 20), st.integers(2, 120), st.integers(2, 120))
SAMPLES = st.lists(st.tuples(GRIDS, st.floats(0, 1e6)), min_size=1, max_size=40)


def true_ms(curve: tuple[float, float, float], work: Work) -> float:
    return curve[0] + curve[1] * work.patches + curve[2] * work.pairs / 1e6


def noisy(ms: float, rng: np.random.Generator, noise: float = 0.05) -> float:
    return ms * float(np.exp(rng.normal(0, noise)))


def test_work_is_patches_and_pairs_within_a_frame() -> None:
    image, video = Grid(1, 4, 6), Grid(3, 2, 4)
    assert Work.of([image]) == Work(24, 24.0**2)
    assert Work.of([video]) == Work(24, 3 * 8.0**2)
    assert Work.of(iter([image, video])) == Work.of([image]) + Work.of([video])
    assert Work.of([image, video]) - Work.of([video]) == Work.of([image])
    assert Work.of([]) == NOTHING


def test_an_untaught_model_predicts_nothing() -> None:
    assert CostModel().ms(Work(1000, 1e6)) == 0.0


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_known_curve_is_recovered_from_noisy_runs(curve: tuple[float, float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = CostModel()
    for work in [*SIZES, *SIZES, *SIZES, *SIZES]:
        model.learn(work, noisy(true_ms(curve, work), rng))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(true_ms(curve, work), rel=0.08)


@pytest.mark.parametrize("curve", CURVES)
def test_a_few_warm_up_runs_already_tell_what_lies_between_them(curve: tuple[float, float, float]) -> None:
    model = CostModel()
    for side in (8, 12, 20, 40, 80):
        model.anchor(work := Work.of([Grid(1, side, side)]), true_ms(curve, work))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(true_ms(curve, work), rel=0.1)


def test_traffic_of_one_size_leaves_what_warm_up_found_at_others() -> None:
    curve = CURVES[0]
    model = CostModel()
    for side in (8, 12, 20, 40, 80):
        model.anchor(work := Work.of([Grid(1, side, side)]), true_ms(curve, work))
    rng = np.random.default_rng(1)
    for _ in range(300):
        model.learn(work := Work.of([Grid(1, 16, 16)]), noisy(true_ms(curve, work), rng))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(true_ms(curve, work), rel=0.25)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_that_becomes_slower_or_quicker_is_followed(factor: float) -> None:
    curve = CURVES[0]
    rng = np.random.default_rng(4)
    model = CostModel()
    for work in SIZES[:6]:
        model.anchor(work, true_ms(curve, work))
    for work in SIZES * 10:
        model.learn(work, noisy(true_ms(curve, work), rng))
    for work in (SIZES * 10)[:128]:
        model.learn(work, noisy(factor * true_ms(curve, work), rng))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(factor * true_ms(curve, work), rel=0.15)


@settings(deadline=None)
@given(samples=SAMPLES, one=GRIDS, other=GRIDS)
def test_whatever_it_was_taught_it_is_never_negative_and_never_falls(
    samples: list[tuple[Grid, float]], one: Grid, other: Grid
) -> None:
    model = CostModel()
    for number, (grid, ms) in enumerate(samples):
        (model.anchor if number % 3 == 0 else model.learn)(Work.of([grid]), ms)
    curve = model.curve()
    parts = (curve.fixed_ms, curve.per_patch_ms, curve.per_pair_ms)
    assert all(np.isfinite(parts))
    assert min(parts) >= 0
    smaller, larger = Work.of([one]), Work.of([one, other])
    assert 0 <= model.ms(smaller) <= model.ms(larger)
    assert model.fixed_ms <= model.ms(smaller)


def test_repeated_equal_runs_are_predicted_as_they_were() -> None:
    model = CostModel()
    for _ in range(50):
        model.learn(Work.of([Grid(1, 16, 16)]), 40.0)
    assert model.ms(Work.of([Grid(1, 16, 16)])) == pytest.approx(40.0)


def test_one_run_that_was_held_up_moves_little() -> None:
    curve = CURVES[0]
    model = CostModel()
    for work in SIZES * 6:
        model.learn(work, true_ms(curve, work))
    model.learn(SIZES[3], 20 * true_ms(curve, SIZES[3]))
    for work in SIZES[:8]:
        model.learn(work, true_ms(curve, work))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(true_ms(curve, work), rel=0.1)


def test_the_samples_shown_are_the_latest_and_bounded() -> None:
    model = CostModel()
    for number in range(100):
        model.anchor(Work(number + 1, 1.0), 1.0)
    for number in range(1000):
        model.learn(Work(number + 1, 1.0), 2.0)
    samples = model.curve().samples
    assert len(samples) == 16 + 128
    assert (samples[0], samples[-1]) == ((85, 1.0), (1000, 2.0))


def test_a_heavier_sample_counts_for_more() -> None:
    samples = [(Work(100, 1e4), 10.0), (Work(100, 1e4), 20.0)]
    for weights, ms in (([1.0, 0.0], 10.0), ([0.0, 1.0], 20.0)):
        fixed, per_patch, per_pair = fit(samples, weights)
        assert fixed + per_patch * 100 + per_pair * 1e4 == pytest.approx(ms)


LARGE = TowerSpec(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=2048)


def test_a_pair_costs_what_the_networks_arithmetic_gives_it() -> None:
    """Of the 3B tower: 20480 operations a pair against 1.291e9 a patch (docs/performance.md)."""
    assert attention_share(LARGE) == pytest.approx(20480 / 1.291e9, rel=0.01)


@pytest.mark.parametrize("anchored", [True, False])
def test_a_size_that_was_never_run_is_not_taken_for_cheap(anchored: bool) -> None:
    """Small items show nothing of the quadratic part: 65,536 patches in one frame take more than twice what a line says."""
    share = attention_share(LARGE)
    rng = np.random.default_rng(2)
    model = CostModel(share)
    for side in (8, 12, 16, 32, 64) if anchored else ():
        model.anchor(work := Work.of([Grid(1, side, side)]), true_ms((1.0, 1.4, 1.4e6 * share), work))
    for _ in range(100):
        model.learn(work := Work.of([Grid(1, 16, 16)]), noisy(true_ms((1.0, 1.4, 1.4e6 * share), work), rng))
    huge = Work.of([Grid(1, 256, 256)])
    assert model.ms(huge) == pytest.approx(true_ms((1.0, 1.4, 1.4e6 * share), huge), rel=0.25)


def test_a_slow_warm_up_is_corrected_by_the_first_run() -> None:
    model = CostModel(attention_share(LARGE))
    for side in (8, 12, 16):
        model.anchor(Work.of([Grid(1, side, side)]), 2000.0)
    model.learn(work := Work.of([Grid(1, 16, 16)]), 50.0)
    assert model.ms(work) == pytest.approx(50.0, rel=0.05)


@pytest.mark.parametrize("factor", [0.1, 0.4, 2.5, 4.0])
def test_a_wrong_prediction_is_corrected_by_the_next_run(factor: float) -> None:
    model = CostModel()
    for work in SIZES * 6:
        model.learn(work, true_ms(CURVES[0], work))
    model.learn(SIZES[3], factor * true_ms(CURVES[0], SIZES[3]))
    for work in SIZES:
        assert model.ms(work) == pytest.approx(factor * true_ms(CURVES[0], work), rel=0.1)
