"""
What the denoiser regresses on: estimators of ``E[u | x]`` under the Boltzmann distribution of the critic,
``pi(a|s) = exp(Q(s, a) / ent_coef) / Z(s)`` on the box [-1, 1]^d, of an unsquashed action u (``a = tanh(u)``) given its noisy
copy ``x = u + sigma * eps``: the mean of ``p(u|x) ~ pi(u|s) N(u; x, sigma^2)``.

An estimator of your own is a :class:`DenoiserTarget`; pass an instance to ``DQS(denoiser_target=...)``.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_dqs.critics import Energy
from sb3_dqs.density import log_det_tanh
from sb3_dqs.noise import c_out
from sb3_dqs.observations import select
from sb3_dqs.running_mean import RunningMean
from sb3_dqs.solvers import MAX_UNSQUASHED

LogDensity = Callable[[th.Tensor], th.Tensor]


@dataclass(frozen=True, eq=False)
class Draws:
    """
    Actions drawn from the policy, and their noisy copies, several per state.

    :param u: unsquashed actions, shape (n_states, n_draws, action_dim); or (n_states, 1, action_dim), where all noisy actions
        of a state are copies of one
    :param x: noisy actions ``u + sigma * eps``, shape (n_states, n_draws, action_dim)
    :param sigma: noise levels, shape (n_states, n_draws, 1)
    :param denoised: the denoiser's answers D(x, sigma), shape (n_states, n_draws, action_dim)
    :param std: standard deviation of the actor's Gaussian, shape (n_states, 1, action_dim)
    """

    u: th.Tensor
    x: th.Tensor
    sigma: th.Tensor
    denoised: th.Tensor
    std: th.Tensor

    def __getitem__(self, rows: slice) -> "Draws":
        """The draws of some of the states."""
        return Draws(self.u[rows], self.x[rows], self.sigma[rows], self.denoised[rows], self.std[rows])


class BoltzmannDensity:
    """
    Log-density of unsquashed actions under the Boltzmann distribution, up to a constant per state:
    ``log pi(u|s) = Q(s, tanh(u)) / ent_coef + log det d tanh(u)/du``. Calling it with u of shape (n_states, n, action_dim)
    gives shape (n_states, n), differentiable; indexing it gives the density of some of the states.

    :param energy: :meth:`sb3_dqs.critics.Critic.energy`
    :param obs: observations of n_states states
    :param ent_coef: temperature
    """

    def __init__(self, energy: Callable[[PyTorchObs], Energy], obs: PyTorchObs, ent_coef: th.Tensor | float):
        self.energy, self.obs, self.ent_coef = energy, obs, ent_coef
        self._values: Energy | None = None

    def __call__(self, u: th.Tensor) -> th.Tensor:
        if self._values is None:
            with th.no_grad():
                self._values = self.energy(self.obs)
        return self._values(th.tanh(u)) / self.ent_coef + log_det_tanh(u)

    def __getitem__(self, rows: slice) -> "BoltzmannDensity":
        return BoltzmannDensity(self.energy, select(self.obs, rows), self.ent_coef)


class DenoiserTarget(nn.Module):
    """
    An estimator of ``E[u | x]``. Its knobs are attributes; what it remembers from update to update are buffers, which are
    saved with the model.
    """

    @property
    def for_next_states(self) -> "DenoiserTarget | None":
        """
        The estimator at next states, where the critics' target has drawn one action per state, of which all noisy actions are
        copies. By default None: the actor learns from no next states.
        """
        return None

    def forward(self, density: BoltzmannDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Called in the update of the actor, without gradients, with the critic in evaluation mode.

        :param density: log-density of u, up to a constant per state
        :param draws: the draws x of which need a target
        :return: targets, shape (n_states, n_draws, action_dim), and scalars to log, by name
        """
        raise NotImplementedError


class PooledMean(DenoiserTarget):
    """
    ``E[u | x]`` by iterated sampling-importance-resampling (i-SIR; Andrieu, Lee and Vihola 2018,
    https://arxiv.org/abs/1312.6432) with one pool of candidates per state: the mean of candidates weighted by
    ``p(u|x) / q(u)``. Every noisy copy proposes some, from :func:`broad_proposal`, and all copies of the state use them
    all: copies with little noise propose near the policy's actions, copies with much noise propose everywhere. q is the
    mixture of these distributions (the balance heuristic of Veach and Guibas 1995,
    https://doi.org/10.1145/218380.218498). One more candidate is u itself.

    If u is distributed as pi, then u is a draw from p(u|x), and few samples hardly move the fixed point (not at all if
    candidates were drawn independently from the mixture; here each component gives its share).

    :param n_samples: number of values of the log-density per target: u and the others proposed, at least 2. Measured distances
        (two modes 1-D, four modes 2-D, critic 2-D) over that of two exact sets: 2.2, 3.1, 4.1 with 12; 1.5, 2.0, 3.6 with 16
        at 1.13 times the cost of a gradient step; 2.1, 1.4, 2.4 with 64
    :param prior_std: width of the proposals at high noise. Derived: uniform actions have 0.91 before the tanh;
        twice that reaches the corners of the box
    """

    def __init__(self, n_samples: int = 12, prior_std: float = 2.0):
        super().__init__()
        self.n_samples, self.prior_std = n_samples, prior_std

    def forward(self, density: LogDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        u, x, sigma = draws.u, draws.x, draws.sigma
        n_states, n_draws, action_dim = x.shape
        center, width = broad_proposal(x, sigma, self.prior_std)
        noise = th.randn(n_states, n_draws, self.n_samples - 1, action_dim, device=x.device)
        proposals = center.unsqueeze(2) + width.unsqueeze(2) * noise
        candidates = th.cat([u, proposals.flatten(1, 2)], dim=1)

        log_proposal = th.logsumexp(log_normal(candidates, center, width) - action_dim * width.log(), dim=1)
        log_weights = (density(candidates) - log_proposal).unsqueeze(1) + log_normal(candidates, x, sigma)
        if u.shape[1] > 1:  # of the draws only that of x itself is a draw from p(u|x)
            is_foreign = ~th.eye(n_draws, dtype=th.bool, device=x.device)
            log_weights[:, :, :n_draws].masked_fill_(is_foreign, -math.inf)
        log_weights = th.log_softmax(log_weights, dim=2)
        return log_weights.exp() @ candidates, {"ess": effective_sample_size(log_weights).mean()}


class GradientStep(DenoiserTarget):
    """
    One Newton step from u on the log-density of p(u|x):

        u + r^2 (grad log pi(u) + (x - u) / sigma^2),   1 / r^2 = 1 / sigma^2 + 1 / std^2,

    r being the width that p(u|x) has for a Gaussian policy. Where pi is that Gaussian, the step ends in E[u | x], without
    noise. Where the policy is the Boltzmann distribution, the mean of the step given x is zero for any number of modes, by
    Stein's identity (target score matching; De Bortoli et al. 2024, https://arxiv.org/abs/2402.08667), so that the mean of
    the targets is E[u | x].

    Averaged over states that a network cannot tell apart, means of p(u|x) make a policy as broad as all of them together;
    averaged gradients make it narrow, as in SAC. One gradient serves all noisy copies of an action.

    :param common_step: a step is shortened by the factor that would bring the gradients at the other draws of the state to
        this length on average, in units of r. Steep energies need a limit; this one leaves the mean of the steps zero, because
        the gradients at the other draws, given x, do not depend on u. With one action per state, the median over the states
        takes their place, on which a single u has little influence. With the median also for several actions per state, the
        distance of four modes 2-D was 8 to 12 instead of 3 to 4
    :param max_step: a step that is longer still is shortened to this, in units of r. A limit of 3 on single steps was active
        in 10 to 33 % of them and moved their mean by up to 0.2; 12 seldom binds
    """

    def __init__(self, common_step: float = 3.0, max_step: float = 12.0):
        super().__init__()
        self.common_step, self.max_step = common_step, max_step

    def forward(self, density: LogDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        u, x, sigma = draws.u, draws.x, draws.sigma
        n_draws = u.shape[1]
        _, gradient = value_and_gradient(density, u)
        width = c_out(sigma, draws.std)
        step = width * (gradient + (x - u) / sigma**2)
        squares = gradient.clamp(-1e15, 1e15).pow(2)  # finite
        if n_draws > 1:
            others = (squares.sum(dim=1, keepdim=True) - squares) / (n_draws - 1)
        else:
            others = squares.median(dim=0).values
        step = step * (self.common_step / (width**2 * others).sum(dim=2, keepdim=True).sqrt()).clamp(max=1)
        return u + width * step * (self.max_step / step.norm(dim=2, keepdim=True)).clamp(max=1), {}


class PosteriorMean(DenoiserTarget):
    """
    :class:`PooledMean` in some states and :class:`GradientStep` in the others: both are right at the Boltzmann distribution,
    so that their mixture hardly moves it, and which of the two does not depend on the mode. The gradient step follows a
    learning critic and sharpens the modes, but leaves their shares as they are. The pooled mean compares the modes, as long as
    it has candidates in them: with too few, the largest mode takes all.

    The share of the states that use the pooled mean is a product of two factors. One rises with the mean effective sample
    size, from 0 at ``too_few_samples`` to 1 at ``enough_samples``. The other rises with the noise of the gradient steps, which
    tells several modes from one, from ``min_pooled_share`` to ``max_pooled_share``. The noise is the mean square of their
    distance from the denoiser's answer, in units of its error: 1 on a reach task, 5 to 8 for two and four modes. Next states
    use gradient steps where the noise is low, and are not used where it is high.

    :param n_samples: see :class:`PooledMean`
    :param enough_samples: effective sample size, of at most ``n_draws * (n_samples - 1) + 1``. Measured errors of mode shares
        (four modes 6-D, critic 6-D, four modes 17-D): .12, .03, .12 with 4 and 3.5; .22, .06, .28 with 5 and 4; .08, .05, .51
        with 5 and 3; their spread from seed to seed is about .1
    :param too_few_samples: effective sample size, below ``enough_samples``; see there
    :param min_pooled_share: share of the states at low noise. Measured with the critic of a reach task frozen at an entropy
        gap of 0.55 nats to exp(Q / ent_coef), one run each: after 200, 500 and 800 updates it was 0.60, 0.31 and 0.28 with the
        pooled mean in all states, 0.31, 0.04 and 0.25 in none
    :param max_pooled_share: share of the states at high noise; the others tell the noise
    :param low_noise: noise of the gradient steps, between that of the reach task and that of several modes
    :param high_noise: noise of the gradient steps, above ``low_noise``; see there
    :param weighed_share: share of the states in which candidates are valued in any case, to know the effective sample size:
        the least that keeps its noise small, not measured
    :param update_rate: rate of both running means: a memory of 20 calls, not measured
    :param pooled: estimator of the first states, which must give "ess"; by default ``PooledMean(n_samples)``
    :param gradient: estimator of the other states and of next states, where ``u`` is one action per state; by default
        ``GradientStep()``
    """

    def __init__(
        self,
        n_samples: int = 12,
        enough_samples: float = 4.0,
        too_few_samples: float = 3.5,
        min_pooled_share: float = 0.25,
        max_pooled_share: float = 7 / 8,
        low_noise: float = 2.0,
        high_noise: float = 4.0,
        weighed_share: float = 1 / 8,
        update_rate: float = 0.05,
        pooled: DenoiserTarget | None = None,
        gradient: DenoiserTarget | None = None,
    ):
        super().__init__()
        if not too_few_samples < enough_samples:
            raise ValueError(f"`too_few_samples` must be below `enough_samples`={enough_samples}, got {too_few_samples}.")
        if not low_noise < high_noise:
            raise ValueError(f"`low_noise` must be below `high_noise`={high_noise}, got {low_noise}.")
        self.enough_samples, self.too_few_samples = enough_samples, too_few_samples
        self.min_pooled_share, self.max_pooled_share = min_pooled_share, max_pooled_share
        self.low_noise, self.high_noise = low_noise, high_noise
        self.weighed_share = weighed_share
        self.pooled = pooled or PooledMean(n_samples)
        self.gradient = gradient or GradientStep()
        self.mean_ess = RunningMean(enough_samples, update_rate)
        self.gradient_noise = RunningMean(low_noise, update_rate)

    @property
    def for_next_states(self) -> DenoiserTarget | None:
        return self.gradient if self._noise_level() < 0.5 else None

    def _noise_level(self) -> float:
        """From 0 at low noise to 1 at high noise, also where the noise is NaN: the loss names it."""
        return _ramp(float(self.gradient_noise.value), self.low_noise, self.high_noise)

    def count_pooled(self, n_states: int) -> int:
        """
        In how many states to use the pooled mean: not in all, so that the noise of the gradient steps stays known.

        :param n_states: number of states
        :return: number of states
        """
        share = self.min_pooled_share + (self.max_pooled_share - self.min_pooled_share) * self._noise_level()
        share = share * _ramp(float(self.mean_ess.value), self.too_few_samples, self.enough_samples)
        return min(round(n_states * share), n_states - 1)

    def forward(self, density: BoltzmannDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        n_states = len(draws.u)
        n_pooled = self.count_pooled(n_states)
        weighed, others = slice(max(n_pooled, math.ceil(self.weighed_share * n_states))), slice(n_pooled, None)
        targets, metrics = self.pooled(density[weighed], draws[weighed])
        self.mean_ess.update(metrics["ess"])
        rest = draws[others]
        steps, _ = self.gradient(density[others], rest)
        self.gradient_noise.update(((steps - rest.denoised) / c_out(rest.sigma, rest.std)).pow(2).mean())
        return th.cat([targets[:n_pooled], steps]), metrics | {"gradient_noise": self.gradient_noise.value.clone()}


def _ramp(value: float, low: float, high: float) -> float:
    """From 0 at ``low`` and below to 1 at ``high`` and above; 1 for NaN."""
    share = (value - low) / (high - low)
    return max(share, 0) if share < 1 else 1


class EnergyGradient(DenoiserTarget):
    """
    ``E[u | x]`` as in the paper: by Tweedie's formula from the gradient of a Monte Carlo estimate of the noised density,
    ``x + sigma^2 * grad_x log mean_k pi(u_k)`` with ``u_k ~ N(x, sigma^2)``
    (Akhound-Sadegh et al. 2024, https://arxiv.org/abs/2402.06121, equation (8); Jain et al. 2025,
    https://arxiv.org/abs/2410.01312). Here of unsquashed actions, with the log-determinant of the squashing, which the
    public code of the paper leaves out. The samples are drawn from the product of N(x, sigma^2) and a broad normal prior, by
    which they are divided again, because at high noise few samples of N(x, sigma^2) would be near the policy.

    :param n_samples: number of Monte Carlo samples K; 1000 in the paper
    :param prior_std: see :class:`PooledMean`
    """

    def __init__(self, n_samples: int = 1000, prior_std: float = 2.0):
        super().__init__()
        self.n_samples, self.prior_std = n_samples, prior_std

    def forward(self, density: LogDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        x, sigma = draws.x, draws.sigma
        noise = th.randn(*x.shape[:2], self.n_samples, x.shape[2], device=x.device)
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            center, width = broad_proposal(x, sigma, self.prior_std)
            samples = center.unsqueeze(2) + width.unsqueeze(2) * noise
            log_weights = density(samples.flatten(1, 2)).reshape(noise.shape[:3])
            log_weights = log_weights + (samples / self.prior_std).pow(2).sum(dim=3) / 2
            (score,) = th.autograd.grad(th.logsumexp(log_weights, dim=2).sum(), x)
        x = x.detach()
        # The noised prior, N(0, prior_std^2 + sigma^2), in front of the mean
        score = score - x / (self.prior_std**2 + sigma**2)
        targets = (x + sigma**2 * score).clamp(-MAX_UNSQUASHED, MAX_UNSQUASHED)
        return targets, {"ess": effective_sample_size(th.log_softmax(log_weights.detach(), dim=2)).mean()}


DENOISER_TARGETS: dict[str, Callable[[int], DenoiserTarget]] = {
    "posterior_mean": PosteriorMean,
    "energy_gradient": EnergyGradient,
}


def make_denoiser_target(denoiser_target: str | DenoiserTarget, n_samples: int) -> DenoiserTarget:
    """
    Read ``denoiser_target``: a name of ``DENOISER_TARGETS``, or an estimator, which is copied.

    :param denoiser_target: as the user gave it
    :param n_samples: number of Monte Carlo samples of an estimator that is given by name
    :return: the estimator
    """
    if isinstance(denoiser_target, DenoiserTarget):
        return copy.deepcopy(denoiser_target)
    return DENOISER_TARGETS[denoiser_target](n_samples)


def broad_proposal(x: th.Tensor, sigma: th.Tensor, prior_std: float) -> tuple[th.Tensor, th.Tensor]:
    """
    Product of the noise N(x, sigma^2) and of a broad prior N(0, prior_std^2): a normal distribution that is near the policy
    also at high noise, where x itself lies far outside.

    :param x: noisy actions, shape (..., action_dim)
    :param sigma: noise levels, shape (..., 1)
    :param prior_std: standard deviation of the prior
    :return: its mean, shape (..., action_dim), and its standard deviation, shape (..., 1)
    """
    shrinkage = prior_std**2 / (prior_std**2 + sigma**2)
    return x * shrinkage, sigma * shrinkage.sqrt()


def value_and_gradient(log_density: LogDensity, u: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Log-density and its gradient.

    :param log_density: log-density of u up to a constant, differentiable
    :param u: points, shape (n_states, n_actions, action_dim)
    :return: shapes (n_states, n_actions) and (n_states, n_actions, action_dim)
    """
    with th.enable_grad():
        points = u.clone().requires_grad_(True)
        values = log_density(points)
        (gradient,) = th.autograd.grad(values.sum(), points)
    return values.detach(), gradient


def log_normal(u: th.Tensor, means: th.Tensor, stds: th.Tensor) -> th.Tensor:
    """
    Log-densities of normal distributions up to their normalisation, which does not depend on u.

    :param u: points, shape (n_states, n_points, action_dim)
    :param means: means, shape (n_states, n_means, action_dim)
    :param stds: standard deviations, shape (n_states, n_means, 1)
    :return: shape (n_states, n_means, n_points)
    """
    # Not by a matrix product, which loses the digits of small distances
    distances = th.cdist(means, u, compute_mode="donot_use_mm_for_euclid_dist")
    return -(distances / stds).pow(2) / 2


def effective_sample_size(log_weights: th.Tensor) -> th.Tensor:
    """
    ``1 / sum_k w_k^2``, from 1 (one candidate has all the weight) to the number of candidates (Kish 1965, "Survey
    Sampling").

    :param log_weights: normalised log-weights, shape (..., n_candidates)
    :return: shape (...)
    """
    return th.exp(-th.logsumexp(2 * log_weights, dim=-1))
