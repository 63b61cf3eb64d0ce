"""What collects experience: the replay buffer, and the noise added to actions."""

import copy
import inspect
import random
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape

from sb3_dqs.checks.policy import check_call
from sb3_dqs.finite import is_finite


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
