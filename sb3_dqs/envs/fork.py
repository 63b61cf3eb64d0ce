"""A ring with four openings: a policy that knows them all still gets out when some are closed."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ANGLES = np.deg2rad([45.0, 135.0, 225.0, 315.0])
# Half the width of an opening
HALF_WIDTH = np.deg2rad(10.0)
# The ring is the wall between these radii
INNER_RADIUS, OUTER_RADIUS = 0.7, 1.0
GOAL_RADIUS = 2.5
GOAL_REWARD = 10.0
STEP_COST = 2.0
WALL_COST = 3.0


class ForkEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point leaves a ring by one of four openings, all of the same length. Registered as ``sb3_dqs/Fork-v0``, with episodes
    of at most 10 steps.

    - Observation: position, shape (2,), in [-4, 4]
    - Action: displacement, shape (2,), shortened to length 1
    - Reward: -2 per step; -3 more where the point runs into the wall, and 10 more at distance 2.5 from the middle. Both end
      the episode; ``info["route"]`` is then, at the goal, the number of the nearest opening, from 0 to 3
    - Start: near the middle, normally distributed with standard deviation 0.05

    :param closed: numbers of the openings that are closed; the observation does not tell
    """

    observation_space = spaces.Box(-4, 4, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, closed: Sequence[int] = ()):
        self.closed = tuple(closed)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = 0.05 * self.np_random.standard_normal(2)
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float64).clip(-1, 1)
        part = action / max(1.0, float(np.linalg.norm(action))) / 10
        hits_wall = False
        for _ in range(10):
            if hits_wall := self._is_wall(self.position + part):
                break
            self.position = self.position + part
        reached = bool(np.linalg.norm(self.position) >= GOAL_RADIUS)
        reward = GOAL_REWARD * reached - STEP_COST - WALL_COST * hits_wall
        info = {"route": self._nearest_opening(self.position)[0]} if reached else {}
        return self.position.astype(np.float32), float(reward), reached or hits_wall, False, info

    @staticmethod
    def _nearest_opening(position: np.ndarray) -> tuple[int, float]:
        """Number of the opening, and the angle to its middle."""
        differences = np.abs((np.arctan2(position[1], position[0]) - ANGLES + np.pi) % (2 * np.pi) - np.pi)
        return int(differences.argmin()), float(differences.min())

    def _is_wall(self, position: np.ndarray) -> bool:
        if not INNER_RADIUS <= np.linalg.norm(position) <= OUTER_RADIUS:
            return False
        opening, difference = self._nearest_opening(position)
        return bool(difference > HALF_WIDTH) or opening in self.closed


gym.register("sb3_dqs/Fork-v0", entry_point="sb3_dqs.envs.fork:ForkEnv", max_episode_steps=10)
