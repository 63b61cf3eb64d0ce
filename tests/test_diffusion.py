"""The noise levels, the scalings and the solver, against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch as th

from sb3_dqs.boltzmann import truncated_normal_mean
from sb3_dqs.diffusion import (
    SIGMA_BROAD,
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    edm_scalings,
    sampling_levels,
    solve_reverse_ode,
    training_levels,
)


@pytest.mark.parametrize("n_levels", [3, 8, 40])
def test_sampling_levels_fall_from_max_to_min(n_levels):
    levels = sampling_levels(n_levels)
    assert len(levels) == n_levels
    assert all(high > low for high, low in pairwise(levels))
    assert levels[:2] == [SIGMA_MAX, pytest.approx(SIGMA_BROAD)]
    assert levels[-1] == pytest.approx(SIGMA_MIN)


@pytest.mark.parametrize("n_samples", [1, 2, 7, 256])
def test_training_levels_are_stratified_and_log_uniform(n_samples):
    levels = training_levels(n_samples)
    assert levels.shape == (n_samples, 1)
    quantiles = (levels.log() - math.log(SIGMA_MIN)) / math.log(SIGMA_MAX / SIGMA_MIN)
    # One level in each of n equal parts of the logarithmic range (up to float32 at the edges)
    strata = (quantiles.squeeze(1) * n_samples).sort().values
    assert (strata >= th.arange(n_samples) - 1e-3).all() and (strata <= th.arange(n_samples) + 1 + 1e-3).all()


def test_edm_scalings_are_the_denoiser_of_a_gaussian_of_the_data_variance():
    sigma = th.tensor([0.02, 0.5, 20.0])
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
    assert th.allclose(c_skip, SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))
    # c_out^2 is the mean squared error of that denoiser, so that the network has unit targets
    assert th.allclose(c_out**2, SIGMA_DATA**2 * sigma**2 / (SIGMA_DATA**2 + sigma**2))
    assert th.allclose(c_in**2 * (SIGMA_DATA**2 + sigma**2), th.ones(3))
    assert th.allclose(c_noise, sigma.log() / 4)


def solve(denoise, n_levels: int, n_samples: int = 4000) -> np.ndarray:
    """Draw with evenly spaced latents (no sampling noise) in one dimension."""
    levels = sampling_levels(n_levels)
    latents = th.special.ndtri((th.arange(n_samples, dtype=th.float64) + 0.5) / n_samples).unsqueeze(1)
    return solve_reverse_ode(lambda x, step: denoise(x, levels[step]), latents, levels).squeeze(1).numpy()


def gaussian_denoiser(mean: float, std: float):
    return lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.2), (0.3, 0.1), (-0.5, 0.05)])
def test_solver_reaches_a_gaussian_and_few_steps_come_near(mean, std):
    def errors(n_levels):
        samples = solve(gaussian_denoiser(mean, std), n_levels)
        return abs(samples.mean() - mean) / std, abs(math.log(samples.std() / std))

    mean_error, std_error = errors(8)
    assert mean_error < 0.05 and std_error < 0.15
    # With many steps what is left comes from the ends: the start leaves out the mean, which is small beside SIGMA_MAX,
    # and the noise below SIGMA_MIN is not undone
    mean_error, std_error = errors(200)
    assert mean_error < abs(mean) / SIGMA_MAX + 0.005 and std_error < 0.5 * math.log1p((SIGMA_MIN / std) ** 2) + 0.01


def test_solver_is_of_second_order():
    """Twice the steps divide the error by about four (a first-order solver: by two)."""

    def error(n_levels):
        return np.abs(solve(gaussian_denoiser(0.0, 0.2), n_levels) - solve(gaussian_denoiser(0.0, 0.2), 1280)).mean()

    assert error(20) / error(40) > 2.8


@pytest.mark.parametrize(("share", "position"), [(0.3, 0.5), (0.1, 0.8)])
def test_solver_keeps_mode_shares(share, position):
    std = 0.1

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        logits = [math.log(p) - (x - m) ** 2 / (2 * total_variance) for p, m in ((share, -position), (1 - share, position))]
        weight = th.sigmoid(logits[0] - logits[1])
        means = [m + std**2 / total_variance * (x - m) for m in (-position, position)]
        return weight * means[0] + (1 - weight) * means[1]

    assert (solve(denoise, 8) < 0).mean() == pytest.approx(share, abs=0.02)


def test_solver_draws_the_uniform_policy():
    def denoise(x, sigma):
        return truncated_normal_mean(x, th.full_like(x, sigma))

    # Wasserstein-1 distance to U(-1, 1), whose own standard deviation is 0.58
    samples = np.sort(solve(denoise, 8))
    exact = (np.arange(len(samples)) + 0.5) / len(samples) * 2 - 1
    assert np.abs(samples - exact).mean() < 0.03


def test_solver_stays_in_the_box_whatever_the_denoiser_says():
    levels = sampling_levels(8)
    for factor in (1e6, -1e6, math.inf, math.nan):
        actions = solve_reverse_ode(lambda x, step, factor=factor: factor * x, th.randn(64, 3), levels)
        assert actions.isfinite().all() and actions.abs().max() <= 1
