"""
How far are the policy's actions from the Boltzmann distribution of the critic, ``exp(Q(s, a) / ent_coef) / Z(s)``?

Q is the first of the critics and ``ent_coef`` the present temperature: the policy is compared with what it is being
trained towards now, not with the best policy of the environment. Actions are those scaled to [-1, 1]^d.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs.checks import is_int
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import select
from sb3_dqs.policies import evaluation_mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From (n, action_dim) to (n,): Q / ent_coef at one state
LogDensity = Callable[[th.Tensor], th.Tensor]

# Cells per dimension of the grid that exact draws are made by: it resolves densities as wide as a cell (0.001 and 0.016)
GRID_CELLS = {1: 2048, 2: 128}
# Exact sets that the policy's actions are compared with, in pairs with each other for the floor
N_EXACT_SETS = 16
# Directions of the sliced distance in two dimensions
N_DIRECTIONS = 16
# Proposals of importance sampling: kernels of these widths (in standard deviations of the policy's actions at the state)
# around some of the policy's actions, and the uniform distribution; equal shares
KERNEL_WIDTHS = (1.0, 1 / 4, 1 / 16)
# of a standard deviation of at least this
MIN_KERNEL_WIDTH = 0.01
N_COMPONENTS = len(KERNEL_WIDTHS) + 1
N_CENTERS = 128
N_CANDIDATES = 4096
# Actions per state for the entropy of the policy
N_ENTROPY_ACTIONS = 64
# Bins per dimension of a marginal density in a plot
PLOT_BINS = 40


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """
    What :func:`diagnose` found; the properties are means over the states.

    :param distances: per state, sliced Wasserstein-1 distance between the policy's actions and as many exact draws, divided
        by that between two sets of exact draws (no unit; 1: indistinguishable), shape (n_states,);
        None with more than two action dimensions
    :param ess_shares: per state, effective sample size of the importance weights divided by the number of candidates
        (no unit, from 0 to 1), shape (n_states,)
    :param policy_entropies: per state, entropy of the policy, in nats, shape (n_states,)
    :param boltzmann_entropies: per state, entropy of ``exp(Q / ent_coef) / Z``, in nats, shape (n_states,)
    """

    distances: np.ndarray | None
    ess_shares: np.ndarray
    policy_entropies: np.ndarray
    boltzmann_entropies: np.ndarray

    @property
    def distance(self) -> float | None:
        """Mean of ``distances``; None with more than two action dimensions."""
        return None if self.distances is None else float(self.distances.mean())

    @property
    def ess(self) -> float:
        """Mean of ``ess_shares``."""
        return float(self.ess_shares.mean())

    @property
    def entropy_gaps(self) -> np.ndarray:
        """Per state, entropy of the policy minus that of ``exp(Q / ent_coef) / Z``, in nats, shape (n_states,)."""
        return self.policy_entropies - self.boltzmann_entropies

    @property
    def entropy_gap(self) -> float:
        """Mean of ``entropy_gaps``, in nats."""
        return float(self.entropy_gaps.mean())

    def __str__(self) -> str:
        distance = "" if self.distance is None else f"distance {self.distance:.2f}, "
        return f"{distance}ess {self.ess:.2g}, entropy gap {self.entropy_gap:+.2f} nats ({len(self.ess_shares)} states)"


def diagnose(model: DQS, observations: np.ndarray | dict[str, np.ndarray], n_actions: int = 256) -> Diagnosis:
    """
    Compare the policy's actions with ``exp(Q / ent_coef) / Z``, state by state.

    With one or two action dimensions a grid gives exact draws and the exact entropy, and ``distance`` is a test: about 1
    if the policy is that distribution (at a single state, give or take 0.3), above 1 if not; for one and the same wrong
    policy it grows like the square root of ``n_actions``.

    With more dimensions the entropy comes from self-normalised importance sampling (Owen 2013, "Monte Carlo theory,
    methods and examples", chapter 9), as does ``ess`` in any dimension. A quarter of the candidates is uniform on the box,
    the others come from truncated normals of three widths around the policy's own actions, all weighted by
    ``exp(Q / ent_coef) / q`` with the density q of the mixture. For an exact policy ``ess`` is 0.3 to 1 in one or two
    dimensions, depending on the shape of the distribution, and for a smooth peak 0.5 in 3, 0.15 in 6 and 0.02 in 17:
    compare it between stages of one task, not between tasks. Where it is small, the entropy is not to be trusted: it
    scatters (for that peak, by 0.04 nats in 6 dimensions and 0.6 in 17), and narrow modes far from the policy's actions
    are not found, so that the entropy of ``exp(Q / ent_coef)`` tends to be too low and the gap too high. Below 0.01 (forty
    effective candidates) read the gap as a sign, not as a number. The entropy of the policy is that of
    ``policy.entropy``, with its errors.

    Draws from torch's global random stream. The training mode of the policy stays as it was.

    :param model: a model of DQS
    :param observations: a batch of observations as the model sees them, shape (n_states, ...), or a dictionary of such
        arrays; with ``VecNormalize``, normalised ones (``env.normalize_obs(...)``). A single one counts as a batch of one
    :param n_actions: number of actions per state
    :return: the figures, per state and averaged
    :raises ValueError: if the model is none of DQS, if the observations are empty, not finite or do not fit the
        observation space, or if ``n_actions`` is not an integer >= 2
    """
    _check_int("n_actions", n_actions, 2)
    return _diagnose(model, _to_tensor(model, "observations", observations), n_actions)


def plot_policy(
    model: DQS,
    observation: np.ndarray | dict[str, np.ndarray],
    dims: tuple[int, int] = (0, 1),
    n_actions: int = 1000,
) -> "Figure":
    """
    Draw the policy's actions over the density of ``exp(Q / ent_coef) / Z`` at one state; both axes are scaled actions in
    [-1, 1].

    With two action dimensions the density comes from a grid. With one it is a curve, with a histogram of the actions. With
    more, it is the marginal density of the two chosen dimensions (the others are integrated out, as they are in the
    cloud of actions), a histogram of the importance-weighted candidates of :func:`diagnose`: noisy, and with modes
    missing, where the effective sample size that the title then gives is small.

    :param model: a model of DQS
    :param observation: one observation as the model sees it (see :func:`diagnose`), or a batch of one
    :param dims: the action dimensions on the horizontal and vertical axes; not used with one action dimension
    :param n_actions: number of actions
    :return: figure, independent of pyplot: ``figure.savefig(...)``
    :raises ValueError: if the model is none of DQS, if the observation is not finite, does not fit the observation space
        or is not one, if ``dims`` are not two different action dimensions, or if ``n_actions`` is not an integer >= 2
    """
    _check_int("n_actions", n_actions, 2)
    obs = _to_tensor(model, "observation", observation)
    if _length(obs) != 1:
        raise ValueError(f"observation: {_length(obs)} of them will not do: pass one, observations[0] for instance.")
    _check_dims(dims, model.actor.action_dim)
    return _plot(model, obs, dims, n_actions)


class DiagnosticCallback(BaseCallback):
    """
    Callback that logs how far the policy is from ``exp(Q / ent_coef) / Z`` at states of the replay buffer, as
    ``diagnostics/distance`` (with one or two action dimensions), ``diagnostics/ess``, ``diagnostics/entropy_gap`` and
    ``diagnostics/ent_coef``, and the figure ``diagnostics/policy`` at the first of the states (see :func:`diagnose` and
    :func:`plot_policy`). The figure goes to TensorBoard. Nothing is logged before the first gradient step.

    Training goes as without it, bit for bit: the random streams of numpy and torch and the training mode of the policy are
    put back.

    :param eval_freq: Log every ``eval_freq`` calls of the callback
    :param n_states: number of states
    :param n_actions: number of actions per state
    :param log_figure: Whether to log the figure
    :param dims: the action dimensions of the figure
    :param verbose: Verbosity level: 0 for no output, 1 for a line per diagnosis
    :raises ValueError: if ``eval_freq``, ``n_states`` or ``n_actions`` is not a large enough integer; when training begins,
        if the model is none of DQS or has no such ``dims``
    """

    def __init__(
        self,
        eval_freq: int,
        n_states: int = 16,
        n_actions: int = 256,
        log_figure: bool = True,
        dims: tuple[int, int] = (0, 1),
        verbose: int = 0,
    ):
        super().__init__(verbose)
        for name, value, low in (("eval_freq", eval_freq, 1), ("n_states", n_states, 1), ("n_actions", n_actions, 2)):
            _check_int(name, value, low)
        self.eval_freq = eval_freq
        self.n_states = n_states
        self.n_actions = n_actions
        self.log_figure = log_figure
        self.dims = dims
        self._n_updates_before = 0

    def _init_callback(self) -> None:
        _check_model(self.model)
        _check_dims(self.dims, self._dqs.actor.action_dim)

    def _on_training_start(self) -> None:
        # Whoever has made a gradient step since then has a replay buffer to draw from
        self._n_updates_before = self._dqs._n_updates

    @property
    def _dqs(self) -> DQS:
        assert isinstance(self.model, DQS)  # for type checker
        return self.model

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0 and self._dqs._n_updates > self._n_updates_before:
            with preserved_random_streams(self._dqs.device):
                self._log()
        return True

    def _log(self) -> None:
        model = self._dqs
        assert model.replay_buffer is not None  # for type checker
        obs = model.replay_buffer.sample(self.n_states, env=model._vec_normalize_env).observations
        diagnosis = _diagnose(model, obs, self.n_actions)
        if self.verbose >= 1:
            print(f"DiagnosticCallback, step {self.num_timesteps}: {diagnosis}")
        if diagnosis.distance is not None:
            self.logger.record("diagnostics/distance", diagnosis.distance)
        self.logger.record("diagnostics/ess", diagnosis.ess)
        self.logger.record("diagnostics/entropy_gap", diagnosis.entropy_gap)
        self.logger.record("diagnostics/ent_coef", _temperature(model))
        if self.log_figure:
            figure = _plot(model, select(obs, slice(0, 1)), self.dims, n_actions=1000)
            exclude = ("stdout", "log", "json", "csv")
            self.logger.record("diagnostics/policy", LoggedFigure(figure, close=False), exclude=exclude)
        # As EvalCallback, so that each diagnosis is written, with its own step
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


# Mathematics: pure functions of tensors


def sliced_wasserstein(first: th.Tensor, second: th.Tensor) -> th.Tensor:
    """
    Sliced Wasserstein-1 distance between two sets of equal size: the mean over directions (evenly spaced, in two dimensions)
    of the distance between the projections, which is that of the sorted ones (Bonneel et al. 2015, "Sliced and Radon
    Wasserstein barycenters of measures").

    :param first: shape (..., n, dim), dim 1 or 2
    :param second: shape (..., n, dim)
    :return: in units of the actions, shape (...)
    """
    dim = first.shape[-1]
    angles = (th.arange(N_DIRECTIONS, device=first.device, dtype=first.dtype) + 0.5) * math.pi / N_DIRECTIONS
    directions = first.new_ones(1, 1) if dim == 1 else th.stack([angles.cos(), angles.sin()])
    gaps = (first @ directions).sort(dim=-2).values - (second @ directions).sort(dim=-2).values
    return gaps.abs().mean(dim=(-2, -1))


def distance_ratio(actions: th.Tensor, exact: th.Tensor) -> float:
    """
    Mean distance from the actions to sets of exact draws, divided by that between pairs of such sets.

    :param actions: shape (n, dim)
    :param exact: an even number of sets of draws, shape (n_sets, n, dim)
    :return: 1 on average (up to the scatter of the denominator) if all come from one distribution
    """
    floor = sliced_wasserstein(exact[::2], exact[1::2]).mean()
    return float(sliced_wasserstein(actions.expand_as(exact), exact).mean() / floor)


def grid_probabilities(log_density: LogDensity, like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Probabilities of the cells of a grid on [-1, 1]^dim, by the midpoint rule.

    :param log_density: unnormalised log-density
    :param like: actions whose dimension (1 or 2), type and device the grid takes
    :return: midpoints of shape (n_cells, dim), the first dimension slowest, and log-probabilities of shape (n_cells,)
    """
    dim = like.shape[1]
    axis = (th.arange(GRID_CELLS[dim], device=like.device, dtype=like.dtype) + 0.5) * 2 / GRID_CELLS[dim] - 1
    midpoints = th.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return midpoints, th.log_softmax(log_density(midpoints), dim=0)


def sample_grid(midpoints: th.Tensor, log_probs: th.Tensor, n_samples: int) -> th.Tensor:
    """
    Draws from the density that is constant on each cell.

    :param midpoints: shape (n_cells, dim)
    :param log_probs: shape (n_cells,)
    :param n_samples: number of draws
    :return: shape (n_samples, dim)
    """
    cells = midpoints[th.multinomial(log_probs.exp(), n_samples, replacement=True)]
    return cells + (2 * th.rand_like(cells) - 1) / GRID_CELLS[midpoints.shape[1]]


def grid_entropy(log_probs: th.Tensor, dim: int) -> float:
    """
    Differential entropy by the midpoint rule.

    :param log_probs: log-probabilities of the cells, shape (n_cells,)
    :param dim: dimension of the grid
    :return: nats
    """
    return float(-(log_probs.exp() * log_probs).sum()) + dim * math.log(2 / GRID_CELLS[dim])


def kernel_widths(centers: th.Tensor) -> th.Tensor:
    """
    Widths of the kernels of the proposal mixture.

    :param centers: the policy's actions at one state, shape (n_centers, dim)
    :return: shape (len(KERNEL_WIDTHS), dim)
    """
    return centers.new_tensor(KERNEL_WIDTHS).unsqueeze(1) * centers.std(dim=0).clamp(min=MIN_KERNEL_WIDTH)


def sample_proposals(centers: th.Tensor, n_samples: int) -> th.Tensor:
    """
    Draws from the proposal mixture: equally many from each component, whose kernels take the centres in turn.

    :param centers: the policy's actions at one state, shape (n_centers, dim)
    :param n_samples: number of draws, a multiple of N_COMPONENTS
    :return: shape (n_samples, dim)
    """
    n_each = n_samples // N_COMPONENTS
    uniforms = th.rand(N_COMPONENTS, n_each, centers.shape[1], device=centers.device, dtype=centers.dtype)
    means = centers[th.arange(n_each, device=centers.device) % len(centers)]
    kernels = sample_truncated_normal(means, kernel_widths(centers).unsqueeze(1), uniforms[1:])
    return th.cat([2 * uniforms[0] - 1, kernels.flatten(end_dim=1)])


def sample_truncated_normal(mean: th.Tensor, std: th.Tensor, uniforms: th.Tensor) -> th.Tensor:
    """
    Normal numbers truncated to [-1, 1], by inversion of the distribution function.

    :param mean: means before truncation (they may lie outside the box)
    :param std: standard deviations before truncation
    :param uniforms: uniform numbers in [0, 1] of the shape of the result
    :return: samples in [-1, 1]
    """
    # Mirror, so that the box lies in the lower tail, where the distribution function keeps its relative precision
    sign = th.where(mean > 0, 1.0, -1.0)
    center = sign * mean
    low, high = th.special.ndtr((-1 - center) / std), th.special.ndtr((1 - center) / std)
    quantiles = (low + uniforms * (high - low)).clamp(min=1e-30, max=1 - 1e-7)
    return (sign * (center + std * th.special.ndtri(quantiles))).clamp(-1, 1)


def proposal_log_density(candidates: th.Tensor, centers: th.Tensor) -> th.Tensor:
    """
    Log-density of the proposal mixture.

    :param candidates: shape (n_candidates, dim)
    :param centers: the policy's actions at one state, shape (n_centers, dim)
    :return: shape (n_candidates,)
    """
    dim = centers.shape[1]
    components = [th.full_like(candidates[:, 0], -dim * math.log(2))]
    for width in kernel_widths(centers):
        # Not by a matrix product, which loses the digits of small distances
        distances = th.cdist(candidates / width, centers / width, compute_mode="donot_use_mm_for_euclid_dist")
        masses = th.special.ndtr((1 - centers) / width) - th.special.ndtr((-1 - centers) / width)
        log_norms = (width * masses).log().sum(dim=1) + dim / 2 * math.log(2 * math.pi)
        components.append(th.logsumexp(-(distances**2) / 2 - log_norms, dim=1) - math.log(len(centers)))
    return th.logsumexp(th.stack(components), dim=0) - math.log(N_COMPONENTS)


def importance_sample(log_density: LogDensity, centers: th.Tensor, n_samples: int) -> tuple[th.Tensor, th.Tensor, float]:
    """
    Self-normalised importance sampling from the proposal mixture.

    :param log_density: unnormalised log-density
    :param centers: the policy's actions at one state, shape (n_centers, dim)
    :param n_samples: number of candidates, a multiple of N_COMPONENTS
    :return: candidates of shape (n_samples, dim), normalised log-weights of shape (n_samples,), and the estimate of the
        entropy of the density, ``log Z - E[log_density]``, in nats
    """
    candidates = sample_proposals(centers, n_samples)
    log_densities = log_density(candidates)
    log_ratios = log_densities - proposal_log_density(candidates, centers)
    log_weights = th.log_softmax(log_ratios, dim=0)
    log_z = th.logsumexp(log_ratios, dim=0) - math.log(n_samples)
    return candidates, log_weights, float(log_z - (log_weights.exp() * log_densities).sum())


# What the model says


def _temperature(model: DQS) -> float:
    return float(model.temperature(model._current_progress_remaining))


def _policy_and_density(model: DQS, obs: PyTorchObs, n_actions: int) -> tuple[th.Tensor, LogDensity]:
    """
    The policy's actions at one state, and ``Q / ent_coef``, both in double precision.

    :param model: a model of DQS, in evaluation mode
    :param obs: a batch of one observation
    :param n_actions: number of actions
    :return: actions of shape (n_actions, action_dim), and the function
    """
    actor, critic, ent_coef = model.actor, model.critic, _temperature(model)
    latents = th.randn(n_actions, actor.action_dim, device=model.device)  # also with use_sde: its held noise is one draw
    actions = th.tanh(actor.sample(actor.embed(obs), latents)).double()
    energy = critic.energy(obs)

    def log_density(candidates: th.Tensor) -> th.Tensor:
        return energy(candidates.float().unsqueeze(0)).squeeze(0).double() / ent_coef

    return actions, log_density


def _diagnose(model: DQS, obs: PyTorchObs, n_actions: int) -> Diagnosis:
    distances, shares, policy_entropies, boltzmann_entropies = [], [], [], []
    with evaluation_mode(model.policy), th.no_grad():
        for index in range(_length(obs)):  # one by one, so that the memory does not depend on the number of states
            state = select(obs, slice(index, index + 1))
            actions, log_density = _policy_and_density(model, state, n_actions)
            _, log_weights, entropy = importance_sample(log_density, actions[:N_CENTERS], N_CANDIDATES)
            if actions.shape[1] in GRID_CELLS:
                midpoints, log_probs = grid_probabilities(log_density, actions)
                exact = sample_grid(midpoints, log_probs, N_EXACT_SETS * n_actions).reshape(N_EXACT_SETS, *actions.shape)
                distances.append(distance_ratio(actions, exact))
                entropy = grid_entropy(log_probs, actions.shape[1])
            shares.append(float(effective_sample_size(log_weights.unsqueeze(0))) / N_CANDIDATES)
            policy_entropies.append(float(model.policy.entropy(state, n_actions=N_ENTROPY_ACTIONS)))
            boltzmann_entropies.append(entropy)
    return Diagnosis(
        distances=np.array(distances) if distances else None,
        ess_shares=np.array(shares),
        policy_entropies=np.array(policy_entropies),
        boltzmann_entropies=np.array(boltzmann_entropies),
    )


# Pictures


def _plot(model: DQS, obs: PyTorchObs, dims: tuple[int, int], n_actions: int) -> "Figure":
    from matplotlib.figure import Figure  # takes a while to import

    with evaluation_mode(model.policy), th.no_grad():
        actions, log_density = _policy_and_density(model, obs, n_actions)
        figure = Figure(figsize=(6, 3.6) if actions.shape[1] == 1 else (5.4, 4.6), layout="constrained")
        ax = figure.add_subplot()
        if actions.shape[1] == 1:
            _draw_curve(ax, actions, log_density)
        else:
            _draw_map(ax, actions, log_density, dims)
    ax.set(xlim=(-1, 1), title=f"{ax.get_title()}ent_coef = {_temperature(model):.3g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_curve(ax: "Axes", actions: th.Tensor, log_density: LogDensity) -> None:
    midpoints, log_probs = grid_probabilities(log_density, actions)
    density = log_probs.exp() * GRID_CELLS[1] / 2
    bins = np.linspace(-1, 1, 61).tolist()
    ax.hist(actions.flatten().cpu().numpy(), bins, density=True, color="tab:orange", alpha=0.6, label="policy's actions")
    ax.plot(midpoints.flatten().cpu().numpy(), density.cpu().numpy(), color="black", label="exp(Q / ent_coef) / Z")
    ax.set(xlabel="action, scaled to [-1, 1]", ylabel="density", ylim=(0, None))


def _draw_map(ax: "Axes", actions: th.Tensor, log_density: LogDensity, dims: tuple[int, int]) -> None:
    from matplotlib.colors import PowerNorm

    if actions.shape[1] == 2:
        _, log_probs = grid_probabilities(log_density, actions)
        probabilities = log_probs.exp().reshape(GRID_CELLS[2], GRID_CELLS[2]).permute(dims).cpu().numpy()
    else:
        n_candidates = 8 * N_CANDIDATES
        candidates, log_weights, _ = importance_sample(log_density, actions[:N_CENTERS], n_candidates)
        first, second = candidates[:, list(dims)].T.cpu().numpy()
        weights = log_weights.exp().cpu().numpy()
        probabilities, *_ = np.histogram2d(first, second, PLOT_BINS, [(-1, 1), (-1, 1)], weights=weights)
        ax.set_title(f"ess {float(effective_sample_size(log_weights.unsqueeze(0))) / n_candidates:.2g}, ")
    density = probabilities * probabilities.size / 4
    norm = PowerNorm(0.5, vmin=0)  # so that weak modes are seen
    image = ax.imshow(density.T, origin="lower", extent=(-1, 1, -1, 1), cmap="Greys", norm=norm, interpolation="bilinear")
    ax.figure.colorbar(image, ax=ax, label="density of exp(Q / ent_coef) / Z")
    points = actions[:, list(dims)].cpu().numpy()
    ax.plot(*points.T, ".", markersize=2, color="tab:orange", label="policy's actions")
    ticks = [-1, -0.5, 0, 0.5, 1]
    ax.set(
        xticks=ticks,
        yticks=ticks,
        xlabel=f"action dimension {dims[0]}, scaled",
        ylabel=f"action dimension {dims[1]}, scaled",
        ylim=(-1, 1),
    )


# State that is put back


@contextlib.contextmanager
def preserved_random_streams(device: th.device) -> Iterator[None]:
    """
    Put the random streams of numpy and torch (of the CPU and of a CUDA device) back afterwards.

    :param device: the device that torch draws on
    """
    numpy_state = np.random.get_state()
    try:
        with th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)


# Observations and errors


def _length(obs: PyTorchObs) -> int:
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


def _check_int(name: str, value: Any, low: int) -> None:
    if not is_int(value, low):
        raise ValueError(f"{name}={value!r} will not do: it must be an integer >= {low}.")


def _check_dims(dims: Any, action_dim: int) -> None:
    is_pair = isinstance(dims, tuple | list) and len(dims) == 2 and dims[0] != dims[1]
    if action_dim > 1 and not (is_pair and all(is_int(dim, 0) and dim < action_dim for dim in dims)):
        raise ValueError(f"dims={dims!r} will not do: pass two different ones of the action dimensions 0 to {action_dim - 1}.")


def _check_model(model: Any) -> None:
    if not isinstance(model, DQS):
        raise ValueError(f"model={model!r} is not a model of DQS: pass a DQS(...), or what DQS.load(...) returned.")


def _to_tensor(model: DQS, name: str, observations: Any) -> PyTorchObs:
    """
    :param model: a model of DQS
    :param name: name of the argument, for the messages
    :param observations: as the user gave them
    :return: a batch of observations
    :raises ValueError: naming the argument, the value and the remedy
    """
    _check_model(model)
    space = model.observation_space
    try:
        obs, _ = model.policy.obs_to_tensor(observations)
        lengths = {len(part) for part in obs.values()} if isinstance(obs, dict) else {len(obs)}
        fits = lengths == {_length(obs)} and (not isinstance(obs, dict) or set(obs) == set(getattr(space, "spaces", {})))
    except (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"{name}={observations!r} will not do: the observation space is {space}; pass a batch of its observations "
            "(for dictionaries, one array per key, all of the same length), as model.get_env().reset() returns."
        )
    if _length(obs) == 0:
        raise ValueError(f"{name}={observations!r} is empty: pass at least one, as model.get_env().reset() returns.")
    for part in obs.values() if isinstance(obs, dict) else [obs]:
        if not th.isfinite(part).all():
            raise ValueError(f"{name}={observations!r} is not finite; check the environment, or what prepares them.")
    return obs
