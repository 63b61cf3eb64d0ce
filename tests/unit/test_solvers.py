"""The solver, its inverse and the search for a mode, with exact denoisers: no network."""

import math

import numpy as np
import pytest
import quadrature
import torch as th
from quadrature import even_latents, exact, gaussian, two_gaussians

from sb3_dqs.noise import NoiseLevels
from sb3_dqs.solvers import MAX_UNSQUASHED, dpm_solver_2m, find_mode, invert, mode_latent

NOISE = NoiseLevels()
SIGMAS = NOISE.sampling(8)


def solve(denoise, n_steps=8, n_samples=1000):
    sigmas = NOISE.sampling(n_steps)
    return dpm_solver_2m(denoise, sigmas[0] * even_latents(n_samples), sigmas)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.2), (0.3, 0.1), (-1.5, 0.05), (3.0, 0.5)])
def test_solver_reaches_a_gaussian_and_few_steps_come_near(mean, std):
    def errors(n_steps):
        u = solve(gaussian(mean, std), n_steps)
        # The quantiles themselves have a standard deviation 0.1 % too low
        return abs(u.mean().item() - mean) / std, abs(math.log(u.std().item() / std))

    mean_error, std_error = errors(8)
    assert mean_error < 0.05 and std_error < 0.15
    # With many steps what is left comes from the ends: the first step, and the noise below sigma_min, which is not undone
    mean_error, std_error = errors(200)
    ends = 0.5 * math.log1p((NOISE.sigma_min / std) ** 2) + 0.5 * math.log1p((std / NOISE.sigma_broad) ** 2)
    assert mean_error < 0.005 and std_error < ends + 0.005


def test_solver_is_of_second_order():
    """Twice the steps divide the error by about four (a first-order solver: by two)."""

    def error(n_steps):
        return (solve(gaussian(0.0, 1.0), n_steps) - solve(gaussian(0.0, 1.0), 1280)).abs().mean()

    assert error(20) / error(40) > 2.8


def test_last_levels_are_extrapolated_to_none():
    """Exactly, if the denoised action is linear in sigma^2; but an error of the denoiser is at most doubled."""

    def denoise(x, sigma):
        return 0.5 + 2 * sigma**2 + 0 * x

    assert th.allclose(dpm_solver_2m(denoise, th.randn(5, 2), SIGMAS), th.tensor(0.5))
    u = dpm_solver_2m(denoise, th.randn(5, 2), [20.0, 0.5, 0.49])
    assert th.allclose(u, th.tensor(0.5 + 2 * (2 * 0.49**2 - 0.5**2)))


@pytest.mark.parametrize(("share", "position"), [(0.3, 0.5), (0.1, 0.8), (0.2, 1.5)])
def test_solver_keeps_mode_shares(share, position):
    u = solve(two_gaussians(share, th.tensor([position], dtype=th.float64), 0.1))
    assert (u < 0).double().mean().item() == pytest.approx(share, abs=0.02)


def test_solver_draws_uniform_actions():
    actions = solve(exact("flat"), n_samples=300).tanh().flatten().sort().values
    # Wasserstein-1 distance to U(-1, 1), whose own standard deviation is 0.58
    assert (actions - ((th.arange(300) + 0.5) / 300 * 2 - 1)).abs().mean() < 0.03


def test_callback_is_called_at_every_level_with_the_denoised_actions():
    calls, latents, denoise = [], th.randn(5, 2), gaussian(0.2, 0.5)
    u = dpm_solver_2m(denoise, SIGMAS[0] * latents, SIGMAS, lambda *call: calls.append(call))
    assert th.equal(u, dpm_solver_2m(denoise, SIGMAS[0] * latents, SIGMAS))
    backwards = []
    invert(denoise, u, SIGMAS, lambda *call: backwards.append(call))
    assert [call[0] for call in calls] == [*range(8)] and [call[0] for call in backwards] == [*range(7, 0, -1)]
    for step, x, sigma, denoised in calls + backwards:
        assert sigma == SIGMAS[step] and th.equal(denoised, denoise(x, sigma))


@pytest.mark.parametrize("solver", [dpm_solver_2m, find_mode])
@pytest.mark.parametrize("factor", [1e6, -1e6])
def test_actions_are_bounded_whatever_the_denoiser_answers(solver, factor):
    u = solver(lambda x, sigma: factor * x, SIGMAS[0] * th.randn(64, 3), SIGMAS)
    assert u.isfinite().all() and u.abs().max() <= MAX_UNSQUASHED


@pytest.mark.parametrize("solver", [dpm_solver_2m, find_mode])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bad_sigma", SIGMAS[:-1:2])
def test_one_answer_that_is_not_finite_is_seen_in_the_action(solver, value, bad_sigma):
    """Of that row only."""

    def denoise(x, sigma):
        return th.where(th.arange(4).unsqueeze(1) == 2, value, x / 2) if sigma >= bad_sigma else x / 2

    assert solver(denoise, SIGMAS[0] * th.randn(4, 3), SIGMAS).isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("case", [gaussian(0.2, 0.3), exact("flat"), exact("linear"), exact("two modes")])
def test_backwards_and_forwards(case):
    """Eight steps bring latents nearly back, many exactly."""

    def error(n_steps):
        sigmas, latents = NOISE.sampling(n_steps), th.linspace(-2, 2, 9, dtype=th.float64).unsqueeze(1)
        return (invert(case, dpm_solver_2m(case, sigmas[0] * latents, sigmas), sigmas) - latents).abs().mean()

    assert error(8) < 0.15 and error(60) < 0.03


@pytest.mark.parametrize("std", [0.06, 0.3, 2.0])
def test_latents_of_given_actions(std):
    """Of a Gaussian policy they are known; also if it is hardly wider than the lowest noise level."""
    latents = th.linspace(-2, 2, 8, dtype=th.float64).unsqueeze(1)
    ratio = invert(gaussian(0.2, std), 0.2 + std * latents, NOISE.sampling(100)) / latents
    # The step from sigma_broad to sigma_max takes the policy for narrow
    assert (ratio - 1).abs().max() < 0.03 + (std / NOISE.sigma_broad) ** 2 / 2


def modes_of(denoise, latents, n_steps=8, **kwargs):
    """What ``find_mode`` answers, and the levels at which it asks."""
    sigmas, seen = NOISE.sampling(n_steps), []
    return find_mode(lambda x, sigma: seen.append(sigma) or denoise(x, sigma), sigmas[0] * latents, sigmas, **kwargs), seen


@pytest.mark.parametrize("n_steps", [3, 4, 8, 50])
@pytest.mark.parametrize(("sigma_mode", "n_shifts"), [(0.25, 5), (0.1, 2), (0.02, 1)])
def test_modes_are_looked_for_at_the_width_or_at_a_level_just_below(n_steps, sigma_mode, n_shifts):
    _, seen = modes_of(gaussian(0.0, 0.5), th.zeros(1, 1), n_steps, sigma_mode=sigma_mode, n_shifts=n_shifts)
    levels = NOISE.sampling(n_steps)
    above = [sigma for sigma in levels if sigma > sigma_mode]
    last = seen[len(above)]
    assert last == sigma_mode or (last in levels and 0.9 * sigma_mode < last <= sigma_mode)
    rest = [sigma for sigma in levels if sigma < last]
    assert seen == above + [last] * (n_shifts + 1) + ([last, *rest] if rest else [])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.9), (0.3, 0.1), (-1.5, 0.3)])
def test_mode_of_a_gaussian(mean, std):
    """
    Each of the four calls at the level keeps a fraction of the distance from the mean, that of the denoiser, and the rest of
    the ODE another.
    """
    latents = th.tensor([[-1.0], [0.0], [0.5]], dtype=th.float64)
    modes, _ = modes_of(gaussian(mean, std), latents, n_steps=50)
    level = next(sigma for sigma in NOISE.sampling(50) if sigma <= 0.25)
    fraction = std**2 / (std**2 + level**2)
    expected = mean + latents * std * fraction**4
    assert (modes - expected).abs().max() < 0.1 * std * fraction**3  # the errors of the solver


@pytest.mark.parametrize("std", [0.05, 0.3, 0.9, 2.0])
def test_deterministic_action_of_one_mode_is_near_its_mean(std):
    modes, _ = modes_of(gaussian(0.4, std), mode_latent(1).unsqueeze(0))
    assert abs(modes.item() - 0.4) < 0.1 * std


@pytest.mark.parametrize("action_dim", [1, 2, 6])
def test_deterministic_action_of_two_symmetric_modes_is_one_of_them(action_dim):
    center, std = th.full((action_dim,), 0.6), 0.15
    modes, _ = modes_of(two_gaussians(0.5, center, std), mode_latent(action_dim).unsqueeze(0))
    assert min((modes - center).norm(), (modes + center).norm()) < 0.5 * std


@pytest.mark.parametrize("energy", quadrature.ENERGIES)
def test_modes_are_denser_than_draws_and_not_between_two(energy):
    modes, _ = modes_of(exact(energy), even_latents(200))
    highest = quadrature.log_prob(energy, quadrature.GRID.unsqueeze(1)).max()
    losses = [highest - quadrature.log_prob(energy, u).mean() for u in (modes, solve(exact(energy), 8, 200))]
    assert losses[0] < 0.6 * losses[1]
    if energy == "two modes":
        # Near 0.6 and -0.5 (the tanh shifts them), but for latents next to where one mode ends and the other begins
        assert ((modes.tanh() - 0.6).abs() < 0.15).logical_or((modes.tanh() + 0.5).abs() < 0.15).double().mean() >= 0.99


@pytest.mark.parametrize("action_dim", [1, 2, 6, 17, 100])
def test_search_starts_near_the_middle_and_to_one_side_of_it_in_every_dimension(action_dim):
    latent = mode_latent(action_dim)
    assert th.equal(latent, mode_latent(action_dim))
    assert latent.norm().item() == pytest.approx(0.1) and mode_latent(action_dim, 2.0).norm().item() == pytest.approx(2.0)
    sizes = latent.abs() * math.sqrt(action_dim) / latent.norm()
    assert sizes.min() > 0.6 and sizes.max() < 1.4
    assert len(np.unique(sizes)) == action_dim
    if action_dim > 1:
        assert latent.min() < 0 < latent.max()
