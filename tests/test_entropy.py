"""Log-densities along the probability-flow ODE, against closed forms and quadrature: exact denoisers, no network."""

import math

import pytest
import quadrature
import torch as th

from sb3_dqs.density import TRACE_STEP, flow_log_density, random_signs, trace_steps, with_traces
from sb3_dqs.noise import SIGMA_BROAD, SIGMA_MAX, SIGMA_MIN, sampling_levels
from sb3_dqs.solvers import solve_forward_ode, solve_reverse_ode

N_STANDARD_ERRORS = 4
MEAN, STD = 0.2, 0.3


def gaussian_log_density(u):
    return (-((u - MEAN) ** 2) / (2 * STD**2) - math.log(STD * math.sqrt(2 * math.pi))).sum(dim=-1)


def gaussian(x, sigma):
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


# name: (denoiser, log-density, entropy of one dimension), of unsquashed actions
CASES = {
    "gaussian": (gaussian, gaussian_log_density, 0.5 * math.log(2 * math.pi * math.e) + math.log(STD)),
    **{
        energy: (
            lambda x, sigma, energy=energy: quadrature.denoise(energy, x, th.tensor(sigma)),
            lambda u, energy=energy: quadrature.log_prob(energy, u.double()),
            quadrature.entropy(energy),
        )
        for energy in quadrature.ENERGIES
    },
}


def trace(denoise, n_levels, steps, like):
    levels = sampling_levels(n_levels)
    return levels, *with_traces(lambda x, step: denoise(x, levels[step]), random_signs(like), levels, steps)


def test_quadrature_against_closed_forms():
    """The entropy of a uniform action is log 2, that of the unsquashed one larger by -E[log(1 - a^2)] = 2 - 2 log 2."""
    assert quadrature.entropy("flat") == pytest.approx(2 - math.log(2), abs=1e-6)
    u = th.tensor([[-2.0], [0.5]], dtype=th.float64)
    exact = 3 * th.tanh(u[:, 0]) - math.log(2 * math.sinh(3) / 3) + (1 - th.tanh(u[:, 0]) ** 2).log()
    assert th.allclose(quadrature.log_prob("linear", u), exact)
    draws = th.tanh(quadrature.sample("linear", 20_000))
    assert draws.mean().item() == pytest.approx(1 / math.tanh(3) - 1 / 3, abs=N_STANDARD_ERRORS * 0.32 / math.sqrt(20_000))


@pytest.mark.parametrize(("n_levels", "expected"), [(3, [1, 2]), (4, [1, 3]), (8, [1, 3, 5, 7]), (9, [1, 3, 5, 7, 8])])
def test_steps_of_the_traces(n_levels, expected):
    assert trace_steps(n_levels) == expected


@pytest.mark.parametrize("action_dim", [1, 3])
def test_traces_of_a_linear_denoiser(action_dim):
    """With any shape of x; in one dimension, or if the matrix is diagonal, without noise."""
    matrix = th.randn(action_dim, action_dim, dtype=th.float64)
    x = th.randn(20_000, 2, action_dim, dtype=th.float64)
    for factor in (matrix, matrix.diag().diag()):
        denoise, traces = with_traces(lambda x, step, factor=factor: x @ factor, random_signs(x), [2.0, 0.5], [1])
        assert th.equal(denoise(x, 0), x @ factor) and th.allclose(denoise(x, 1), x @ factor)
        assert list(traces) == [1] and traces[1].shape == x.shape[:2]
        noise = 1e-9 + (N_STANDARD_ERRORS * traces[1].std() / math.sqrt(40_000)).item()
        assert traces[1].mean().item() == pytest.approx(matrix.trace().item(), abs=noise)
    assert traces[1].std() < 1e-9


@pytest.mark.parametrize("action_dim", [1, 3])
def test_density_of_a_gaussian_with_one_level(action_dim):
    """What lies above and below the levels: there the integrals are known."""
    trace = action_dim * STD**2 / (STD**2 + 0.05**2)
    latents = th.randn(5, action_dim)
    log_density = flow_log_density(latents, {1: th.full((5,), trace)}, [20.0, 0.05])
    assert log_density.shape == (5,)
    above = -(latents.pow(2).sum(dim=1) + action_dim * math.log(2 * math.pi)) / 2 - action_dim * math.log(0.05)
    top, bottom = -trace * (1 - (0.05 / SIGMA_MAX) ** 2) / 2, (action_dim - trace) / 2
    assert th.allclose(log_density, above + top + bottom)


def densities_of_draws(case, n_levels, steps, action_dim, n):
    """Those estimated, and the exact ones."""
    denoise, exact, _ = CASES[case]
    latents = th.randn(n, action_dim, dtype=th.float64)
    levels, traced, traces = trace(denoise, n_levels, steps, latents)
    unsquashed = solve_reverse_ode(traced, latents, levels)
    return flow_log_density(latents, traces, levels), exact(unsquashed)


@pytest.mark.parametrize("case", CASES)
def test_density_of_many_steps_is_exact_at_every_action(case):
    """Up to the noise below ``SIGMA_MIN``, which the sampler does not undo."""
    n_levels = 60
    estimate, exact = densities_of_draws(case, n_levels, range(1, n_levels), 1, 500)
    assert (estimate - exact).abs().median() < 0.05


# Measured with 20,000 draws at 8 levels, in nats: 0.02 or less for all but the two modes, and there 0.13
@pytest.mark.parametrize(("case", "bound"), [("gaussian", 0.05), ("flat", 0.05), ("linear", 0.05), ("two modes", 0.2)])
@pytest.mark.parametrize("action_dim", [1, 3])
def test_entropy_of_the_default_sampler(case, bound, action_dim):
    for steps in (range(1, 8), trace_steps(8)):
        estimate, _ = densities_of_draws(case, 8, steps, action_dim, 2000)
        standard_error = estimate.std().item() / math.sqrt(len(estimate))
        tolerance = action_dim * (bound if len(steps) > 4 else 1.5 * bound) + N_STANDARD_ERRORS * standard_error
        assert -estimate.mean().item() == pytest.approx(action_dim * CASES[case][2], abs=tolerance)


@pytest.mark.parametrize("n_levels", [8, 40])
@pytest.mark.parametrize("case", CASES)
def test_density_of_given_actions(case, n_levels):
    """The sampler run backwards; also far from what the policy draws."""
    denoise, exact, _ = CASES[case]
    unsquashed = th.linspace(-1, 1.5, 9, dtype=th.float64).unsqueeze(1)
    levels, traced, traces = trace(denoise, n_levels, range(1, n_levels), unsquashed)
    latents = solve_forward_ode(traced, unsquashed, levels)
    errors = (flow_log_density(latents, traces, levels) - exact(unsquashed)).abs()
    assert errors.mean() < (0.25 if n_levels == 8 else 0.1)


@pytest.mark.parametrize("case", CASES)
def test_backwards_and_forwards(case):
    """Twice the steps bring them nearer, and many together."""

    def error(n_levels):
        levels = sampling_levels(n_levels)
        latents = th.linspace(-2, 2, 9, dtype=th.float64).unsqueeze(1)

        def denoise(x, step):
            return CASES[case][0](x, levels[step])

        return (solve_forward_ode(denoise, solve_reverse_ode(denoise, latents, levels), levels) - latents).abs().mean()

    assert error(8) < 0.15 and error(60) < 0.03


@pytest.mark.parametrize("std", [0.06, 0.3, 2.0])
def test_latents_of_given_actions(std):
    """Of a Gaussian policy they are known; also if it is hardly wider than the lowest noise level."""
    levels = sampling_levels(100)
    unsquashed = MEAN + std * th.linspace(-2, 2, 9, dtype=th.float64).unsqueeze(1)
    latents = solve_forward_ode(lambda x, step: MEAN + std**2 / (std**2 + levels[step] ** 2) * (x - MEAN), unsquashed, levels)
    # The jump from SIGMA_BROAD to SIGMA_MAX takes the policy for narrow
    ends = (std / SIGMA_BROAD) ** 2 / 2
    assert (latents / (unsquashed - MEAN) * std)[th.arange(9) != 4].sub(1).abs().max() < 0.03 + ends


@pytest.mark.parametrize("action_dim", [2, 6, 17])
def test_entropy_of_two_modes_in_opposite_corners(action_dim):
    """Correlated and far apart: the noise of the traces averages out."""
    position, std = 1.2, 0.1

    def denoise(x, sigma):
        total_variance = std**2 + sigma**2
        weight = th.sigmoid(2 * position * x.sum(dim=-1, keepdim=True) / total_variance)  # of the mode at +position
        return std**2 / total_variance * x + (2 * weight - 1) * position * sigma**2 / total_variance

    n_levels, latents = 60, th.randn(4000, action_dim)
    levels, traced, traces = trace(denoise, n_levels, range(1, n_levels), latents)
    solve_reverse_ode(traced, latents, levels)
    estimate = -flow_log_density(latents, traces, levels)
    entropy = math.log(2) + action_dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))
    standard_error = estimate.std().item() / math.sqrt(len(estimate))
    # Below SIGMA_MIN a Gaussian's density is not quite smooth
    ends = action_dim * (SIGMA_MIN / std) ** 4
    assert estimate.mean().item() == pytest.approx(entropy, abs=N_STANDARD_ERRORS * standard_error + ends + 0.05 * action_dim)


def test_step_of_the_differences_is_small():
    """Against a tenth of it: for the two modes, whose denoiser is the most bent."""
    x = th.linspace(-1, 1, 50, dtype=th.float64).unsqueeze(1)
    denoise = CASES["two modes"][0]
    for sigma in sampling_levels(8):
        usual, small = (
            (denoise(x + step * sigma, sigma) - denoise(x, sigma)) / (step * sigma) for step in (TRACE_STEP, TRACE_STEP / 10)
        )
        assert (usual - small).abs().mean() < 0.05
