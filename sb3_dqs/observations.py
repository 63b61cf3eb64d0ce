"""Batches of observations: a tensor, or a dictionary of tensors."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import PyTorchObs


def select(obs: PyTorchObs, rows: slice | th.Tensor) -> PyTorchObs:
    """
    Some observations of a batch.

    :param obs: Observation
    :param rows: a slice, or indices
    :return: observations of the same kind
    """
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]


def count(obs: PyTorchObs) -> int:
    """
    Number of observations of a batch.

    :param obs: Observation
    :return: number of rows
    """
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


def where(condition: th.Tensor, obs: PyTorchObs, other: PyTorchObs) -> PyTorchObs:
    """
    Rows of one of two batches.

    :param condition: True for rows of ``obs``, shape (batch_size,)
    :param obs: Observation
    :param other: observations of the same space
    :return: observations of the same kind
    """
    if isinstance(obs, dict):
        assert isinstance(other, dict)  # for type checker
        return {key: where(condition, value, other[key]) for key, value in obs.items()}  # type: ignore[misc]
    assert isinstance(other, th.Tensor)  # for type checker
    return th.where(condition.reshape(-1, *[1] * (obs.dim() - 1)), obs, other)


def zero_observations(space: spaces.Space, n: int, device: th.device) -> PyTorchObs:
    """
    A batch of zeros.

    :param space: Observation space
    :param n: number of observations
    :param device: device
    :return: observations as a replay buffer returns them
    """
    if isinstance(space, spaces.Dict):
        return {key: zero_observations(part, n, device) for key, part in space.spaces.items()}  # type: ignore[misc]
    return th.as_tensor(np.zeros((n, *get_obs_shape(space)), space.dtype), device=device)
