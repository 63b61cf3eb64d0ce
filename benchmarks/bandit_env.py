"""A one-step bandit whose Boltzmann distribution is known on a grid."""

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dqs.diagnostics.metrics import box_grid

CENTERS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
HEIGHTS = np.array([0.85, 0.9, 0.95, 1.0])
WIDTH = 0.2


def reward(actions: np.ndarray) -> np.ndarray:
    """
    Four Gaussian bumps of unequal height.

    :param actions: shape (..., 2)
    :return: shape (...)
    """
    squared_distances = ((actions[..., None, :] - CENTERS) ** 2).sum(axis=-1)
    return (HEIGHTS * np.exp(-squared_distances / (2 * WIDTH**2))).sum(axis=-1)


def mode_of(actions: np.ndarray) -> np.ndarray:
    """
    Index of the nearest bump: the bumps sit in the middles of the quadrants.

    :param actions: shape (..., 2)
    :return: shape (...)
    """
    return ((actions[..., None, :] - CENTERS) ** 2).sum(axis=-1).argmin(axis=-1)


def boltzmann_grid(ent_coef: float, n: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """
    The exact policy ``exp(r / ent_coef) / Z`` on a grid.

    :param ent_coef: temperature
    :param n: points per dimension
    :return: grid of shape (n, n, 2) and probabilities of shape (n, n) that add up to 1
    """
    grid = box_grid(2, n, th.float64).reshape(n, n, 2).numpy()
    log_density = reward(grid) / ent_coef
    density = np.exp(log_density - log_density.max())
    return grid, density / density.sum()


class BanditEnv(gym.Env):
    """One state, one step, reward of :func:`reward`."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray):
        return np.zeros(1, np.float32), float(reward(action)), True, False, {}
