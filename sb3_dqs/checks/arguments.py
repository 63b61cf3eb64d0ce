"""The arguments of DQS and of its policies, as far as they can be checked before anything is built."""

import inspect
import operator
import os
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import Schedule, TrainFreq
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_dqs.checks.temperature import check_ent_coef
from sb3_dqs.checks.values import (
    BOOL,
    CALLABLE,
    IGNORED,
    MAPPING,
    MAX_INT,
    SHARE,
    Argument,
    integer,
    is_bool,
    is_int,
    is_real,
    number,
    optional,
    plain,
    show,
)
from sb3_dqs.critics import Critic
from sb3_dqs.denoiser_targets import DENOISER_TARGETS, DenoiserTarget
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.policies import CRITICS

BACKUPS = ("soft", "hard")
EXPLORATION_NOISES = ("white", "pink")


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


def _is_target_entropy(value: Any) -> bool:
    if isinstance(value, str) and value != "auto":
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, str) or is_real(value)


LEARNING_RATE = "a number >= 0 or a function of the remaining progress"
TARGET_ENTROPY = '"auto" (minus the number of action dimensions) or a number'
# One entry per argument of the constructor
ARGUMENT_CHECKS: dict[str, Argument] = {
    "policy": Argument(lambda v: isinstance(v, (str, type)), '"MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a class'),
    "env": Argument(_is_env, "an environment or its name"),
    "learning_rate": Argument(lambda v: callable(v) or is_real(v, 0), LEARNING_RATE, plain),
    "buffer_size": Argument(lambda v: is_int(v, 1, 2**40), "an integer from 1 to 2**40", operator.index),
    "learning_starts": number("a number"),
    "batch_size": integer(1),
    "tau": number("a number from 0 to 1", 0, 1),
    "gamma": number("a number from 0 to 1", 0, 1),
    "train_freq": Argument(
        _is_train_freq, 'an integer >= 1, or a tuple such as (5, "step") or (2, "episode")', _plain_train_freq
    ),
    "gradient_steps": integer(-1, "an integer >= 0, or -1 for as many as steps in the environment"),
    "action_noise": Argument(_is_action_noise, "None or an ActionNoise of SB3"),
    "replay_buffer_class": Argument(_is_replay_buffer_class, "None or a class such as HerReplayBuffer"),
    "replay_buffer_kwargs": MAPPING,
    "optimize_memory_usage": BOOL,
    "n_steps": integer(1),
    "ent_coef": Argument(lambda v: True, "a temperature, see check_ent_coef()"),
    "target_update_interval": integer(1),
    "target_entropy": Argument(_is_target_entropy, TARGET_ENTROPY, plain),
    "use_sde": BOOL,
    "sde_sample_freq": integer(-MAX_INT, "an integer: every how many steps, or -1 for once per rollout"),
    "use_sde_at_warmup": BOOL,
    "stats_window_size": optional(integer(0)),
    "tensorboard_log": Argument(lambda v: v is None or isinstance(v, (str, os.PathLike)), "None or the path of a folder"),
    "policy_kwargs": MAPPING,
    "verbose": Argument(lambda v: is_bool(v) or is_int(v, -MAX_INT), "an integer from 0 to 2", int),
    "seed": optional(Argument(lambda v: is_int(v, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1", operator.index)),
    "device": Argument(_is_device, '"auto", "cpu", "cuda" or another device of torch'),
    "_init_setup_model": BOOL,
    "n_mc_samples": integer(2),
    "own_draws_freq": integer(1),
    "own_share": SHARE,
    "n_draws": integer(1),
    "next_share": SHARE,
    "n_copies": integer(1),
    "policy_delay": integer(1),
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
    "n_critics": integer(1),
    "share_features_extractor": BOOL,
    "critic_class": Argument(
        lambda v: (isinstance(v, str) and v in CRITICS) or _is_critic_class(v),
        f"one of {tuple(CRITICS)}, or a subclass of sb3_dqs.critics.Critic that defines backup_values, loss and energy",
    ),
    "critic_kwargs": MAPPING,
    "diffusion_steps": integer(3),
    "noise": Argument(lambda v: v is None or isinstance(v, NoiseLevels), "None or a NoiseLevels of sb3_dqs.noise"),
    "solver": Argument(callable, "a function, see sb3_dqs.solvers"),
    "n_frequencies": integer(1),
    "best_of_n_by_q": optional(integer(1)),
    "actor_averaging_rate": SHARE,
}


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Check the arguments of :class:`sb3_dqs.DQS` as far as they can be checked before anything is built.

    :param arguments: name and value; names without a check are left out
    :return: the values as plain Python numbers and dictionaries
    :raises ValueError: naming the argument, the value and the remedy
    """
    checked = _checked(arguments, ARGUMENT_CHECKS, "")
    if "learning_rate" in checked:
        check_learning_rate(checked["learning_rate"])
    if "ent_coef" in checked:
        check_ent_coef(checked["ent_coef"])
    policy_kwargs = checked.get("policy_kwargs") or {}
    if "policy_kwargs" in checked:
        checked["policy_kwargs"] = {**policy_kwargs, **_checked(policy_kwargs, POLICY_KWARGS_CHECKS, "policy_kwargs: ")}
    return checked


def _checked(arguments: dict[str, Any], checks: dict[str, Argument], start: str) -> dict[str, Any]:
    for name, check in checks.items():
        if name in arguments and not check.is_valid(arguments[name]):
            raise ValueError(f"{start}`{name}` must be {check.requirement}, got {show(arguments[name])}.")
    return {name: check.convert(arguments[name]) for name, check in checks.items() if name in arguments}


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
            is_valid = is_real(float(value), 0)
        except (TypeError, ValueError, OverflowError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"learning_rate: the function gave {show(value)} at progress_remaining={progress_remaining}; "
                "it must be finite and not negative all the way from 1 to 0."
            )
