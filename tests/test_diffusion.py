"""The noise levels, the scalings and the solver, against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import quadrature
import torch as th

from sb3_dqs.density import log_det_tanh
from sb3_dqs.noise import (
    LEVEL_CURVATURE,
    SIGMA_BROAD,
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    edm_scalings,
    sampling_levels,
    training_levels,
)
from sb3_dqs.solvers import MAX_UNSQUASHED, MODE_LATENT, N_SHIFTS, SIGMA_MODE, find_mode, mode_latent, solve_reverse_ode


@pytest.mark.parametrize("n_levels", [3, 8, 40])
def test_sampling_levels_fall_from_max_to_min_in_steps_that_shrink_after_the_first(n_levels):
    levels = sampling_levels(n_levels)
    assert len(levels) == n_levels
    assert levels[:2] == [SIGMA_MAX, pytest.approx(SIGMA_BROAD)]
    assert levels[-1] == pytest.approx(SIGMA_MIN)
    steps = np.array([math.log(high / low) for high, low in pairwise(levels[1:])])
    assert steps.sum() == pytest.approx(math.log(SIGMA_BROAD / SIGMA_MIN))
    if n_levels > 3:
        # Evenly, from above the mean step to below it by as much
        assert np.diff(steps) == pytest.approx(-2 * LEVEL_CURVATURE * steps.mean() / (n_levels - 2))


@pytest.mark.parametrize("n_levels", [1, 2, 4, 256])
def test_training_levels_are_stratified_per_state_and_log_uniform(n_levels):
    levels = training_levels(500, n_levels)
    assert levels.shape == (500, n_levels, 1)
    quantiles = (levels.squeeze(2).log() - math.log(SIGMA_MIN)) / math.log(SIGMA_MAX / SIGMA_MIN)
    # One level in each of n equal parts of the logarithmic range (up to float32 at the edges)
    scaled = quantiles * n_levels
    strata = scaled.sort(dim=1).values - th.arange(n_levels)
    assert (strata >= -1e-3).all() and (strata <= 1 + 1e-3).all()
    # Anywhere within its part, and shuffled: every place of a state sees all levels
    assert strata.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * strata.numel()))
    assert (quantiles.mean(dim=0) - 0.5).abs().max() < 5 / math.sqrt(12 * 500)
    assert not th.equal(levels[0], levels[1])


def test_edm_scalings_are_the_denoiser_of_a_gaussian_of_the_data_variance():
    sigma = th.tensor([0.02, 0.5, 20.0])
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
    assert th.allclose(c_skip, SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))
    # c_out^2 is the mean squared error of that denoiser, so that the network has unit targets
    assert th.allclose(c_out**2, SIGMA_DATA**2 * sigma**2 / (SIGMA_DATA**2 + sigma**2))
    assert th.allclose(c_in**2 * (SIGMA_DATA**2 + sigma**2), th.ones(3))
    assert th.allclose(c_noise, sigma.log() / 4)


def test_data_are_those_of_a_uniform_action():
    assert th.atanh(2 * (th.arange(100_000, dtype=th.float64) + 0.5) / 100_000 - 1).std() == pytest.approx(
        SIGMA_DATA, abs=5e-3
    )


def solve(denoise, n_levels: int, n_samples: int = 4000) -> np.ndarray:
    """Draw with evenly spaced latents (no sampling noise) in one dimension."""
    levels = sampling_levels(n_levels)
    latents = th.special.ndtri((th.arange(n_samples, dtype=th.float64) + 0.5) / n_samples).unsqueeze(1)
    return solve_reverse_ode(lambda x, step: denoise(x, levels[step]), latents, levels).squeeze(1).numpy()


def gaussian_denoiser(mean: float, std: float):
    return lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.2), (0.3, 0.1), (-1.5, 0.05), (3.0, 0.5)])
def test_solver_reaches_a_gaussian_and_few_steps_come_near(mean, std):
    def errors(n_levels):
        samples = solve(gaussian_denoiser(mean, std), n_levels)
        return abs(samples.mean() - mean) / std, abs(math.log(samples.std() / std))

    mean_error, std_error = errors(8)
    assert mean_error < 0.05 and std_error < 0.15
    # With many steps what is left comes from the ends: the jump, and the noise below SIGMA_MIN, which is not undone
    mean_error, std_error = errors(200)
    ends = 0.5 * math.log1p((SIGMA_MIN / std) ** 2) + 0.5 * math.log1p((std / SIGMA_BROAD) ** 2)
    assert mean_error < 0.005 and std_error < ends + 0.005


def test_solver_is_of_second_order():
    """Twice the steps divide the error by about four (a first-order solver: by two)."""

    def error(n_levels):
        return np.abs(solve(gaussian_denoiser(0.0, 1.0), n_levels) - solve(gaussian_denoiser(0.0, 1.0), 1280)).mean()

    assert error(20) / error(40) > 2.8


@pytest.mark.parametrize(("share", "position"), [(0.3, 0.5), (0.1, 0.8), (0.2, 1.5)])
def test_solver_keeps_mode_shares(share, position):
    std = 0.1

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        logits = [math.log(p) - (x - m) ** 2 / (2 * total_variance) for p, m in ((share, -position), (1 - share, position))]
        weight = th.sigmoid(logits[0] - logits[1])
        means = [m + std**2 / total_variance * (x - m) for m in (-position, position)]
        return weight * means[0] + (1 - weight) * means[1]

    assert (solve(denoise, 8) < 0).mean() == pytest.approx(share, abs=0.02)


def test_solver_draws_uniform_actions():
    # Wasserstein-1 distance to U(-1, 1), whose own standard deviation is 0.58
    actions = np.sort(np.tanh(solve(lambda x, sigma: quadrature.denoise("flat", x, th.tensor(sigma)), 8, 1000)))
    exact = (np.arange(len(actions)) + 0.5) / len(actions) * 2 - 1
    assert np.abs(actions - exact).mean() < 0.03


def test_solver_is_bounded_whatever_the_denoiser_says():
    levels = sampling_levels(8)
    for factor in (1e6, -1e6, math.inf, math.nan):
        unsquashed = solve_reverse_ode(lambda x, step, factor=factor: factor * x, th.randn(64, 3), levels)
        assert unsquashed.isfinite().all() and unsquashed.abs().max() <= MAX_UNSQUASHED


def modes_of(denoise, latents: th.Tensor, n_levels: int) -> tuple[th.Tensor, float]:
    """What ``find_mode`` answers, and the level that it repeats."""
    levels, steps = sampling_levels(n_levels), []

    def spied(x, step):
        steps.append(step)
        return denoise(x, levels[step])

    modes = find_mode(spied, latents, levels)
    assert steps == [*range(steps[-1]), *[steps[-1]] * (N_SHIFTS + 1)]
    return modes, levels[steps[-1]]


@pytest.mark.parametrize("n_levels", [8, 20])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.9), (0.3, 0.1), (-1.5, 0.3)])
def test_mode_of_a_gaussian(mean, std, n_levels):
    """Of the distance from the mean every call at the last level keeps a fraction, that of the denoiser."""
    latents = th.tensor([[-1.0], [0.0], [0.5]], dtype=th.float64)
    modes, sigma = modes_of(gaussian_denoiser(mean, std), latents, n_levels)
    fraction = std**2 / (std**2 + sigma**2)
    expected = mean + latents * math.sqrt(std**2 + sigma**2) * fraction ** (N_SHIFTS + 1)
    # The solver itself comes near only
    assert th.allclose(modes, expected, rtol=0, atol=0.1 * std * fraction**N_SHIFTS)


@pytest.mark.parametrize("std", [0.05, 0.3, 0.9, 2.0])
def test_deterministic_action_of_one_mode_is_near_its_mean(std):
    modes, _ = modes_of(gaussian_denoiser(0.4, std), mode_latent(1).reshape(1, 1).double(), 8)
    assert abs(modes.item() - 0.4) < 0.1 * std


@pytest.mark.parametrize("action_dim", [1, 2, 6])
def test_deterministic_action_of_two_symmetric_modes_is_one_of_them(action_dim):
    center, std = th.full((action_dim,), 0.6, dtype=th.float64), 0.15

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        side = th.tanh((x * center).sum(dim=1, keepdim=True) / total_variance)
        return (sigma**2 * side * center + std**2 * x) / total_variance

    modes, _ = modes_of(denoise, mode_latent(action_dim).unsqueeze(0).double(), 8)
    assert min((modes - center).norm(), (modes + center).norm()) < 0.5 * std


@pytest.mark.parametrize("n_levels", [3, 4, 8, 50])
def test_modes_are_looked_for_through_little_noise(n_levels):
    _, sigma = modes_of(gaussian_denoiser(0.0, 0.5), th.zeros(1, 1), n_levels)
    assert SIGMA_MIN <= sigma <= SIGMA_MODE


@pytest.mark.parametrize("energy", ["flat", "linear", "two modes"])
def test_modes_are_denser_than_draws_and_not_between_two(energy):
    def exact_denoiser(x, sigma):
        return quadrature.denoise(energy, x, th.tensor(sigma))

    latents = th.special.ndtri((th.arange(200, dtype=th.float64) + 0.5) / 200).unsqueeze(1)
    modes, _ = modes_of(exact_denoiser, latents, 8)
    draws = th.as_tensor(solve(exact_denoiser, 8, 200)).unsqueeze(1)
    highest = quadrature.log_prob(energy, quadrature.GRID.unsqueeze(1)).max()
    losses = [(highest - quadrature.log_prob(energy, u)).clamp(min=0) for u in (modes, draws)]
    assert losses[0].mean() < 0.6 * losses[1].mean()
    if energy == "two modes":
        # Around 0.6 and -0.5 (the tanh shifts them), but for the latents next to where the one ends and the other begins
        assert ((modes.tanh() - 0.6).abs() < 0.15).logical_or((modes.tanh() + 0.5).abs() < 0.15).double().mean() >= 0.99


@pytest.mark.parametrize("action_dim", [1, 2, 6, 17, 100])
def test_modes_are_looked_for_near_the_middle_and_to_one_side_of_it_in_every_dimension(action_dim):
    latent = mode_latent(action_dim)
    assert th.equal(latent, mode_latent(action_dim))
    assert latent.norm().item() == pytest.approx(MODE_LATENT)
    sizes = latent.abs() * math.sqrt(action_dim) / latent.norm()
    assert sizes.min() > 0.6 and sizes.max() < 1.4
    assert len(set(sizes.tolist())) == action_dim
    if action_dim > 1:
        assert latent.min() < 0 < latent.max()


def test_mode_is_bounded_whatever_the_denoiser_says():
    for factor in (1e6, -1e6, math.inf, math.nan):
        unsquashed = find_mode(lambda x, step, factor=factor: factor * x, th.randn(64, 3), sampling_levels(8))
        assert unsquashed.isfinite().all() and unsquashed.abs().max() <= MAX_UNSQUASHED


def test_log_det_tanh():
    u = th.linspace(-5, 5, 60, dtype=th.float64).reshape(10, 2, 3)
    naive = (1 - th.tanh(u) ** 2).log().sum(dim=2)
    assert th.allclose(log_det_tanh(u), naive, rtol=1e-9)
    assert th.allclose(log_det_tanh(u.float()).double(), naive, atol=1e-5)
    # Far out, where 1 - tanh^2 underflows: 4 exp(-2 |u|)
    far = th.tensor([[50.0], [-50.0]], requires_grad=True)
    assert log_det_tanh(far).tolist() == pytest.approx([math.log(4) - 100] * 2)
    (gradient,) = th.autograd.grad(log_det_tanh(far).sum(), far)
    assert gradient.flatten().tolist() == pytest.approx([-2, 2])
