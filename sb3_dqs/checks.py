"""Checks of what the user and the environment give: one clear error, before any work starts."""

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import DENOISER_TARGETS, DenoiserTarget
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.policies import DQSPolicy, MultiInputPolicy
from sb3_dqs.temperature import make_temperature

BACKUPS = ("soft", "hard")


def is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _is_real(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return (
        isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value)) and low <= float(value) <= high
    )


def _is_net_arch(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"pi", "qf"} and all(_is_net_arch(layers) for layers in value.values())
    return value is None or (isinstance(value, list) and all(is_int(width, 1) for width in value))


def _is_train_freq(value: Any) -> bool:
    frequency, unit = value if isinstance(value, tuple) and len(value) == 2 else (value, "step")
    return is_int(frequency, 1) and getattr(unit, "value", unit) in ("step", "episode")  # the unit of SB3 is an Enum


def _is_critic_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Critic) and not inspect.isabstract(value)


# Argument: (test, what it must be)
ARGUMENT_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda v: callable(v) or _is_real(v, 0), "a number >= 0 or a function of the remaining progress"),
    "buffer_size": (lambda v: is_int(v, 1), "an integer >= 1"),
    "learning_starts": (lambda v: _is_real(v, 0), "a number >= 0"),
    "batch_size": (lambda v: is_int(v, 1), "an integer >= 1"),
    "tau": (lambda v: _is_real(v, 0, 1), "a number from 0 to 1"),
    "gamma": (lambda v: _is_real(v, 0, 1), "a number from 0 to 1"),
    "gradient_steps": (lambda v: is_int(v, -1), "an integer >= 0, or -1 for as many as steps in the environment"),
    "n_steps": (lambda v: is_int(v, 1), "an integer >= 1"),
    "target_update_interval": (lambda v: is_int(v, 1), "an integer >= 1"),
    "target_entropy": (lambda v: v == "auto" or _is_real(v), '"auto" (minus the number of action dimensions) or a number'),
    "sde_sample_freq": (lambda v: v == -1 or is_int(v, 1), "an integer >= 1, or -1 for once per rollout"),
    "n_mc_samples": (lambda v: is_int(v, 2), "an integer >= 2"),
    "own_share": (lambda v: _is_real(v, 0, 1) and v > 0, "a number above 0, at most 1"),
    "own_draws_freq": (lambda v: is_int(v, 1), "an integer >= 1"),
    "n_draws": (lambda v: is_int(v, 1), "an integer >= 1"),
    "next_share": (lambda v: _is_real(v, 0, 1) and v > 0, "a number above 0, at most 1"),
    "n_copies": (lambda v: is_int(v, 1), "an integer >= 1"),
    "policy_delay": (lambda v: is_int(v, 1), "an integer >= 1"),
    "denoiser_target": (
        lambda v: isinstance(v, DenoiserTarget) or (isinstance(v, str) and v in DENOISER_TARGETS),
        f"one of {tuple(DENOISER_TARGETS)} or a DenoiserTarget",
    ),
    "augmentation": (lambda v: v is None or isinstance(v, nn.Module), "None or a torch.nn.Module"),
    "backup": (lambda v: v in BACKUPS, f"one of {BACKUPS}"),
    "compile": (lambda v: isinstance(v, bool), "True or False"),
    "train_freq": (_is_train_freq, 'an integer >= 1, or a tuple such as (5, "step") or (2, "episode")'),
    "replay_buffer_class": (lambda v: v is None or isinstance(v, type), "None or a class such as HerReplayBuffer"),
    "action_noise": (lambda v: v is None or isinstance(v, ActionNoise), "None or an ActionNoise of SB3"),
    "use_sde": (lambda v: isinstance(v, bool), "True or False"),
    "use_sde_at_warmup": (lambda v: isinstance(v, bool), "True or False"),
    "policy_kwargs": (lambda v: v is None or isinstance(v, dict), "a dictionary or None"),
}
POLICY_KWARGS_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "net_arch": (_is_net_arch, "None, a list of layer widths >= 1, or dict(pi=[...], qf=[...])"),
    "critic_class": (
        lambda v: v in ("batch_norm", "mlp") or _is_critic_class(v),
        '"batch_norm", "mlp", or a subclass of sb3_dqs.critics.Critic with its three methods',
    ),
    "critic_kwargs": (lambda v: v is None or isinstance(v, dict), "a dictionary or None"),
    "diffusion_steps": (lambda v: is_int(v, 3), "an integer >= 3"),
    "noise": (lambda v: v is None or isinstance(v, NoiseLevels), "None or a NoiseLevels of sb3_dqs.noise"),
    "solver": (callable, "a function, see sb3_dqs.solvers"),
    "n_frequencies": (lambda v: is_int(v, 1), "an integer >= 1"),
    "n_critics": (lambda v: is_int(v, 1), "an integer >= 1"),
    "best_of_n_by_q": (lambda v: v is None or is_int(v, 1), "None or an integer >= 1"),
    "share_features_extractor": (lambda v: isinstance(v, bool), "True or False"),
    "activation_fn": (lambda v: isinstance(v, type) and issubclass(v, nn.Module), "a class such as torch.nn.ReLU"),
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """
    Check the arguments of :class:`sb3_dqs.DQS` as far as they can be checked before anything is built.

    :param arguments: name and value; names without a check pass
    :raises ValueError: naming the argument, the value and the remedy
    """
    for name, (is_valid, requirement) in ARGUMENT_CHECKS.items():
        if name in arguments and not is_valid(arguments[name]):
            raise ValueError(f"`{name}` must be {requirement}, got {arguments[name]!r}.")
    if "ent_coef" in arguments:
        temperature = make_temperature(arguments["ent_coef"])
        for progress_remaining in (1.0, 0.0):
            temperature(progress_remaining)  # a schedule must be positive at both ends

    policy_kwargs = arguments.get("policy_kwargs") or {}
    for name, (is_valid, requirement) in POLICY_KWARGS_CHECKS.items():
        if name in policy_kwargs and not is_valid(policy_kwargs[name]):
            raise ValueError(f"policy_kwargs: `{name}` must be {requirement}, got {policy_kwargs[name]!r}.")


def check_learning_rate(learning_rate: float | Schedule) -> None:
    """
    Check a learning rate that is a function, at both ends of the training.

    :param learning_rate: as the user gave it
    :raises ValueError: if it is not a number there, or negative
    """
    if not callable(learning_rate):
        return
    for progress_remaining in (1.0, 0.0):
        value = learning_rate(progress_remaining)
        try:
            is_valid = _is_real(float(value), 0)
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"learning_rate: the function gave {value!r} at progress_remaining={progress_remaining}; "
                "it must be finite and not negative all the way from 1 to 0."
            )


def check_target_entropy(target_entropy: float, action_dim: int) -> None:
    """
    Check that some policy has the target entropy: without one, the tuned temperature would rise for ever.

    :param target_entropy: in nats
    :param action_dim: d
    :raises ValueError: if the entropy of the uniform policy, d log 2, is below
    """
    if target_entropy >= action_dim * math.log(2):
        raise ValueError(
            f"target_entropy={target_entropy!r} cannot be reached: it must be below {action_dim * math.log(2):.2f}, the "
            f"entropy of uniform actions in [-1, 1]^{action_dim}."
        )


def check_policy(policy_class: type, policy_kwargs: dict[str, Any], observation_space: gym.Space) -> None:
    """
    Check that the policy is one of DQS, fits the observations, and knows all the names in ``policy_kwargs``.

    :param policy_class: class of the policy
    :param policy_kwargs: as the user gave them
    :param observation_space: of the environment
    :raises ValueError: naming the argument, the value and the remedy
    """
    if not issubclass(policy_class, DQSPolicy):
        raise ValueError(
            f"policy={policy_class.__name__} is not a policy of DQS: pass MlpPolicy, CnnPolicy or MultiInputPolicy of sb3_dqs "
            "(a file that another algorithm saved can only be loaded by that algorithm)."
        )
    if issubclass(policy_class, MultiInputPolicy) and not isinstance(observation_space, spaces.Dict):
        raise ValueError(
            f'policy=MultiInputPolicy needs dictionary observations, but they are {observation_space}; pass "MlpPolicy", '
            'or "CnnPolicy" for images.'
        )
    known: set[str] = set()
    for cls in policy_class.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls).parameters.values()
        known |= {parameter.name for parameter in parameters}
        # Subclasses that pass **kwargs on are asked for the names of their parents, too
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    known -= {"args", "kwargs", "observation_space", "action_space", "lr_schedule"}
    for name, value in policy_kwargs.items():
        if name not in known:
            raise ValueError(
                f"policy_kwargs: {name}={value!r} is not an argument of {policy_class.__name__}; "
                f"known are {', '.join(sorted(known - {'use_sde'}))}."
            )


def make_checked_env(env: GymEnv | str | None, verbose: int = 0) -> GymEnv | None:
    """
    Make the environment if it is given by name, and check its action space.

    :param env: the environment, its name, or None
    :param verbose: whether to say that it is made
    :return: the environment
    :raises ValueError: if the action space is not a box with finite bounds
    """
    made = maybe_make_env(env, verbose) if env is not None else None
    if made is None:
        return None
    try:
        _check_action_space(made.action_space)
    except ValueError:
        if isinstance(env, str):
            made.close()
        raise
    return made


def _check_action_space(action_space: gym.Space) -> None:
    if not isinstance(action_space, spaces.Box):
        raise ValueError(
            f"env: the action space is {action_space}, but DQS needs continuous actions (gymnasium.spaces.Box); "
            "for discrete actions use DQN or PPO."
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(
            f"env: the action space {action_space} has infinite bounds, but DQS draws actions from a box; "
            "give the space finite bounds, in the environment or by a wrapper that replaces its action_space."
        )
    if action_space.low.size == 0 or not (action_space.low < action_space.high).all():
        raise ValueError(
            f"env: the action space {action_space} is empty, or has a dimension whose low is not below its high; "
            "remove that dimension from the action."
        )


def check_finite(what: str, value: Any, num_timesteps: int) -> None:
    """
    Stop at the first number that is not finite.

    :param what: what the value is, for the message
    :param value: a number, an array or a dictionary of arrays
    :param num_timesteps: when
    :raises ValueError: naming the quantity and the step
    """
    for part, array in value.items() if isinstance(value, dict) else [("", value)]:
        if not np.isfinite(array).all():
            name = f"{what} [{part}]" if part else what
            raise ValueError(
                f"{name} is not finite at step {num_timesteps}: {array}. Earlier checkpoints are not affected. If it came "
                "from the environment, fix it there (gymnasium's check_env and SB3's VecCheckNan find the place); if "
                "it is a loss, lower learning_rate or scale the rewards (VecNormalize), and go on from the last checkpoint."
            )
