"""
How far are the policy's actions from the Boltzmann distribution of the critic, ``exp(Q(s, a) / ent_coef) / Z(s)``?

Q is the critic's energy and ``ent_coef`` the present temperature: the policy is compared with what it is being trained
towards now, not with the best policy of the environment. Actions are those scaled to [-1, 1]^d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs.checks.values import is_int
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.diagnostics.importance_sampling import TemperedQ, importance_sample
from sb3_dqs.diagnostics.metrics import box_grid, distance_ratio, grid_entropy, sample_grid, weighted_moments
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import count, select, zero_observations
from sb3_dqs.training_mode import evaluation_mode

# Cells of the grid, per dimension, by number of action dimensions; with more dimensions there is no grid
GRID_CELLS = {1: 2048, 2: 128}
N_EXACT_SETS = 16  # sets of exact draws per state for the distance


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).mean(axis=-1))


def _mean_of(name: str) -> Any:
    def mean(self: "Diagnosis") -> float | None:
        values = getattr(self, name)
        return None if values is None else float(values.mean())

    return property(mean, doc=f"Mean of ``{name}`` over the states; None if that is None.")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """
    A policy beside ``exp(Q / ent_coef) / Z``, state by state; ``scalars()`` has the means over the states.

    :param policy_means: mean action of the policy, shape (n_states, action_dim)
    :param policy_stds: standard deviation of the policy's actions, shape (n_states, action_dim)
    :param policy_entropies: entropy of the policy, in nats, shape (n_states,)
    :param boltzmann_means: mean action of ``exp(Q / ent_coef) / Z``, shape (n_states, action_dim)
    :param boltzmann_stds: standard deviation of its actions, shape (n_states, action_dim)
    :param boltzmann_entropies: its entropy, in nats, shape (n_states,)
    :param mean_errors: standard error of ``boltzmann_means``, root mean square over the dimensions, shape (n_states,); 0 with
        one or two action dimensions, where these means come from a grid
    :param distances: sliced Wasserstein-1 distance between the policy's actions and as many exact draws, divided by that
        between two sets of exact draws (no unit; 1: indistinguishable), shape (n_states,); None with more than two action
        dimensions
    :param ess_shares: effective sample size of the importance weights divided by the number of candidates (no unit, from 0 to
        1), shape (n_states,); None with one or two action dimensions
    """

    policy_means: np.ndarray
    policy_stds: np.ndarray
    policy_entropies: np.ndarray
    boltzmann_means: np.ndarray
    boltzmann_stds: np.ndarray
    boltzmann_entropies: np.ndarray
    mean_errors: np.ndarray
    distances: np.ndarray | None = None
    ess_shares: np.ndarray | None = None

    @classmethod
    def of(cls, states: Sequence[dict[str, th.Tensor]]) -> "Diagnosis":
        """What :func:`compare` returned, state by state."""
        return cls(**{name: th.stack([state[name] for state in states]).double().cpu().numpy() for name in states[0]})

    @property
    def mean_gaps(self) -> np.ndarray:
        """Per state, root mean square over the dimensions of ``policy_means - boltzmann_means``, shape (n_states,)."""
        return _root_mean_square(self.policy_means - self.boltzmann_means)

    @property
    def spread_ratios(self) -> np.ndarray:
        """Per state, root mean square of ``policy_stds`` divided by that of ``boltzmann_stds``, shape (n_states,)."""
        return _root_mean_square(self.policy_stds) / _root_mean_square(self.boltzmann_stds)

    @property
    def entropy_gaps(self) -> np.ndarray:
        """Per state, entropy of the policy minus that of ``exp(Q / ent_coef) / Z``, in nats, shape (n_states,)."""
        return self.policy_entropies - self.boltzmann_entropies

    distance = _mean_of("distances")
    ess = _mean_of("ess_shares")
    mean_gap = _mean_of("mean_gaps")
    spread_ratio = _mean_of("spread_ratios")
    entropy_gap = _mean_of("entropy_gaps")

    def scalars(self, directions: np.ndarray | None = None) -> dict[str, float]:
        """
        One number per name, without those that are None.

        :param directions: ``boltzmann_mean`` and ``policy_mean`` are the components along these, shape
            (n_states, action_dim); by default along ``boltzmann_means``
        :return: means over the states; ``boltzmann_std`` and ``policy_std`` are root mean squares
        """
        directions = self.boltzmann_means if directions is None else directions
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(1e-6)
        values = {
            "boltzmann_mean": float((self.boltzmann_means * directions).sum(axis=1).mean()),
            "boltzmann_mean_error": float(self.mean_errors.mean()),
            "policy_mean": float((self.policy_means * directions).sum(axis=1).mean()),
            "boltzmann_std": float(_root_mean_square(self.boltzmann_stds.ravel())),
            "policy_std": float(_root_mean_square(self.policy_stds.ravel())),
        }
        values |= {name: getattr(self, name) for name in ("distance", "ess", "mean_gap", "spread_ratio", "entropy_gap")}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        scalars = ", ".join(f"{name} {value:.3g}" for name, value in self.scalars().items())
        n_states = len(self.policy_means)
        return f"{scalars} ({n_states} state{'s' if n_states > 1 else ''})"


def diagnose(
    model: DQS,
    observations: np.ndarray | dict[str, np.ndarray] | PyTorchObs,
    n_actions: int = 256,
    *,
    n_entropy_actions: int = 64,
    n_cells: int | None = None,
    n_candidates: int = 4096,
) -> Diagnosis:
    """
    Compare the policy's actions with ``exp(Q / ent_coef) / Z``, state by state.

    With one or two action dimensions a grid gives the exact mean, standard deviation, entropy and draws, and ``distance`` is a
    test: about 1 if the policy is that distribution (at a single state, give or take 0.3), above 1 if not; for the same wrong
    policy it grows like the square root of ``n_actions``.

    With more dimensions they come from adaptive importance sampling, see
    :func:`sb3_dqs.diagnostics.importance_sampling.importance_sample`. It starts from the policy's actions and uniform ones and
    moves to where ``exp(Q / ent_coef)`` is, so that the policy may be wrong. For smooth peaks ``ess`` is 0.7 in 3 dimensions,
    0.5 in 6 and 0.2 in 17. Below 0.01 (forty effective candidates) ``mean_errors``, and entropy and spread of
    ``exp(Q / ent_coef)``, tend to be too small: read the sign of a gap there, not its size. Narrow modes far from the policy's
    actions may not be found, and the shares of modes far apart are rough from 6 dimensions on; ``ess`` does not show that.

    The figures of the policy are those of ``n_actions`` actions: for an exact policy ``mean_gap`` is about its standard
    deviation divided by ``sqrt(n_actions)``, plus the error of the importance sampling. The entropy of the policy is that of
    ``policy.entropy``, with its errors.

    Draws from torch's global random stream. The training mode of the policy stays as it was.

    :param model: a model of DQS
    :param observations: a batch of observations as the model sees them, shape (n_states, ...), or a dictionary of such
        arrays; with ``VecNormalize``, normalised ones (``env.normalize_obs(...)``). A single one counts as a batch of one.
        Tensors are taken as a replay buffer returns them (``model.replay_buffer.sample(16).observations``)
    :param n_actions: number of actions per state
    :param n_entropy_actions: number of actions per state for the entropy of the policy
    :param n_cells: cells of the grid per dimension, 2048 with one action dimension and 128 with two by default: it resolves
        densities as wide as a cell
    :param n_candidates: number of candidates per state of importance sampling; a larger number is more accurate and slower
    :return: the figures
    :raises ValueError: if the model is none of DQS, if the observations are empty, not finite or do not fit the
        observation space, or if a number is not an integer or too small
    """
    check_ints(
        n_actions=(n_actions, 2),
        n_entropy_actions=(n_entropy_actions, 1),
        n_cells=(2 if n_cells is None else n_cells, 2),
        n_candidates=(n_candidates, 2),
    )
    obs = to_tensors(model, "observations", observations)
    states = []
    with evaluation_mode(model.policy), th.no_grad():
        for index in range(count(obs)):  # one by one, so that the memory does not depend on the number of states
            state = select(obs, slice(index, index + 1))
            u, tempered_q = policy_and_tempered_q(model, state, n_actions)
            entropy = model.policy.entropy(state, n_actions=n_entropy_actions)[0]
            states.append(compare(tempered_q, u, entropy, n_cells, n_candidates))
    return Diagnosis.of(states)


def compare(
    tempered_q: TemperedQ, u: th.Tensor, entropy: th.Tensor, n_cells: int | None = None, n_candidates: int = 4096
) -> dict[str, th.Tensor]:
    """
    Any policy beside ``exp(Q / ent_coef) / Z``, at one state.

    :param tempered_q: Q / ent_coef
    :param u: the policy's unsquashed actions, shape (n, action_dim)
    :param entropy: the policy's entropy, in nats, 0-d
    :param n_cells: see :func:`diagnose`
    :param n_candidates: see :func:`diagnose`
    :return: figures by their names in :class:`Diagnosis`
    """
    actions, dim = th.tanh(u), u.shape[1]
    if dim in GRID_CELLS:
        points = box_grid(dim, n_cells or GRID_CELLS[dim], dtype=u.dtype, device=u.device)
        log_weights = th.log_softmax(tempered_q(points), dim=0)
        exact = sample_grid(points, log_weights, N_EXACT_SETS * len(u)).reshape(N_EXACT_SETS, *u.shape)
        boltzmann_entropy = grid_entropy(log_weights, dim)
        mean, std, _ = weighted_moments(points, log_weights)
        quality = {"mean_errors": u.new_zeros(()), "distances": distance_ratio(actions, exact)}
    else:
        points, log_weights, boltzmann_entropy = importance_sample(tempered_q, u, n_candidates)
        mean, std, errors = weighted_moments(points, log_weights)
        quality = {
            "mean_errors": errors.pow(2).mean().sqrt(),
            "ess_shares": effective_sample_size(log_weights) / len(points),
        }
    return {
        "policy_means": actions.mean(dim=0),
        "policy_stds": actions.std(dim=0),
        "policy_entropies": entropy,
        "boltzmann_means": mean,
        "boltzmann_stds": std,
        "boltzmann_entropies": boltzmann_entropy,
        **quality,
    }


def policy_and_tempered_q(model: DQS, obs: PyTorchObs, n_actions: int) -> tuple[th.Tensor, TemperedQ]:
    """The policy's unsquashed actions at one state, shape (n_actions, action_dim), and ``Q / ent_coef``; double precision."""
    actor, energy, ent_coef = model.actor, model.critic.energy(obs), float(model.ent_coef_tensor)
    latents = th.randn(n_actions, actor.action_dim, device=model.device)  # also with use_sde: its held noise is one draw
    u = actor.sample(actor.embed(obs), latents).double()

    def tempered_q(actions: th.Tensor) -> th.Tensor:
        return energy(actions.float().unsqueeze(0)).squeeze(0).double() / ent_coef

    return u, tempered_q


def check_ints(**arguments: tuple[Any, int]) -> None:
    """Raise a ValueError if an argument, ``name=(value, smallest value)``, is not an integer, or smaller."""
    for name, (value, low) in arguments.items():
        if not is_int(value, low):
            raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")


def check_model(model: Any) -> None:
    """Raise a ValueError if the model is none of DQS."""
    if not isinstance(model, DQS):
        raise ValueError(f"`model` must be a DQS(...), or what DQS.load(...) returned, got {model!r}.")


def to_tensors(model: DQS, name: str, observations: Any) -> PyTorchObs:
    """A batch of observations, from those that the user gave as the argument ``name``; a ValueError if they are none."""
    check_model(model)
    space = model.observation_space
    try:
        are_tensors = bool(parts := _parts(observations)) and all(isinstance(part, th.Tensor) for part in parts.values())
        obs = observations if are_tensors else model.policy.obs_to_tensor(observations)[0]
        fits = _shapes(obs) == _shapes(zero_observations(space, 1, model.device))
        fits = fits and len({len(part) for part in _parts(obs).values()}) == 1
    except (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):  # of SB3
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must be a batch of observations of {space} (for dictionaries, one array per key, all of the same "
            f"length), as model.get_env().reset() returns, got {observations!r}."
        )
    if count(obs) == 0:
        raise ValueError(f"`{name}` must be at least one observation, got {observations!r}.")
    if not all(th.isfinite(part).all() for part in _parts(obs).values()):
        raise ValueError(f"`{name}` must be finite, got {observations!r}; check the environment, or what prepares them.")
    return obs


def _parts(obs: Any) -> dict[str, Any]:
    return obs if isinstance(obs, dict) else {"": obs}


def _shapes(obs: PyTorchObs) -> dict[str, tuple[int, ...]]:
    # Numbers (spaces.Discrete) come with and without a dimension
    return {key: tuple(part.shape[1:]) or (1,) for key, part in _parts(obs).items()}
