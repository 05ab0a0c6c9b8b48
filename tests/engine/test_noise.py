"""Noise is the published one, per row, and independent of what is asked beside it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules.engine.brownian import BrownianTree, _NodeSeeds
from modules.engine.noise import InpaintNoise, RowNoise
from tests.engine import golden

SHAPE = (4, 16, 16)
LOW, HIGH = 0.0291671585, 14.6146402


def test_initial_noise_is_published() -> None:
    flat = RowNoise([0], SHAPE).normal().flatten()
    assert {i: float(flat[i]) for i in golden.INITIAL_NOISE} == pytest.approx(golden.INITIAL_NOISE, abs=1e-6)


def test_later_noise_continues_the_same_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.randn((1, *SHAPE), generator=generator)
    assert float(torch.randn((), generator=generator)) == pytest.approx(golden.NEXT_SCALAR, abs=1e-6)
    noise = RowNoise([0], SHAPE)
    stream = torch.Generator().manual_seed(0)
    for _ in range(3):
        assert noise.normal().equal(torch.randn((1, *SHAPE), generator=stream))


def test_brownian_noise_is_published() -> None:
    noise = RowNoise([0], SHAPE)
    noise.span(LOW, HIGH)
    w = noise.brownian(14.61464, 7.90293)
    assert w.shape == (1, *SHAPE)
    assert w.flatten()[:3].tolist() == pytest.approx(golden.BROWNIAN, abs=1e-5)
    assert float(w.std()) == pytest.approx(golden.BROWNIAN_STD, abs=1e-4)


@pytest.mark.parametrize("row", golden.TORCHSDE_INCREMENTS, ids=str)
def test_tree_gives_the_numbers_of_torchsde(row: golden.Increment) -> None:
    tree = BrownianTree(LOW, HIGH, (1, 4, 4, 4), row.seed)
    increment = tree.increment(row.start, row.end).flatten()
    assert [*increment[:3].tolist(), float(increment.sum())] == pytest.approx(row.values, abs=1e-5)


@given(seed=st.integers(0, 2**63 - 1), depth=st.integers(0, 28), share=st.floats(0, 1, exclude_max=True))
def test_node_seeds_are_numpy_seed_sequences(seed: int, depth: int, share: float) -> None:
    key = int(share * 2**depth)
    sequence = np.random.SeedSequence(seed, spawn_key=(key, depth), pool_size=24)
    assert _NodeSeeds(seed).node(key, depth) == sequence.generate_state(1)[0]


def test_increments_do_not_depend_on_earlier_questions() -> None:
    questions = [(5.0, 6.0), (0.5, 9.25), (1.0, 1.000001), (LOW, HIGH), (5.0, 5.5)]
    asked_in_order = BrownianTree(LOW, HIGH, SHAPE, 7)
    asked_backwards = BrownianTree(LOW, HIGH, SHAPE, 7)
    forwards = [asked_in_order.increment(*question) for question in questions]
    backwards = [asked_backwards.increment(*question) for question in reversed(questions)]
    assert all(a.equal(b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_increments_add_up() -> None:
    tree = BrownianTree(0.0, 1.0, SHAPE, 3)
    whole = tree.increment(0.2, 0.9)
    parts = tree.increment(0.2, 0.35) + tree.increment(0.35, 0.9)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_increments_are_normal_with_the_interval_as_variance() -> None:
    tree = BrownianTree(0.0, 16.0, (4, 64, 64), 11)
    for start, end in ((0.0, 16.0), (3.0, 3.5), (1.25, 9.0)):
        increment = tree.increment(start, end)
        assert float(increment.std()) == pytest.approx(math.sqrt(end - start), rel=0.03)
        assert abs(float(increment.mean())) < 0.05 * math.sqrt(end - start)


def test_times_outside_the_interval_count_as_its_ends() -> None:
    tree = BrownianTree(1.0, 2.0, SHAPE, 0)
    assert tree.increment(0.5, 3.0).equal(tree.increment(1.0, 2.0))
    assert not tree.increment(2.0, 3.0).any()


def test_brownian_noise_changes_sign_with_direction() -> None:
    noise = RowNoise([5], SHAPE)
    noise.span(LOW, HIGH)
    assert noise.brownian(2.0, 1.0).equal(-noise.brownian(1.0, 2.0))


def test_each_row_of_a_batch_gets_what_its_seed_gets_alone() -> None:
    seeds = [3, 4, 2**63 - 1]
    batch = RowNoise(seeds, SHAPE)
    batch.span(LOW, HIGH)
    normal, later, brownian = batch.normal(), batch.normal(), batch.brownian(9.0, 2.0)
    for row, seed in enumerate(seeds):
        single = RowNoise([seed], SHAPE)
        single.span(LOW, HIGH)
        assert single.normal().equal(normal[row : row + 1])
        assert single.normal().equal(later[row : row + 1])
        assert single.brownian(9.0, 2.0).equal(brownian[row : row + 1])


def test_inpaint_noise_has_a_stream_of_its_own() -> None:
    inpaint = InpaintNoise([7], SHAPE)
    expected = torch.Generator().manual_seed(8)
    assert inpaint.normal().equal(torch.randn((1, *SHAPE), generator=expected))
    assert inpaint.normal().equal(torch.randn((1, *SHAPE), generator=expected))
    assert InpaintNoise([2**63 - 2], SHAPE).normal().equal(RowNoise([0], SHAPE).normal())


def test_noise_does_not_touch_the_global_generators() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    noise = RowNoise([0], SHAPE)
    noise.span(LOW, HIGH)
    noise.normal(), noise.brownian(2.0, 1.0)
    assert torch.get_rng_state().equal(before)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        RowNoise([], SHAPE)
    with pytest.raises(RuntimeError, match="span"):
        RowNoise([0], SHAPE).brownian(2.0, 1.0)
    with pytest.raises(ValueError, match="start < end"):
        BrownianTree(1.0, 1.0, SHAPE, 0)
