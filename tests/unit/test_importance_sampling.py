"""Importance sampling of exp(Q / ent_coef) / Z, with right and wrong policies, against closed forms and a grid."""

import math

import pytest
import torch as th
from scipy import stats
from torch import nn

from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.density import log_det_tanh
from sb3_dqs.diagnostics.importance_sampling import ProposalMixture, importance_sample, tempering_power
from sb3_dqs.diagnostics.metrics import box_grid, grid_entropy, weighted_mean_and_std, weighted_mean_error

EQUAL = th.full((256,), -math.log(256), dtype=th.float64)


def normal_policy(dim: int, mean: float, std: float) -> th.Tensor:
    """Unsquashed actions of a policy that is normal in the scaled actions."""
    return th.atanh((mean + std * th.randn(256, dim, dtype=th.float64)).clamp(-0.999, 0.999))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_proposals_have_the_density_that_is_claimed(dim):
    """The mean of f / q over draws from q is the integral of f; f / q is bounded by the uniform share."""
    u = th.cat([normal_policy(dim, 0.9, 0.05)[:128], normal_policy(dim, -0.3, 0.2)[128:]])
    proposal = ProposalMixture(u, EQUAL, u[::4])
    draws = proposal.sample(60_000)
    actions = th.tanh(draws)
    weights = th.exp(log_det_tanh(draws) - proposal.log_density(draws))
    assert weights.max() <= proposal.n_components * 2**dim * 1.0001
    for f, integral in (
        (th.ones(len(draws)), 2**dim),
        ((actions[:, 0] > 0.8), 0.1 * 2**dim),
        ((actions - th.tanh(u[128])).abs().amax(dim=1) < 0.1, 0.2**dim),
    ):
        values = f.double() * weights
        assert values.mean().item() == pytest.approx(integral, abs=5 * values.std().item() / math.sqrt(len(draws)))


def test_proposals_are_where_the_points_are():
    """Away from the uniform component: mean and covariance of the points, and kernels around the centres."""
    mixing = th.tensor([[0.3, 0.0], [0.2, 0.1]], dtype=th.float64)
    points = 0.5 + th.randn(256, 2, dtype=th.float64) @ mixing.T
    proposal = ProposalMixture(points, EQUAL, points[:1] * 0 + 3, kernel_widths=(0.01,))
    _, normal, logistic, kernel = proposal.sample(40_000).chunk(4)
    for draws in (normal, logistic):
        assert draws.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.1)  # of 256 points: 0.02
        assert th.cov(draws.T).flatten().tolist() == pytest.approx((mixing @ mixing.T).flatten().tolist(), rel=0.5)
    assert kernel.mean(dim=0).tolist() == pytest.approx([3, 3], abs=1e-3)
    assert (kernel.std(dim=0) / normal.std(dim=0)).tolist() == pytest.approx([0.01, 0.01], rel=0.05)


def linear(slope):
    mean = 1 / math.tanh(slope) - 1 / slope
    std = math.sqrt(1 / slope**2 - 1 / math.sinh(slope) ** 2)
    entropy = math.log(2 * math.sinh(slope) / slope) - slope * mean
    return (lambda actions: slope * actions.sum(dim=-1)), mean, std, entropy


def well(center, width):
    """A normal distribution; the box cuts off less than 1e-6 where these tests use it."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * width**2)
    return (lambda actions: -((actions - center) ** 2).sum(dim=-1) / (2 * width**2)), center, width, entropy


FLAT = (lambda actions: 0 * actions.sum(dim=-1)), 0.0, 1 / math.sqrt(3), math.log(2)


@pytest.mark.parametrize("dim", [3, 6, 17])
@pytest.mark.parametrize(
    ("target", "policy_mean", "policy_std", "min_ess"),
    [
        (FLAT, 0.0, 0.5, 0.05),
        (linear(2.0), 0.0, 0.1, 0.05),
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
    actions, log_weights, estimate = importance_sample(tempered_q, normal_policy(dim, policy_mean, policy_std))
    assert actions.abs().max() <= 1
    assert log_weights.exp().sum().item() == pytest.approx(1)
    ess = effective_sample_size(log_weights).item()
    assert ess / len(actions) > min_ess
    # A z-score per dimension
    estimated_mean, estimated_std = weighted_mean_and_std(actions, log_weights)
    assert ((estimated_mean - mean).abs() < 5 * weighted_mean_error(actions, log_weights)).all()
    assert estimated_std.tolist() == pytest.approx([std] * dim, rel=6 / math.sqrt(ess))
    # The energy varies by sqrt(dim / 2) for a well and less for the others
    assert estimate.item() == pytest.approx(dim * entropy, abs=5 * math.sqrt((dim / 2 + 1) / ess))


def test_correlated_dimensions():
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
    _, std = weighted_mean_and_std(actions @ unit, log_weights)
    assert std.item() == pytest.approx(along, rel=5 / math.sqrt(ess))
    expected = dim / 2 * math.log(2 * math.pi * math.e) + 0.5 * th.logdet(covariance).item()
    assert entropy.item() == pytest.approx(expected, abs=5 * math.sqrt((dim / 2 + 1) / ess))


def test_of_a_network_against_a_grid():
    """A critic with many peaks, and a policy beside them; the standard error is that of repeated estimates."""
    q_net = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).double()

    def tempered_q(actions):
        with th.no_grad():
            return 60 * q_net(actions).squeeze(1)

    grid = box_grid(3, 64, dtype=th.float64)
    log_probs = th.log_softmax(tempered_q(grid), dim=0)
    mean, std = weighted_mean_and_std(grid, log_probs)
    assert std.min() > 0.02  # the grid resolves it
    results = [importance_sample(tempered_q, normal_policy(3, 0.0, 0.05)) for _ in range(20)]
    scores = th.stack(
        [
            (weighted_mean_and_std(actions, log_weights)[0] - mean) / weighted_mean_error(actions, log_weights)
            for actions, log_weights, _ in results
        ]
    )
    assert scores.abs().max() < 5
    # Sixty numbers, three each of one estimate; equally many draws per component make the errors smaller
    assert 0.5 < scores.pow(2).mean().sqrt() < 1.5
    entropies = th.stack([entropy for *_, entropy in results])
    expected = grid_entropy(log_probs, 3).item()
    assert entropies.mean().item() == pytest.approx(expected, abs=5 * entropies.std().item() / math.sqrt(20) + 1e-3)


def test_without_rounds_the_proposal_stays_at_the_policy():
    tempered_q, *_ = well(0.2, 0.05)
    u = normal_policy(6, -0.2, 0.05)
    ess = {
        max_rounds: effective_sample_size(importance_sample(tempered_q, u, 4096, max_rounds)[1]).item()
        for max_rounds in (0, 20)
    }
    assert ess[0] < 40 < 400 < ess[20]


def test_kernels_keep_two_modes():
    """The policy has both modes, of equal weight: so have the candidates."""
    centers = th.where(th.arange(256) % 2 == 0, 0.5, -0.5).unsqueeze(1)
    u = th.atanh(centers + 0.1 * th.randn(256, 4, dtype=th.float64))

    def tempered_q(actions):
        return th.logaddexp(*(-((actions - mode) ** 2).sum(dim=1) / (2 * 0.1**2) for mode in (0.5, -0.5)))

    actions, log_weights, entropy = importance_sample(tempered_q, u)
    share = log_weights.exp()[actions[:, 0] > 0].sum().item()
    ess = effective_sample_size(log_weights).item()
    assert share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(ess))
    expected = 4 * 0.5 * math.log(2 * math.pi * math.e * 0.1**2) + math.log(2)
    assert entropy.item() == pytest.approx(expected, abs=5 * math.sqrt(3 / ess))


@pytest.mark.parametrize("min_ess", [2, 50, 400])
def test_tempering_power(min_ess):
    log_ratios = 200 * th.randn(1000, dtype=th.float64)
    power = tempering_power(log_ratios, min_ess)
    assert 0 < power < 1
    assert effective_sample_size(th.log_softmax(power * log_ratios, dim=0)).item() == pytest.approx(min_ess, rel=1e-3)
    assert tempering_power(log_ratios / 1e5, min_ess) == 1


def test_well_is_a_truncated_normal():
    """What the closed forms of a well leave out."""
    exact = stats.truncnorm(-1.2 / 0.1, 0.8 / 0.1, loc=0.2, scale=0.1)
    assert exact.mean() == pytest.approx(0.2, abs=1e-6) and exact.std() == pytest.approx(0.1, abs=1e-6)
