"""The environment and its spaces."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.patch_gym import _patch_env

READABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


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
