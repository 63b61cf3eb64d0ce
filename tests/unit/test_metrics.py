"""Grids, moments and distances against closed forms."""

import math

import pytest
import torch as th

from sb3_dqs.diagnostics.metrics import (
    box_grid,
    distance_ratio,
    grid_entropy,
    sample_grid,
    sliced_wasserstein,
    weighted_moments,
)

# The density exp(SLOPE * a) / Z on [-1, 1], per dimension
SLOPE = 2.0
MEAN = 1 / math.tanh(SLOPE) - 1 / SLOPE
STD = math.sqrt(1 / SLOPE**2 - 1 / math.sinh(SLOPE) ** 2)
ENTROPY = math.log(2 * math.sinh(SLOPE) / SLOPE) - SLOPE * MEAN


def test_box_grid():
    assert box_grid(1, 4).tolist() == [[-0.75], [-0.25], [0.25], [0.75]]
    assert box_grid(2, 2).tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    grid = box_grid(3, 5, dtype=th.float64)
    assert grid.shape == (125, 3) and grid.dtype == th.float64
    # The midpoint rule: mean square 1/3 - width^2 / 12
    assert (grid**2).mean(dim=0).tolist() == pytest.approx([1 / 3 - 0.4**2 / 12] * 3)


@pytest.mark.parametrize(("dim", "n"), [(1, 2048), (2, 128), (3, 40)])
def test_moments_entropy_and_draws_of_a_grid(dim, n):
    grid = box_grid(dim, n, dtype=th.float64)
    log_probs = th.log_softmax(SLOPE * grid.sum(dim=1), dim=0)
    mean, std, _ = weighted_moments(grid, log_probs)
    # Errors of the midpoint rule: a few widths squared
    assert mean.tolist() == pytest.approx([MEAN] * dim, abs=2 / n**2)
    assert std.tolist() == pytest.approx([STD] * dim, abs=2 / n**2)
    assert grid_entropy(log_probs, dim).item() == pytest.approx(dim * ENTROPY, abs=dim * 3 / n**2)
    draws = sample_grid(grid, log_probs, 20_000)
    assert draws.mean(dim=0).tolist() == pytest.approx([MEAN] * dim, abs=5 * STD / math.sqrt(20_000))
    assert draws.abs().max() <= 1
    # Uniform within a cell: the mean square distance from its midpoint is width^2 / 12
    offsets = (draws + 1) * n / 2 % 1 - 0.5
    assert offsets.pow(2).mean().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / (20_000 * dim)))


def test_error_of_a_weighted_mean():
    """With equal weights, the standard error of a mean."""
    points = th.randn(1000, 3, dtype=th.float64)
    equal = th.full((1000,), -math.log(1000), dtype=th.float64)
    expected = points.std(dim=0, correction=0) / math.sqrt(1000)
    assert weighted_moments(points, equal)[2].tolist() == pytest.approx(expected.tolist())
    # One point has all the weight
    certain = th.full((1000,), -math.inf, dtype=th.float64)
    certain[7] = 0
    mean, std, error = weighted_moments(points, certain)
    assert mean.tolist() == points[7].tolist() and std.tolist() == error.tolist() == [0, 0, 0]


class TestSlicedWasserstein:
    # Mean over directions of |cos(angle to a shift)|: 1 in one dimension, 2/pi in two, 3/8 in five (variance 1/5 - 9/64)
    @pytest.mark.parametrize(
        ("dim", "n_directions", "share", "tolerance"),
        [(1, 1, 1, 1e-6), (2, 16, 2 / math.pi, 2e-3), (5, 20_000, 3 / 8, 5 * math.sqrt((1 / 5 - 9 / 64) / 20_000))],
    )
    def test_of_a_shift(self, dim, n_directions, share, tolerance):
        points, shift = th.randn(3, 50, dim, dtype=th.float64), th.full((dim,), 0.4 / math.sqrt(dim), dtype=th.float64)
        distances = sliced_wasserstein(points, points.flip(1) + shift, n_directions)
        assert distances.tolist() == pytest.approx([0.4 * share] * 3, abs=0.4 * tolerance)

    def test_directions_in_many_dimensions_leave_the_random_stream(self):
        first, second = th.randn(2, 50, 4)
        state = th.get_rng_state()
        assert sliced_wasserstein(first, second) == sliced_wasserstein(second, first)
        assert th.equal(th.get_rng_state(), state)

    def test_ratio(self):
        """Of sets from one distribution about 1; of a shift by one standard deviation, known from the shift."""
        exact = th.randn(16, 1000, 1)
        # The floor: 2 / sqrt(n) times the mean absolute Brownian bridge over the density, to a few per cent
        floor = sliced_wasserstein(exact[::2], exact[1::2]).mean().item()
        assert distance_ratio(th.randn(1000, 1), exact) == pytest.approx(1, abs=0.5)
        assert distance_ratio(th.randn(1000, 1) + 1, exact) == pytest.approx(1 / floor, rel=0.3)
