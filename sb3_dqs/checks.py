"""Checks of what the user gives: one clear error, before any work starts."""

import copy
import difflib
import inspect
import math
import operator
import os
import random
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TrainFreq
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from torch import nn

from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import DENOISER_TARGETS, DenoiserTarget
from sb3_dqs.finite import is_finite
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.policies import CRITICS, CnnPolicy, DQSPolicy, MultiInputPolicy
from sb3_dqs.temperature import Temperature, make_temperature

BACKUPS = ("soft", "hard")
EXPLORATION_NOISES = ("white", "pink")
DEFAULT_EXTRACTORS = {DQSPolicy: FlattenExtractor, CnnPolicy: NatureCNN, MultiInputPolicy: CombinedExtractor}
# What the policy gives to its critics; `critic_kwargs` may replace it
CRITIC_ARGUMENTS = ["observation_space", "action_space", "net_arch", "features_extractor", "features_dim", "activation_fn"]
CRITIC_ARGUMENTS += ["normalize_images", "n_critics", "share_features_extractor"]
# Larger integers do not fit into torch's sizes
MAX_INT = 2**31 - 1


class Argument(NamedTuple):
    """
    What an argument must be.

    :param is_valid: test of a value; raises nothing
    :param requirement: what it must be, for the message
    :param convert: to plain Python, from numbers of numpy and torch, fractions and other mappings
    """

    is_valid: Callable[[Any], bool]
    requirement: str
    convert: Callable[[Any], Any] = lambda value: value


def is_int(value: Any, low: int, high: float = MAX_INT) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        return low <= operator.index(value) <= high
    except TypeError:
        return False


def _is_real(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    is_scalar = isinstance(value, (np.ndarray, th.Tensor)) and value.ndim == 0
    if isinstance(value, (bool, np.bool_)) or not (isinstance(value, Real) or is_scalar):
        return False
    try:
        return math.isfinite(float(value)) and low <= float(value) <= high
    except (TypeError, ValueError, OverflowError):
        return False


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _is_target_entropy(value: Any) -> bool:
    if isinstance(value, str) and value != "auto":
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, str) or _is_real(value)


def _plain(value: Any) -> Any:
    return operator.index(value) if is_int(value, -MAX_INT) else float(value) if _is_real(value) else value


def _integer(low: int, requirement: str = "") -> Argument:
    return Argument(lambda v: is_int(v, low), requirement or f"an integer >= {low}", operator.index)


def _number(requirement: str, low: float = -math.inf, high: float = math.inf) -> Argument:
    return Argument(lambda v: _is_real(v, low, high), requirement, _plain)


def _optional(argument: Argument) -> Argument:
    is_valid, requirement, convert = argument
    return Argument(lambda v: v is None or is_valid(v), f"None or {requirement}", lambda v: None if v is None else convert(v))


BOOL = Argument(_is_bool, "True or False", bool)
SHARE = Argument(lambda v: _is_real(v, 0, 1) and v > 0, "a number above 0, at most 1", float)
MAPPING = Argument(
    lambda v: v is None or isinstance(v, Mapping), "a dictionary or None", lambda v: None if v is None else dict(v)
)
CALLABLE = Argument(callable, "a class or a function")
IGNORED = Argument(lambda v: True, "anything: it is ignored")


def _is_net_arch(value: Any) -> bool:
    def is_widths(layers: Any) -> bool:
        return isinstance(layers, (list, tuple)) and all(is_int(width, 1) for width in layers)

    if isinstance(value, dict):
        return {"pi", "qf"} <= set(value) and is_widths(value["pi"]) and is_widths(value["qf"])
    return value is None or is_widths(value)


def _plain_net_arch(value: Any) -> Any:
    if isinstance(value, dict):  # SB3 has arguments with vf, too
        return {name: _plain_net_arch(value[name]) for name in ("pi", "qf")}
    return None if value is None else [operator.index(width) for width in value]


def _is_train_freq(value: Any) -> bool:
    frequency, unit = value if isinstance(value, tuple) and len(value) == 2 else (value, "step")
    return is_int(frequency, 1) and getattr(unit, "value", unit) in ("step", "episode")  # the unit of SB3 is an Enum


def _plain_train_freq(value: Any) -> Any:
    if isinstance(value, TrainFreq):
        return value
    return (operator.index(value[0]), value[1]) if isinstance(value, tuple) else operator.index(value)


def _is_critic_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Critic) and not inspect.isabstract(value)


def _is_replay_buffer_class(value: Any) -> bool:
    if not isinstance(value, type) or issubclass(value, ReplayBuffer):
        return value is None or isinstance(value, type)
    return not issubclass(value, BaseBuffer) and all(hasattr(value, name) for name in ("add", "sample"))


def _is_action_noise(value: Any) -> bool:
    return value is None or (callable(value) and hasattr(value, "reset"))


def _is_optimizer_class(value: Any) -> bool:
    if not isinstance(value, type):
        return callable(value)
    return issubclass(value, th.optim.Optimizer) and not issubclass(value, th.optim.LBFGS)  # which needs a closure


def _is_activation(value: Any) -> bool:
    try:
        module = value()
    except Exception:
        return False
    return isinstance(module, nn.Module) and getattr(type(module), "forward", None) is not nn.Module.forward


def _is_device(value: Any) -> bool:
    try:
        return get_device(value) is not None
    except (RuntimeError, TypeError, ValueError):
        return False


def _is_env(value: Any) -> bool:
    is_openai_gym = any(cls.__module__.partition(".")[0] == "gym" for cls in type(value).__mro__)
    return value is None or is_openai_gym or isinstance(value, (str, gym.Env, VecEnv))


LEARNING_RATE = "a number >= 0 or a function of the remaining progress"
TARGET_ENTROPY = '"auto" (minus the number of action dimensions) or a number'
# One entry per argument of the constructor
ARGUMENT_CHECKS: dict[str, Argument] = {
    "policy": Argument(lambda v: isinstance(v, (str, type)), '"MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a class'),
    "env": Argument(_is_env, "an environment or its name"),
    "learning_rate": Argument(lambda v: callable(v) or _is_real(v, 0), LEARNING_RATE, _plain),
    "buffer_size": Argument(lambda v: is_int(v, 1, 2**40), "an integer from 1 to 2**40", operator.index),
    "learning_starts": _number("a number"),
    "batch_size": _integer(1),
    "tau": _number("a number from 0 to 1", 0, 1),
    "gamma": _number("a number from 0 to 1", 0, 1),
    "train_freq": Argument(
        _is_train_freq, 'an integer >= 1, or a tuple such as (5, "step") or (2, "episode")', _plain_train_freq
    ),
    "gradient_steps": _integer(-1, "an integer >= 0, or -1 for as many as steps in the environment"),
    "action_noise": Argument(_is_action_noise, "None or an ActionNoise of SB3"),
    "replay_buffer_class": Argument(_is_replay_buffer_class, "None or a class such as HerReplayBuffer"),
    "replay_buffer_kwargs": MAPPING,
    "optimize_memory_usage": BOOL,
    "n_steps": _integer(1),
    "ent_coef": Argument(lambda v: True, "a temperature, see check_ent_coef()"),
    "target_update_interval": _integer(1),
    "target_entropy": Argument(_is_target_entropy, TARGET_ENTROPY, _plain),
    "use_sde": BOOL,
    "sde_sample_freq": _integer(-MAX_INT, "an integer: every how many steps, or -1 for once per rollout"),
    "use_sde_at_warmup": BOOL,
    "stats_window_size": _optional(_integer(0)),
    "tensorboard_log": Argument(lambda v: v is None or isinstance(v, (str, os.PathLike)), "None or the path of a folder"),
    "policy_kwargs": MAPPING,
    "verbose": Argument(lambda v: _is_bool(v) or is_int(v, -MAX_INT), "an integer from 0 to 2", int),
    "seed": _optional(Argument(lambda v: is_int(v, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1", operator.index)),
    "device": Argument(_is_device, '"auto", "cpu", "cuda" or another device of torch'),
    "_init_setup_model": BOOL,
    "n_mc_samples": _integer(2),
    "own_draws_freq": _integer(1),
    "own_share": SHARE,
    "n_draws": _integer(1),
    "next_share": SHARE,
    "n_copies": _integer(1),
    "policy_delay": _integer(1),
    "denoiser_target": Argument(
        lambda v: isinstance(v, DenoiserTarget) or (isinstance(v, str) and v in DENOISER_TARGETS),
        f"one of {tuple(DENOISER_TARGETS)} or a DenoiserTarget",
    ),
    "backup": Argument(lambda v: isinstance(v, str) and v in BACKUPS, f"one of {BACKUPS}"),
    "exploration_noise": Argument(lambda v: isinstance(v, str) and v in EXPLORATION_NOISES, f"one of {EXPLORATION_NOISES}"),
    "augmentation": Argument(lambda v: v is None or isinstance(v, nn.Module), "None or a torch.nn.Module"),
    "compile": BOOL,
}
# One entry per argument of DQSPolicy
POLICY_KWARGS_CHECKS: dict[str, Argument] = {
    "net_arch": Argument(_is_net_arch, "None, a list of layer widths >= 1, or dict(pi=[...], qf=[...])", _plain_net_arch),
    "activation_fn": Argument(_is_activation, "a class such as torch.nn.ReLU, or a function that makes a module"),
    "use_sde": BOOL,
    "log_std_init": IGNORED,
    "use_expln": IGNORED,
    "clip_mean": IGNORED,
    "features_extractor_class": CALLABLE,
    "features_extractor_kwargs": MAPPING,
    "normalize_images": BOOL,
    "optimizer_class": Argument(_is_optimizer_class, "a class such as torch.optim.Adam (one that needs no closure)"),
    "optimizer_kwargs": MAPPING,
    "n_critics": _integer(1),
    "share_features_extractor": BOOL,
    "critic_class": Argument(
        lambda v: (isinstance(v, str) and v in CRITICS) or _is_critic_class(v),
        f"one of {tuple(CRITICS)}, or a subclass of sb3_dqs.critics.Critic that defines backup_values, loss and energy",
    ),
    "critic_kwargs": MAPPING,
    "diffusion_steps": _integer(3),
    "noise": Argument(lambda v: v is None or isinstance(v, NoiseLevels), "None or a NoiseLevels of sb3_dqs.noise"),
    "solver": Argument(callable, "a function, see sb3_dqs.solvers"),
    "n_frequencies": _integer(1),
    "best_of_n_by_q": _optional(_integer(1)),
    "actor_averaging_rate": SHARE,
}


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Check the arguments of :class:`sb3_dqs.DQS` as far as they can be checked before anything is built.

    :param arguments: name and value; names without a check are left out
    :return: the values as plain Python numbers and dictionaries
    :raises ValueError: naming the argument, the value and the remedy
    """
    plain = _checked(arguments, ARGUMENT_CHECKS, "")
    if "learning_rate" in plain:
        check_learning_rate(plain["learning_rate"])
    if "ent_coef" in plain:
        check_ent_coef(plain["ent_coef"])
    policy_kwargs = plain.get("policy_kwargs") or {}
    if "policy_kwargs" in plain:
        plain["policy_kwargs"] = {**policy_kwargs, **_checked(policy_kwargs, POLICY_KWARGS_CHECKS, "policy_kwargs: ")}
    return plain


def _checked(arguments: dict[str, Any], checks: dict[str, Argument], start: str) -> dict[str, Any]:
    for name, check in checks.items():
        if name in arguments and not check.is_valid(arguments[name]):
            raise ValueError(f"{start}`{name}` must be {check.requirement}, got {_show(arguments[name])}.")
    return {name: check.convert(arguments[name]) for name, check in checks.items() if name in arguments}


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 500 else f"{text[:500]}..."


def check_learning_rate(learning_rate: float | Schedule, at: Iterable[float] = (1.0, 0.0)) -> None:
    """
    Check a learning rate that is a function.

    :param learning_rate: as the user gave it
    :param at: remaining progress; by default both ends of the training
    :raises ValueError: if it is not a number there, or negative
    """
    if not callable(learning_rate):
        return
    for progress_remaining in at:
        try:
            value: Any = learning_rate(progress_remaining)
        except Exception as error:
            value = error
        try:
            is_valid = _is_real(float(value), 0)
        except (TypeError, ValueError, OverflowError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"learning_rate: the function gave {_show(value)} at progress_remaining={progress_remaining}; "
                "it must be finite and not negative all the way from 1 to 0."
            )


def check_ent_coef(ent_coef: Any) -> None:
    """
    Check a temperature; if it is a function, at both ends of the training.

    :param ent_coef: as the user gave it
    :raises ValueError: if it is none
    """
    try:
        temperature = make_temperature(ent_coef)
        for progress_remaining in (1.0, 0.0):
            temperature(progress_remaining)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("ent_coef"):
            raise
        raise ValueError(
            f"ent_coef={_show(ent_coef)}: it fails ({type(error).__name__}: {error}); pass a positive number, or a function "
            "that gives one all the way from 1 to 0."
        ) from error


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


def check_temperature(temperature: Temperature, progress_remaining: float) -> None:
    """
    Check the present value of a temperature.

    :param temperature: what ``ent_coef`` has made
    :param progress_remaining: remaining progress of the training, from 1 to 0
    :raises ValueError: if the value is not a positive, finite 0-d tensor
    """
    value = temperature(progress_remaining)
    if not (isinstance(value, th.Tensor) and value.ndim == 0 and 0 < value < math.inf):
        raise ValueError(
            f"`ent_coef`: {type(temperature).__name__}.forward({progress_remaining:g}) must return a positive, finite 0-d "
            f"tensor, got {value!r}."
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
            f"policy={policy_class.__name__} is not a policy of DQS: pass MlpPolicy, CnnPolicy or MultiInputPolicy of "
            "sb3_dqs; load a file with the algorithm that saved it."
        )
    is_dict, has_own_extractor = isinstance(observation_space, spaces.Dict), "features_extractor_class" in policy_kwargs
    if issubclass(policy_class, MultiInputPolicy) and not has_own_extractor and not is_dict:
        raise ValueError(
            f'policy=MultiInputPolicy needs dictionary observations, but they are {observation_space}; pass "MlpPolicy", '
            'or "CnnPolicy" for images.'
        )
    if policy_class is DQSPolicy and not has_own_extractor and is_dict:
        raise ValueError(
            f'policy=MlpPolicy cannot read dictionary observations, but they are {observation_space}; pass "MultiInputPolicy".'
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
        if cls not in (CnnPolicy, MultiInputPolicy):
            known |= set(policy_kwargs)  # a class of the user may take names out of **kwargs
    known -= {"args", "kwargs", "observation_space", "action_space", "lr_schedule"}
    for name, value in policy_kwargs.items():
        if name not in known:
            offered = sorted(known - {"use_sde"})
            listed, close = ", ".join(offered), difflib.get_close_matches(str(name), offered, 1)
            hint = f"did you mean {close[0]}? Known are {listed}" if close else f"known are {listed}"
            hint = "it is one of DQS itself" if name in ARGUMENT_CHECKS else hint
            raise ValueError(f"policy_kwargs: {name}={value!r} is not an argument of {policy_class.__name__}; {hint}.")
    extractor = policy_kwargs.get("features_extractor_class", DEFAULT_EXTRACTORS.get(policy_class))
    if has_own_extractor and extractor is (FlattenExtractor if is_dict else CombinedExtractor):
        raise ValueError(
            f"policy_kwargs: features_extractor_class={extractor.__name__} cannot read the observations {observation_space}; "
            "leave it out, with the policy that fits them."
        )
    if extractor in DEFAULT_EXTRACTORS.values():
        _check_extractor_reads(observation_space)
    if extractor is not None:
        extractor_kwargs = policy_kwargs.get("features_extractor_kwargs") or {}
        names = "policy_kwargs: `features_extractor_class` and `features_extractor_kwargs`"
        check_call(names, extractor, [observation_space], {}, extractor_kwargs)
    if policy_kwargs.get("critic_kwargs"):
        names = "policy_kwargs: `critic_class` and `critic_kwargs`"
        signatures = [inspect.signature(cls).parameters for cls in (policy_class, DQSPolicy)]
        default = next(own["critic_class"].default for own in signatures if "critic_class" in own)
        critic = policy_kwargs.get("critic_class", default)
        critic = CRITICS[critic] if isinstance(critic, str) else critic
        check_call(names, critic, [], {}, dict.fromkeys(CRITIC_ARGUMENTS) | policy_kwargs["critic_kwargs"])
    optimizer_class = policy_kwargs.get("optimizer_class", th.optim.Adam)
    optimizer_kwargs = policy_kwargs.get("optimizer_kwargs") or {}
    check_call("policy_kwargs: `optimizer_class` and `optimizer_kwargs`", optimizer_class, [[]], {"lr": 0}, optimizer_kwargs)


def check_call(names: str, function: Callable, args: list[Any], own: dict[str, Any], given: Mapping[str, Any]) -> None:
    """
    Check that a function or class can be called, without calling it.

    :param names: the arguments of DQS that it is made of, for the message
    :param function: the function or class
    :param args: arguments by position
    :param own: keyword arguments that DQS gives
    :param given: keyword arguments of the user
    :raises ValueError: naming the arguments
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    problem = f"{', '.join(own.keys() & given.keys())} is given by DQS" if own.keys() & given.keys() else ""
    try:
        signature.bind(*args, **{**own, **given})
    except TypeError as error:
        problem = problem or str(error)
    if problem:
        given = {name: value for name, value in given.items() if value is not None}
        raise ValueError(
            f"{names} must go together, got {_show(function)} and {_show(given)}: {problem}; "
            f"known arguments are {', '.join(signature.parameters)}."
        )


def check_replay_buffer(arguments: dict[str, Any], observation_space: gym.Space, action_space: gym.Space) -> None:
    """
    Check that the arguments of the replay buffer go together, and with the observations.

    :param arguments: of DQS
    :param observation_space: of the environment
    :param action_space: of the environment
    :raises ValueError: naming the argument, the value and the remedy
    """
    is_dict, buffer_class = isinstance(observation_space, spaces.Dict), arguments["replay_buffer_class"]
    if buffer_class is None:
        buffer_class = DictReplayBuffer if is_dict else ReplayBuffer
    elif issubclass(buffer_class, DictReplayBuffer) and not is_dict:
        raise ValueError(
            f"replay_buffer_class={buffer_class.__name__}: it needs dictionary observations, but they are "
            f"{observation_space}; leave the argument out, or give the observations names."
        )
    if issubclass(buffer_class, DictReplayBuffer) and arguments["optimize_memory_usage"]:
        raise ValueError(f"`optimize_memory_usage` must be False for {buffer_class.__name__}, got True.")
    own = {"device": None, "n_envs": 1, "optimize_memory_usage": False}
    if "env" in inspect.signature(buffer_class).parameters:
        own["env"] = None
    names = "`replay_buffer_class` and `replay_buffer_kwargs`"
    check_call(names, buffer_class, [1, observation_space, action_space], own, arguments["replay_buffer_kwargs"] or {})


def check_buffer_fits(buffer: Any, observation_space: gym.Space, action_space: gym.Space) -> None:
    """
    Check that a replay buffer is one of the present environment.

    :param buffer: replay buffer
    :param observation_space: of the environment
    :param action_space: of the environment
    :raises ValueError: naming the shapes
    """
    found = buffer.obs_shape, buffer.action_dim
    expected = get_obs_shape(observation_space), get_action_dim(action_space)
    if found != expected:
        raise ValueError(f"observations and actions of shape {found}, where {expected} are needed")


def check_action_noise(action_noise: ActionNoise | None, action_space: spaces.Box) -> None:
    """
    Draw from a copy of the noise, with the state of numpy's and Python's generators kept.

    :param action_noise: of one environment
    :param action_space: of the environment
    :raises ValueError: if the noise fails, has another shape than an action, or is not finite
    """
    if action_noise is None or isinstance(action_noise, VectorizedActionNoise):
        return
    states = np.random.get_state(), random.getstate()
    try:
        noise: Any = np.asarray(copy.deepcopy(action_noise)(), np.float64)
        is_valid = np.broadcast_shapes(noise.shape, action_space.shape) == action_space.shape and is_finite(noise)
    except Exception as error:
        noise, is_valid = error, False
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
    if not is_valid:
        raise ValueError(
            f"`action_noise` must give finite numbers of the shape {action_space.shape} of an action, got {noise!r} from "
            f"{action_noise!r}."
        )


def make_checked_env(env: GymEnv | str | None, verbose: int = 0) -> GymEnv | None:
    """
    Make the environment if it is given by name, convert one of OpenAI Gym as SB3 does, and check its spaces.

    :param env: the environment, its name, or None
    :param verbose: whether to say that it is made
    :return: the environment
    :raises ValueError: for actions that are no box of finite size, and for observations that SB3 cannot read
    """
    made = maybe_make_env(env, verbose) if env is not None else None
    if made is None:
        return None
    if not isinstance(made, VecEnv):
        made = _patch_env(made)
    try:
        _check_action_space(made.action_space)
        _check_observation_space(made.observation_space)
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
    if not np.issubdtype(action_space.dtype, np.floating):
        raise ValueError(
            f"env: the action space {action_space} holds integers, to which the replay buffer would round the actions in "
            "[-1, 1]; give the space dtype=numpy.float32, and round in the environment."
        )
    if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
        raise ValueError(
            f"env: the action space {action_space} has infinite bounds, but DQS draws actions from a box; "
            "give the space finite bounds, in the environment or by a wrapper that replaces its action_space."
        )
    with np.errstate(over="ignore"):
        width = action_space.high - action_space.low
    if not np.isfinite(width).all():
        raise ValueError(
            f"env: the width of the action space {action_space} is not finite in {action_space.dtype}; give it nearer bounds."
        )
    if width.size == 0 or not (width > 0).all():
        raise ValueError(
            f"env: the action space {action_space} is empty, or has a dimension whose low is not below its high; "
            "remove that dimension from the action."
        )


READABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _parts(observation_space: gym.Space) -> dict[str, gym.Space]:
    return observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}


def _check_observation_space(observation_space: gym.Space) -> None:
    start = f"env: the observation space {observation_space}"
    if not _parts(observation_space):
        raise ValueError(f"{start} is empty; give it at least one part.")
    for space in _parts(observation_space).values():
        if not isinstance(space, READABLE):
            raise ValueError(
                f"{start} cannot be read by SB3; it must be a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these "
                "(gymnasium.wrappers.FlattenObservation makes a Box)."
            )
        if isinstance(space, spaces.Box) and (space.shape == () or 0 in space.shape):
            raise ValueError(f"{start} has shape {space.shape}, which SB3's replay buffers cannot hold; give it shape (1,).")
        if np.any(getattr(space, "start", 0) != 0):
            raise ValueError(
                f"{start} does not count from 0, as SB3 does; subtract `start` in the environment, or with "
                "gymnasium.wrappers.TransformObservation."
            )
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
            raise ValueError(f"{start} has more than one dimension; flatten it.")


def _check_extractor_reads(observation_space: gym.Space) -> None:
    """What SB3's features extractor of dictionaries cannot read; one of the user may."""
    for name in observation_space.spaces if isinstance(observation_space, spaces.Dict) else ():
        if name == "" or "." in name:
            raise ValueError(
                f"env: the observation space {observation_space} has the key {name!r}, which cannot be the name of a module "
                "of torch; give it one without a dot."
            )
