"""
How far are the policy's actions from the Boltzmann distribution of the critic, ``exp(Q(s, a) / ent_coef) / Z(s)``?

Q is the critic's energy and ``ent_coef`` the present temperature: the policy is compared with what it is being trained
towards now, not with the best policy of the environment. Actions are those scaled to [-1, 1]^d.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs.checks import is_int
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.diagnostics.importance_sampling import TemperedQ, importance_sample
from sb3_dqs.diagnostics.metrics import (
    box_grid,
    distance_ratio,
    grid_entropy,
    sample_grid,
    weighted_mean_and_std,
    weighted_mean_error,
)
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import count, select, zero_observations
from sb3_dqs.policies import evaluation_mode

# Cells of the grid, per dimension, by number of action dimensions; with more dimensions there is no grid
GRID_CELLS = {1: 2048, 2: 128}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """
    What :func:`diagnose` found; the properties are means over the states.

    :param policy_means: per state, mean action of the policy, shape (n_states, action_dim)
    :param policy_stds: per state, standard deviation of the policy's actions, shape (n_states, action_dim)
    :param boltzmann_means: per state, mean action of ``exp(Q / ent_coef) / Z``, shape (n_states, action_dim)
    :param boltzmann_stds: per state, standard deviation of its actions, shape (n_states, action_dim)
    :param policy_entropies: per state, entropy of the policy, in nats, shape (n_states,)
    :param boltzmann_entropies: per state, entropy of ``exp(Q / ent_coef) / Z``, in nats, shape (n_states,)
    :param distances: per state, sliced Wasserstein-1 distance between the policy's actions and as many exact draws, divided
        by that between two sets of exact draws (no unit; 1: indistinguishable), shape (n_states,);
        None with more than two action dimensions
    :param mean_errors: per state, standard error of ``boltzmann_means`` in the units of ``mean_gaps``, shape (n_states,);
        None with one or two action dimensions, where these means come from a grid
    :param ess_shares: per state, effective sample size of the importance weights divided by the number of candidates
        (no unit, from 0 to 1), shape (n_states,); None with one or two action dimensions
    """

    policy_means: np.ndarray
    policy_stds: np.ndarray
    boltzmann_means: np.ndarray
    boltzmann_stds: np.ndarray
    policy_entropies: np.ndarray
    boltzmann_entropies: np.ndarray
    distances: np.ndarray | None = None
    mean_errors: np.ndarray | None = None
    ess_shares: np.ndarray | None = None

    @property
    def distance(self) -> float | None:
        """Mean of ``distances``; None with more than two action dimensions."""
        return None if self.distances is None else float(self.distances.mean())

    @property
    def ess(self) -> float | None:
        """Mean of ``ess_shares``; None with one or two action dimensions."""
        return None if self.ess_shares is None else float(self.ess_shares.mean())

    @property
    def mean_gaps(self) -> np.ndarray:
        """
        Per state, Euclidean norm of ``policy_means - boltzmann_means`` divided by ``sqrt(action_dim)``: the root mean square
        over the dimensions, in scaled actions, shape (n_states,).
        """
        return _root_mean_square(self.policy_means - self.boltzmann_means)

    @property
    def mean_gap(self) -> float:
        """Mean of ``mean_gaps``."""
        return float(self.mean_gaps.mean())

    @property
    def spread_ratios(self) -> np.ndarray:
        """
        Per state, root mean square over the dimensions of ``policy_stds`` divided by that of ``boltzmann_stds`` (no unit),
        shape (n_states,).
        """
        return _root_mean_square(self.policy_stds) / _root_mean_square(self.boltzmann_stds)

    @property
    def spread_ratio(self) -> float:
        """Mean of ``spread_ratios``."""
        return float(self.spread_ratios.mean())

    @property
    def entropy_gaps(self) -> np.ndarray:
        """Per state, entropy of the policy minus that of ``exp(Q / ent_coef) / Z``, in nats, shape (n_states,)."""
        return self.policy_entropies - self.boltzmann_entropies

    @property
    def entropy_gap(self) -> float:
        """Mean of ``entropy_gaps``, in nats."""
        return float(self.entropy_gaps.mean())

    def scalars(self) -> dict[str, float]:
        """The means over the states, by name, without those that are None."""
        names = ("distance", "ess", "mean_gap", "spread_ratio", "entropy_gap")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        scalars = ", ".join(f"{name} {value:.3g}" for name, value in self.scalars().items())
        n_states = len(self.policy_means)
        return f"{scalars} ({n_states} state{'s' if n_states > 1 else ''})"


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).mean(axis=1))


def diagnose(
    model: DQS,
    observations: np.ndarray | dict[str, np.ndarray] | PyTorchObs,
    n_actions: int = 256,
    *,
    n_entropy_actions: int = 64,
    n_cells: int | None = None,
    n_exact_sets: int = 16,
    n_candidates: int = 4096,
    max_rounds: int = 20,
) -> Diagnosis:
    """
    Compare the policy's actions with ``exp(Q / ent_coef) / Z``, state by state.

    With one or two action dimensions a grid gives exact draws, the exact mean, standard deviation and entropy, and
    ``distance`` is a test: about 1 if the policy is that distribution (at a single state, give or take 0.3), above 1 if not;
    for one and the same wrong policy it grows like the square root of ``n_actions``.

    With more dimensions the mean, standard deviation and entropy come from adaptive importance sampling, see
    :func:`sb3_dqs.diagnostics.importance_sampling.importance_sample`. It starts from the policy's actions and uniform ones and
    moves to where ``exp(Q / ent_coef)`` is, so that the policy may be wrong. For smooth peaks ``ess`` is 0.6 in 3 dimensions,
    0.4 in 6 and 0.2 in 17. Where it is below 0.01 (forty effective candidates), ``mean_errors`` is too small, and entropy and
    spread of ``exp(Q / ent_coef)`` tend to be too low; read the sign of a gap there, not its size. Narrow modes far from the
    policy's actions may not be found, and ``ess`` does not show that.

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
    :param n_exact_sets: number of sets of exact draws per state for the distance
    :param n_candidates: number of candidates per state of importance sampling; a larger number is more accurate and slower
    :param max_rounds: largest number of rounds per state that move the proposal of importance sampling
    :return: the figures, per state and averaged
    :raises ValueError: if the model is none of DQS, if the observations are empty, not finite or do not fit the
        observation space, or if a number is not an integer or too small
    """
    for name, value, low in (
        ("n_actions", n_actions, 2),
        ("n_entropy_actions", n_entropy_actions, 1),
        ("n_cells", 2 if n_cells is None else n_cells, 2),
        ("n_exact_sets", n_exact_sets, 2),
        ("n_candidates", n_candidates, 2),
        ("max_rounds", max_rounds, 0),
    ):
        check_int(name, value, low)
    obs = to_tensors(model, "observations", observations)
    rows = []
    with evaluation_mode(model.policy), th.no_grad():
        for index in range(count(obs)):  # one by one, so that the memory does not depend on the number of states
            state = select(obs, slice(index, index + 1))
            u, tempered_q = policy_and_tempered_q(model, state, n_actions)
            if u.shape[1] in GRID_CELLS:
                row = _by_grid(tempered_q, th.tanh(u), n_cells or GRID_CELLS[u.shape[1]], n_exact_sets)
            else:
                row = _by_importance_sampling(tempered_q, u, n_candidates, max_rounds)
            row["policy_means"], row["policy_stds"] = th.tanh(u).mean(dim=0), th.tanh(u).std(dim=0)
            row["policy_entropies"] = model.policy.entropy(state, n_actions=n_entropy_actions)[0]
            rows.append(row)
    return Diagnosis(**{name: th.stack([row[name] for row in rows]).double().cpu().numpy() for name in rows[0]})


def _by_grid(tempered_q: TemperedQ, actions: th.Tensor, n_cells: int, n_exact_sets: int) -> dict[str, th.Tensor]:
    """Figures of one state, by their names in :class:`Diagnosis`."""
    dim = actions.shape[1]
    grid = box_grid(dim, n_cells, dtype=actions.dtype, device=actions.device)
    log_probs = th.log_softmax(tempered_q(grid), dim=0)
    mean, std = weighted_mean_and_std(grid, log_probs)
    exact = sample_grid(grid, log_probs, n_exact_sets * len(actions)).reshape(n_exact_sets, *actions.shape)
    return {
        "boltzmann_means": mean,
        "boltzmann_stds": std,
        "boltzmann_entropies": grid_entropy(log_probs, dim),
        "distances": distance_ratio(actions, exact),
    }


def _by_importance_sampling(tempered_q: TemperedQ, u: th.Tensor, n_candidates: int, max_rounds: int) -> dict[str, th.Tensor]:
    """Figures of one state, by their names in :class:`Diagnosis`."""
    candidates, log_weights, entropy = importance_sample(tempered_q, u, n_candidates, max_rounds)
    mean, std = weighted_mean_and_std(candidates, log_weights)
    return {
        "boltzmann_means": mean,
        "boltzmann_stds": std,
        "boltzmann_entropies": entropy,
        "mean_errors": weighted_mean_error(candidates, log_weights).pow(2).mean().sqrt(),
        "ess_shares": effective_sample_size(log_weights) / len(candidates),
    }


def policy_and_tempered_q(model: DQS, obs: PyTorchObs, n_actions: int) -> tuple[th.Tensor, TemperedQ]:
    """
    The policy's unsquashed actions at one state, and ``Q / ent_coef``, both in double precision.

    :param model: a model of DQS, in evaluation mode
    :param obs: a batch of one observation
    :param n_actions: number of actions
    :return: unsquashed actions u, shape (n_actions, action_dim), and a function of actions in [-1, 1]
    """
    actor, energy, ent_coef = model.actor, model.critic.energy(obs), float(model.ent_coef_tensor)
    latents = th.randn(n_actions, actor.action_dim, device=model.device)  # also with use_sde: its held noise is one draw
    u = actor.sample(actor.embed(obs), latents).double()

    def tempered_q(actions: th.Tensor) -> th.Tensor:
        return energy(actions.float().unsqueeze(0)).squeeze(0).double() / ent_coef

    return u, tempered_q


def check_int(name: str, value: Any, low: int) -> None:
    """
    :param name: name of the argument
    :param value: as the user gave it
    :param low: smallest value
    :raises ValueError: if it is not an integer, or smaller
    """
    if not is_int(value, low):
        raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")


def check_model(model: Any) -> None:
    """
    :param model: as the user gave it
    :raises ValueError: if it is none of DQS
    """
    if not isinstance(model, DQS):
        raise ValueError(f"`model` must be a DQS(...), or what DQS.load(...) returned, got {model!r}.")


def to_tensors(model: DQS, name: str, observations: Any) -> PyTorchObs:
    """
    :param model: a model of DQS
    :param name: name of the argument, for the messages
    :param observations: as the user gave them
    :return: a batch of observations
    :raises ValueError: naming the argument, the value and the remedy
    """
    check_model(model)
    space = model.observation_space
    try:
        parts = observations.values() if isinstance(observations, dict) else [observations]
        if len(parts) > 0 and all(isinstance(part, th.Tensor) for part in parts):
            obs = observations
            fits = _shapes(obs) == _shapes(zero_observations(space, 1, model.device))
        else:
            obs, _ = model.policy.obs_to_tensor(observations)
            fits = not isinstance(obs, dict) or set(obs) == set(getattr(space, "spaces", {}))
        fits = fits and len({len(part) for part in (obs.values() if isinstance(obs, dict) else [obs])}) == 1
    except (AssertionError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must be a batch of observations of {space} (for dictionaries, one array per key, all of the same "
            f"length), as model.get_env().reset() returns, got {observations!r}."
        )
    if count(obs) == 0:
        raise ValueError(f"`{name}` must be at least one observation, got {observations!r}.")
    for part in obs.values() if isinstance(obs, dict) else [obs]:
        if not th.isfinite(part).all():
            raise ValueError(f"`{name}` must be finite, got {observations!r}; check the environment, or what prepares them.")
    return obs


def _shapes(obs: PyTorchObs) -> Any:
    return {key: part.shape[1:] for key, part in obs.items()} if isinstance(obs, dict) else obs.shape[1:]
