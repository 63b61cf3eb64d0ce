"""The noise levels and the scalings of the denoiser, against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch as th

from sb3_dqs.noise import NoiseLevels, c_in, c_noise, c_out, c_skip

# The default, and one of which every field is another
NOISES = [NoiseLevels(), NoiseLevels(sigma_min=0.01, sigma_broad=2.0, sigma_max=10.0, sigma_data=0.5, curvature=0.4)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n_steps", [3, 4, 8, 40])
def test_sampling_levels_fall_from_max_to_min_in_steps_that_shrink_after_the_first(noise, n_steps):
    levels = noise.sampling(n_steps)
    assert len(levels) == n_steps
    assert levels[:2] == [noise.sigma_max, pytest.approx(noise.sigma_broad)]
    assert levels[-1] == pytest.approx(noise.sigma_min)
    steps = np.array([math.log(high / low) for high, low in pairwise(levels[1:])])
    # Evenly, from above the mean step to below it by as much
    assert np.diff(steps) == pytest.approx(-2 * noise.curvature * steps.mean() / (n_steps - 2))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n_levels", [1, 4, 100])
def test_training_levels_are_stratified_per_state_and_log_uniform(noise, n_levels):
    n_states = 500
    levels = noise.training(n_states, n_levels)
    assert levels.shape == (n_states, n_levels, 1)
    quantiles = (levels.squeeze(2).log() - math.log(noise.sigma_min)) / math.log(noise.sigma_max / noise.sigma_min)
    # One level in each of n_levels equal parts of the logarithmic range (up to single precision at the edges)
    places = (quantiles * n_levels).sort(dim=1).values - th.arange(n_levels)
    assert (places >= -1e-3).all() and (places <= 1 + 1e-3).all()
    # Uniform in its part: mean 1/2 and variance 1/12, whose estimate has variance 1 / (180 n)
    n = places.numel()
    assert places.mean().item() == pytest.approx(1 / 2, abs=4 / math.sqrt(12 * n))
    assert places.var().item() == pytest.approx(1 / 12, abs=4 / math.sqrt(180 * n))
    # Shuffled: every place of a state sees all levels
    assert (quantiles.mean(dim=0) - 0.5).abs().max() < 5 / math.sqrt(12 * n_states)


def test_scalings_are_those_of_the_denoiser_of_a_gaussian():
    sigma, std = th.tensor([0.02, 0.5, 20.0], dtype=th.float64), th.tensor([0.91, 0.1, 2.0], dtype=th.float64)
    assert th.allclose(c_skip(sigma, std), std**2 / (std**2 + sigma**2))
    # c_out^2 is the mean squared error of that denoiser, so that the network has targets of unit scale
    assert th.allclose(c_out(sigma, std) ** 2, std**2 * sigma**2 / (std**2 + sigma**2))
    assert th.allclose(c_in(sigma, std) ** 2 * (std**2 + sigma**2), th.ones(3, dtype=th.float64))
    assert th.allclose(c_noise(sigma), sigma.log() / 4)


def test_data_are_those_of_a_uniform_action():
    """The variance of ``atanh(a)`` for uniform a is ``pi^2 / 12``."""
    assert NoiseLevels().sigma_data == pytest.approx(math.pi / math.sqrt(12), abs=5e-3)
