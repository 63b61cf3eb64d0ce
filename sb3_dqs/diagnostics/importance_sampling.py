"""Adaptive importance sampling of ``exp(Q / ent_coef) / Z`` at one state, for more action dimensions than a grid can have."""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.density import log_det_tanh

# Q / ent_coef at one state: from actions in [-1, 1], shape (n, action_dim), to shape (n,)
TemperedQ = Callable[[th.Tensor], th.Tensor]

N_COMPONENTS = 4
LOGISTIC_SCALE = math.sqrt(3) / math.pi  # of unit variance
KERNEL_WIDTH = 1 / 2  # in standard deviations of the points: modes are narrower than all of them together
MIN_STD = 0.02  # added in quadrature to the standard deviations of the points


class ProposalMixture:
    """
    Distribution of unsquashed actions u: a mixture, with equal shares, of

    - that of actions ``tanh(u)`` uniform on the box, so that no weight is large where the other components are absent,
    - a normal distribution with the mean and covariance of weighted points,
    - logistic distributions with the same mean and covariance, whose tails are those of a density of actions that is finite
      and positive at the bounds,
    - normal kernels around centres, for several modes; their covariance is that of the points, times ``KERNEL_WIDTH**2``.

    With few effective points the covariance is uncertain: its off-diagonal part is multiplied by
    ``ess / (ess + action_dim)``.

    :param points: unsquashed actions, shape (n, action_dim)
    :param log_weights: normalised log-weights of the points, shape (n,)
    :param centers: centres of the kernels, unsquashed actions, shape (n_centers, action_dim)
    """

    def __init__(self, points: th.Tensor, log_weights: th.Tensor, centers: th.Tensor):
        dim, weights, ess = points.shape[1], log_weights.exp(), effective_sample_size(log_weights)
        self.mean = weights @ points
        covariance = (weights * (points - self.mean).T) @ (points - self.mean)
        covariance = (ess * covariance + dim * covariance.diagonal().diag()) / (ess + dim)
        self.scale = th.linalg.cholesky(covariance + MIN_STD**2 * th.eye(dim).to(covariance))
        self.centers = self._whiten(centers)

    def _whiten(self, u: th.Tensor) -> th.Tensor:
        return th.linalg.solve_triangular(self.scale, (u - self.mean).T, upper=False).T

    def sample(self, n_samples: int) -> th.Tensor:
        """
        Draws, equally many from each component.

        :param n_samples: number of draws, rounded up to a multiple of the number of components
        :return: unsquashed actions, shape (n_samples, action_dim)
        """
        shape = (math.ceil(n_samples / N_COMPONENTS), len(self.mean))
        uniform, logistic = th.rand(2, *shape).to(self.mean).logit(eps=1e-12)
        normal, kernels = th.randn(2, *shape).to(self.mean)
        kernels = self.centers[th.randint(len(self.centers), shape[:1])] + KERNEL_WIDTH * kernels
        whitened = th.cat([normal, LOGISTIC_SCALE * logistic, kernels])
        return th.cat([uniform / 2, self.mean + whitened @ self.scale.T])

    def log_density(self, u: th.Tensor) -> th.Tensor:
        """
        Log-density of unsquashed actions.

        :param u: unsquashed actions, shape (n, action_dim)
        :return: nats, shape (n,)
        """
        whitened, dim = self._whiten(u), len(self.mean)
        # Not by a matrix product, which loses the digits of small distances
        distances = th.cdist(whitened, self.centers, compute_mode="donot_use_mm_for_euclid_dist") / KERNEL_WIDTH
        log_kernels = th.logsumexp(-(distances**2) / 2, dim=1) - math.log(len(self.centers)) - dim * math.log(KERNEL_WIDTH)
        log_normals = th.stack([-(whitened**2).sum(dim=1) / 2, log_kernels]) - dim / 2 * math.log(2 * math.pi)
        log_logistic = log_det_tanh(whitened / (2 * LOGISTIC_SCALE)) - dim * math.log(4 * LOGISTIC_SCALE)
        log_fitted = th.cat([log_normals, log_logistic.unsqueeze(0)]) - self.scale.diagonal().log().sum()
        log_uniform = log_det_tanh(u) - dim * math.log(2)
        return th.logsumexp(th.cat([log_fitted, log_uniform.unsqueeze(0)]), dim=0) - math.log(N_COMPONENTS)


def importance_sample(
    tempered_q: TemperedQ,
    u: th.Tensor,
    n_candidates: int = 4096,
    max_rounds: int = 20,
    round_size: int = 2048,
    min_ess: float = 200,
    n_centers: int = 128,
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    Self-normalised importance sampling of ``exp(tempered_q) / Z`` on the box (Owen 2013, "Monte Carlo theory, methods and
    examples", chapter 9), with a proposal that moves to where the distribution is, if the policy is elsewhere (population
    Monte Carlo, Cappé et al. 2004, https://doi.org/10.1198/106186004X12803). The first proposal is fitted to the policy's
    actions. While the effective sample size of a round is below ``min_ess``, the next proposal is fitted to its candidates;
    their weights are taken to the largest power that gives that effective sample size (as the transformed weights of Koblents
    and Míguez 2012, https://arxiv.org/abs/1208.5600). The result comes from the last proposal alone.

    :param tempered_q: Q / ent_coef
    :param u: the policy's unsquashed actions at the state, at least two, shape (n, action_dim)
    :param n_candidates: number of candidates, rounded up to a multiple of the number of components
    :param max_rounds: largest number of rounds before; 0 for a proposal from the policy alone
    :param round_size: number of candidates per round
    :param min_ess: effective sample size, below ``round_size``
    :param n_centers: number of kernels; after the first round, half are at the policy's actions
    :return: actions in [-1, 1], shape (n_candidates, action_dim), their normalised log-weights, shape (n_candidates,), and
        the estimate of the differential entropy, ``log Z - E[tempered_q]``, in nats, 0-d
    """

    def draw(n: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        candidates = proposal.sample(n)
        values = tempered_q(th.tanh(candidates))
        return candidates, values, values + log_det_tanh(candidates) - proposal.log_density(candidates)

    proposal = ProposalMixture(u, u.new_full((len(u),), -math.log(len(u))), u[:n_centers])
    for _ in range(max_rounds):
        candidates, _, log_ratios = draw(round_size)
        log_weights, is_enough = temper(log_ratios, min_ess)
        if is_enough:
            break
        chosen = candidates[th.multinomial(log_weights.exp(), n_centers // 2, replacement=True)]
        proposal = ProposalMixture(candidates, log_weights, th.cat([u[: n_centers // 2], chosen]))
    candidates, values, log_ratios = draw(n_candidates)
    log_weights = th.log_softmax(log_ratios, dim=0)
    log_z = th.logsumexp(log_ratios, dim=0) - math.log(len(candidates))
    return th.tanh(candidates), log_weights, log_z - log_weights.exp() @ values


def temper(log_ratios: th.Tensor, min_ess: float) -> tuple[th.Tensor, bool]:
    """
    Importance weights to the largest power, of at most 1, at which their effective sample size is ``min_ess``, by bisection.

    :param log_ratios: log-weights, shape (n,)
    :param min_ess: below n
    :return: normalised log-weights, shape (n,), and whether the power is 1
    """
    low, high, power = 0.0, 1.0, 1.0
    for _ in range(30):
        log_weights = th.log_softmax(power * log_ratios, dim=0)
        if effective_sample_size(log_weights) < min_ess:
            high = power
        elif power == 1:
            return log_weights, True
        else:
            low = power
        power = (low + high) / 2
    return th.log_softmax(low * log_ratios, dim=0), False
