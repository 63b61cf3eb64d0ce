"""A policy beside exp(Q / ent_coef) / Z, by grids and by importance sampling, against closed forms."""

import math

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_dqs import Diagnosis
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.density import log_det_tanh
from sb3_dqs.diagnostics import box_grid, compare
from sb3_dqs.diagnostics.importance_sampling import N_COMPONENTS, ProposalMixture, importance_sample, temper
from sb3_dqs.diagnostics.metrics import grid_entropy, weighted_moments

EQUAL = th.full((256,), -math.log(256), dtype=th.float64)
NORMAL_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
WIDTH = 0.1


def unsquash(actions: th.Tensor) -> th.Tensor:
    return th.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))


def normal_policy(dim: int, mean: float, std: float, n: int = 256) -> th.Tensor:
    """Unsquashed actions of a policy that is normal in the scaled actions."""
    return unsquash(mean + std * th.randn(n, dim, dtype=th.float64))


def linear(slope):
    """Q / ent_coef, and per dimension mean, standard deviation and entropy."""
    mean = 1 / math.tanh(slope) - 1 / slope
    std = math.sqrt(1 / slope**2 - 1 / math.sinh(slope) ** 2)
    entropy = math.log(2 * math.sinh(slope) / slope) - slope * mean
    return (lambda actions: slope * actions.sum(dim=-1)), mean, std, entropy


def linear_policy(dim, slope):
    """Exact draws, by inversion."""
    low, high = math.exp(-slope), math.exp(slope)
    return unsquash((low + th.rand(256, dim, dtype=th.float64) * (high - low)).log() / slope)


def well(center, width):
    """A normal distribution; the box cuts off less than 1e-6 where these tests use it."""
    entropy = NORMAL_ENTROPY + math.log(width)
    return (lambda actions: -((actions - center) ** 2).sum(dim=-1) / (2 * width**2)), center, width, entropy


FLAT = (lambda actions: 0 * actions.sum(dim=-1)), 0.0, 1 / math.sqrt(3), math.log(2)


def two_modes(actions):
    """Equal normals around 0.5 and -0.5 in the first dimension; uniform in the others."""
    return th.logaddexp(*(-((actions[..., 0] - mode) ** 2) / (2 * WIDTH**2) for mode in (0.5, -0.5)))


def two_modes_policy(dim, share=0.5, width=WIDTH):
    signs = th.where(th.rand(256, 1) < share, 1.0, -1.0).double()
    others = 2 * th.rand(256, dim - 1, dtype=th.float64) - 1
    return unsquash(th.cat([0.5 * signs + width * th.randn(256, 1, dtype=th.float64), others], dim=1))


def over_states(tempered_q, policy, entropy=0.0, n_states=8, **kwargs):
    """Eight states alike, at which ``policy()`` draws anew."""
    return Diagnosis.of([compare(tempered_q, policy(), th.tensor(entropy), **kwargs) for _ in range(n_states)])


@pytest.mark.parametrize("dim", [1, 2, 3, 6, 17])
@pytest.mark.parametrize(
    ("target", "policy_mean", "policy_std", "min_ess"),
    [
        (FLAT, 0.0, 0.5, 0.05),
        (linear(2.0), 0.0, 0.1, 0.05),
        (linear(20.0), 0.0, 0.5, 0.005),  # in a corner
        (well(0.2, 0.1), 0.2, 0.1, 0.05),
        # Two standard deviations away in every dimension; twice, and a fifth, as broad; thirty standard deviations away
        (well(0.2, 0.1), 0.0, 0.1, 0.05),
        (well(0.2, 0.1), 0.1, 0.2, 0.05),
        (well(0.2, 0.1), 0.1, 0.02, 0.05),
        (well(-0.4, 0.03), 0.5, 0.3, 0.005),
    ],
)
def test_of_wrong_policies(dim, target, policy_mean, policy_std, min_ess):
    tempered_q, mean, std, entropy = target
    result = over_states(tempered_q, lambda: normal_policy(dim, policy_mean, policy_std), n_states=1)
    # Of importance sampling: the error is a root mean square over the dimensions, which here are alike
    error = 1e-3 if dim <= 2 else 5 * result.mean_errors[0]
    ess = math.inf if dim <= 2 else result.ess * 4096
    assert np.abs(result.boltzmann_means - mean).max() < error
    np.testing.assert_allclose(result.boltzmann_stds, std, rtol=6 / math.sqrt(ess) + 5e-3)
    # The energy varies by sqrt(dim / 2) for a well, by sqrt(dim) in a corner and less for the others
    assert result.boltzmann_entropies[0] == pytest.approx(dim * entropy, abs=5 * math.sqrt((dim + 1) / ess) + 1e-2)
    assert (result.ess is None and result.mean_errors[0] == 0) if dim <= 2 else result.ess > min_ess
    if dim > 2:  # not larger than the standard error of as many draws as the effective sample size, by much
        assert result.mean_errors[0] < 3 * std / math.sqrt(ess)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_of_exact_policies(dim):
    """The distance of one state scatters by 0.35, the mean over 8 by 0.12; the mean gap is a standard error."""
    tempered_q, _, std, entropy = linear(2.0)
    result = over_states(tempered_q, lambda: linear_policy(dim, 2.0), dim * entropy)
    assert result.distance is None if dim == 6 else result.distance == pytest.approx(1, abs=0.5)
    assert result.entropy_gap == pytest.approx(0, abs=0.05 if dim == 6 else 1e-3)
    assert result.mean_gap == pytest.approx(std / math.sqrt(256), rel=0.6)
    assert result.spread_ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dim", [1, 2])
def test_distance_notices_lost_modes_wrong_shares_and_widths(dim):
    entropy = NORMAL_ENTROPY + math.log(WIDTH) + (dim - 1) * math.log(2)
    lost = over_states(two_modes, lambda: two_modes_policy(dim, share=1.0), entropy)
    assert lost.entropy_gap == pytest.approx(-math.log(2), abs=1e-3)
    assert lost.mean_gap == pytest.approx(0.5 / math.sqrt(dim), abs=0.05)
    shares, right = (over_states(two_modes, lambda share=share: two_modes_policy(dim, share)) for share in (0.7, 0.5))
    assert lost.distance > 5 > 2 * right.distance and shares.distance > 1.5 * right.distance
    if dim == 1:
        narrow = over_states(two_modes, lambda: th.cat([two_modes_policy(1, width=WIDTH / 2) for _ in range(16)]))
        assert narrow.distance > 1.5


def test_a_finer_grid_resolves_a_narrower_density():
    tempered_q, _, width, _ = well(0.3, 0.002)
    coarse, fine = (compare(tempered_q, normal_policy(2, 0, 0.1), th.tensor(0.0), n)["boltzmann_stds"] for n in (128, 1500))
    assert fine.tolist() == pytest.approx([width] * 2, rel=1e-3)
    assert coarse.max() < width / 2


def test_more_candidates_are_more_accurate():
    tempered_q, *_ = well(0.3, 0.1)
    small, large = (compare(tempered_q, normal_policy(6, 0.3, 0.1), th.tensor(0.0), None, n) for n in (500, 20_000))
    assert large["mean_errors"] < small["mean_errors"] / 3


def test_scalars_of_known_means_and_spreads():
    """Root mean squares over the dimensions, and components along a direction."""
    state = {
        "policy_means": th.tensor([0.3, 0.3, 0.3, 0.0]),
        "policy_stds": th.tensor([0.1, 0.1, 0.1, 0.2]),
        "policy_entropies": th.tensor(1.0),
        "boltzmann_means": th.tensor([0.3, 0.3, 0.3, 0.3]),
        "boltzmann_stds": th.full((4,), 0.1),
        "boltzmann_entropies": th.tensor(3.0),
        "mean_errors": th.tensor(0.01),
        "ess_shares": th.tensor(0.5),
    }
    result = Diagnosis.of([state, state])
    assert result.scalars() == pytest.approx(
        {
            "boltzmann_mean": 0.6,
            "boltzmann_mean_error": 0.01,
            "policy_mean": 0.45,
            "boltzmann_std": 0.1,
            "policy_std": math.sqrt(0.07 / 4),
            "ess": 0.5,
            "mean_gap": 0.15,
            "spread_ratio": math.sqrt(7 / 4),
            "entropy_gap": -2.0,
        }
    )
    along = result.scalars(np.array([[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, -2.0, 0.0]]))
    assert (along["boltzmann_mean"], along["policy_mean"]) == pytest.approx((0.0, -0.15))
    assert "entropy_gap -2" in str(result) and "(2 states)" in str(result)


class TestImportanceSampling:
    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_proposals_have_the_density_that_is_claimed(self, dim):
        """The mean of f / q over draws from q is the integral of f; f / q is bounded by the uniform share."""
        u = th.cat([normal_policy(dim, 0.9, 0.05, 128), normal_policy(dim, -0.3, 0.2, 128)])
        proposal = ProposalMixture(u, EQUAL, u[::4])
        draws = proposal.sample(60_000)
        actions = th.tanh(draws)
        weights = th.exp(log_det_tanh(draws) - proposal.log_density(draws))
        assert weights.max() <= N_COMPONENTS * 2**dim * 1.0001
        for f, integral in (
            (th.ones(len(draws)), 2**dim),
            ((actions[:, 0] > 0.8), 0.1 * 2**dim),
            ((actions + 0.3).abs().amax(dim=1) < 0.3, 0.6**dim),
        ):
            values = f.double() * weights
            assert values.mean().item() == pytest.approx(integral, abs=5 * values.std().item() / math.sqrt(len(draws)))

    def test_correlated_dimensions(self):
        """Seven times as broad along the diagonal as across, and a policy that knows nothing of it."""
        dim, across, along = 6, 0.05, 0.35
        unit = th.full((dim, 1), 1 / math.sqrt(dim), dtype=th.float64)
        covariance = across**2 * th.eye(dim, dtype=th.float64) + (along**2 - across**2) * unit @ unit.T
        precision = th.linalg.inv(covariance)

        def tempered_q(actions):
            return -((actions @ precision) * actions).sum(dim=1) / 2

        actions, log_weights, entropy = importance_sample(tempered_q, normal_policy(dim, 0.1, 0.1))
        ess = effective_sample_size(log_weights).item()
        assert ess / len(actions) > 0.1
        _, std, _ = weighted_moments(actions @ unit, log_weights)
        assert std.item() == pytest.approx(along, rel=5 / math.sqrt(ess))
        expected = dim * NORMAL_ENTROPY + 0.5 * th.logdet(covariance).item()
        assert entropy.item() == pytest.approx(expected, abs=5 * math.sqrt((dim / 2 + 1) / ess))

    def test_of_a_network_against_a_grid(self):
        """A critic with many peaks, and a policy beside them; the standard error is that of repeated estimates."""
        q_net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).double()

        def tempered_q(actions):
            with th.no_grad():
                return 60 * q_net(actions).squeeze(1)

        grid = box_grid(3, 64, dtype=th.float64)
        log_probs = th.log_softmax(tempered_q(grid), dim=0)
        exact_mean, exact_std, _ = weighted_moments(grid, log_probs)
        assert exact_std.min() > 0.02  # the grid resolves it
        scores, entropies = [], []
        for _ in range(20):
            actions, log_weights, entropy = importance_sample(tempered_q, normal_policy(3, 0.0, 0.05))
            mean, _, error = weighted_moments(actions, log_weights)
            scores.append((mean - exact_mean) / error)
            entropies.append(entropy)
        assert th.stack(scores).abs().max() < 5
        # Sixty numbers, three each of one estimate; equally many draws per component make the errors smaller
        assert 0.5 < th.stack(scores).pow(2).mean().sqrt() < 1.5
        scatter = th.stack(entropies).std().item() / math.sqrt(20)
        assert th.stack(entropies).mean().item() == pytest.approx(grid_entropy(log_probs, 3).item(), abs=5 * scatter + 1e-3)

    def test_without_rounds_the_proposal_stays_at_the_policy(self):
        tempered_q, *_ = well(0.2, 0.05)
        u = normal_policy(6, -0.2, 0.05)
        weights = [importance_sample(tempered_q, u, 4096, max_rounds)[1] for max_rounds in (0, 20)]
        assert effective_sample_size(weights[0]) < 40 < 400 < effective_sample_size(weights[1])

    @pytest.mark.parametrize("policy_share", [0.5, 0.9])
    def test_of_two_modes(self, policy_share):
        """Of equal weight, in the corners of a diagonal of three dimensions; the policy may have wrong shares."""
        centers = th.where(th.rand(256, 1) < policy_share, 0.5, -0.5)

        def tempered_q(actions):
            return th.logaddexp(*(-((actions - mode) ** 2).sum(dim=1) / (2 * WIDTH**2) for mode in (0.5, -0.5)))

        actions, log_weights, entropy = importance_sample(tempered_q, unsquash(centers + WIDTH * th.randn(256, 3).double()))
        share, ess = log_weights.exp()[actions[:, 0] > 0].sum().item(), effective_sample_size(log_weights).item()
        assert ess > 200 and share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(ess))
        expected = 3 * (NORMAL_ENTROPY + math.log(WIDTH)) + math.log(2)
        assert entropy.item() == pytest.approx(expected, abs=5 * math.sqrt(3 / ess))

    @pytest.mark.parametrize("min_ess", [2, 50, 400])
    def test_temper(self, min_ess):
        log_ratios = 200 * th.randn(1000, dtype=th.float64)
        log_weights, is_enough = temper(log_ratios, min_ess)
        assert not is_enough
        assert effective_sample_size(log_weights).item() == pytest.approx(min_ess, rel=1e-3)
        log_weights, is_enough = temper(log_ratios / 1e5, min_ess)
        assert is_enough and th.equal(log_weights, th.log_softmax(log_ratios / 1e5, dim=0))
