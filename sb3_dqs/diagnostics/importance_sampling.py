"""
Adaptive importance sampling of ``exp(Q / ent_coef) / Z`` at one state, for more action dimensions than a grid can have.
"""

import math
from collections.abc import Callable

import torch as th

from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.density import log_det_tanh

# Q / ent_coef at one state: from actions in [-1, 1], shape (n, action_dim), to shape (n,)
TemperedQ = Callable[[th.Tensor], th.Tensor]

# Scale of the logistic distribution of unit variance
LOGISTIC_SCALE = math.sqrt(3) / math.pi


class ProposalMixture:
    """
    Distribution of unsquashed actions u: a mixture, with equal shares, of

    - that of actions ``tanh(u)`` uniform on the box, so that no weight is large where the other components are absent,
    - a normal distribution with the mean and covariance of weighted points,
    - logistic distributions with the same mean and covariance, whose tails are those of a density of actions that is finite
      and positive at the bounds,
    - normal kernels around centres, for several modes; their covariance is that of the points, times a squared width.

    With few effective points the covariance is uncertain: its off-diagonal part is multiplied by
    ``ess / (ess + action_dim)``.

    :param points: unsquashed actions, shape (n, action_dim)
    :param log_weights: normalised log-weights of the points, shape (n,)
    :param centers: centres of the kernels, unsquashed actions, shape (n_centers, action_dim)
    :param kernel_widths: widths of the kernels, in standard deviations of the points
    :param min_std: added in quadrature to the standard deviations of the points
    """

    def __init__(
        self,
        points: th.Tensor,
        log_weights: th.Tensor,
        centers: th.Tensor,
        kernel_widths: tuple[float, ...] = (1.0, 1 / 4, 1 / 16),
        min_std: float = 0.02,
    ):
        self.kernel_widths = kernel_widths
        self.dim = points.shape[1]
        weights, ess = log_weights.exp(), effective_sample_size(log_weights)
        self.mean = weights @ points
        deviations = points - self.mean
        covariance = (weights * deviations.T) @ deviations
        variances = covariance.diagonal()
        covariance = (ess * covariance + self.dim * variances.diag()) / (ess + self.dim)
        self.scale = th.linalg.cholesky(covariance + min_std**2 * th.eye(self.dim).to(covariance))
        self.centers = self._whiten(centers)

    @property
    def n_components(self) -> int:
        return 3 + len(self.kernel_widths)

    def _whiten(self, u: th.Tensor) -> th.Tensor:
        return th.linalg.solve_triangular(self.scale, (u - self.mean).T, upper=False).T

    def sample(self, n_samples: int) -> th.Tensor:
        """
        Draws, equally many from each component.

        :param n_samples: number of draws, rounded up to a multiple of the number of components
        :return: unsquashed actions, shape (n_samples, action_dim)
        """
        shape = (math.ceil(n_samples / self.n_components), self.dim)
        uniform, logistic = th.rand(2, *shape).to(self.mean).logit(eps=1e-12)
        normal, *kernels = th.randn(self.n_components - 2, *shape).to(self.mean)
        for width, kernel in zip(self.kernel_widths, kernels, strict=True):
            kernel.mul_(width).add_(self.centers[th.randint(len(self.centers), shape[:1])])
        whitened = th.cat([normal, LOGISTIC_SCALE * logistic, *kernels])
        return th.cat([uniform / 2, self.mean + whitened @ self.scale.T])

    def log_density(self, u: th.Tensor) -> th.Tensor:
        """
        Log-density of unsquashed actions.

        :param u: unsquashed actions, shape (n, action_dim)
        :return: nats, shape (n,)
        """
        whitened = self._whiten(u)
        # Not by a matrix product, which loses the digits of small distances
        squares = th.cdist(whitened, self.centers, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        log_kernels = [
            th.logsumexp(-squares / (2 * width**2), dim=1) - self.dim * math.log(width) - math.log(len(self.centers))
            for width in self.kernel_widths
        ]
        log_logistic = log_det_tanh(whitened / (2 * LOGISTIC_SCALE)) - self.dim * math.log(4 * LOGISTIC_SCALE)
        log_normals = th.stack([-(whitened**2).sum(dim=1) / 2, *log_kernels]) - self.dim / 2 * math.log(2 * math.pi)
        log_fitted = th.cat([log_logistic.unsqueeze(0), log_normals]) - self.scale.diagonal().log().sum()
        log_uniform = log_det_tanh(u) - self.dim * math.log(2)
        return th.logsumexp(th.cat([log_uniform.unsqueeze(0), log_fitted]), dim=0) - math.log(self.n_components)


def importance_sample(
    tempered_q: TemperedQ,
    u: th.Tensor,
    n_candidates: int = 4096,
    max_rounds: int = 20,
    round_size: int = 2048,
    min_ess: float = 400,
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
        power = tempering_power(log_ratios, min_ess)
        if power == 1:
            break
        log_weights = th.log_softmax(power * log_ratios, dim=0)
        chosen = candidates[th.multinomial(log_weights.exp(), n_centers // 2, replacement=True)]
        proposal = ProposalMixture(candidates, log_weights, th.cat([u[: n_centers // 2], chosen]))
    candidates, values, log_ratios = draw(n_candidates)
    log_weights = th.log_softmax(log_ratios, dim=0)
    log_z = th.logsumexp(log_ratios, dim=0) - math.log(len(candidates))
    return th.tanh(candidates), log_weights, log_z - log_weights.exp() @ values


def tempering_power(log_ratios: th.Tensor, min_ess: float) -> float:
    """
    Largest power of importance weights, of at most 1, that has an effective sample size of at least ``min_ess``.

    :param log_ratios: log-weights, shape (n,)
    :param min_ess: below n
    :return: from 0 to 1; exact if 1, else by bisection
    """

    def is_enough(power: float) -> bool:
        return bool(effective_sample_size(th.log_softmax(power * log_ratios, dim=0)) >= min_ess)

    if is_enough(1):
        return 1
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low
