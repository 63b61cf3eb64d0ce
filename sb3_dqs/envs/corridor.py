"""A hall whose goal is behind one of eight doors: does a policy that learned to move, in whatever direction, find it?"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

N_DOORS = 8
# Half the width of a door
HALF_WIDTH = np.deg2rad(15.0)
# The wall: a circle that the point crosses at the open door only
HALL_RADIUS = 2.0
GOAL_RADIUS = 3.5
GOAL_REWARD = 10.0
POSITION_LIMIT = 25.0


class CorridorEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point with inertia, after the pretraining task of Haarnoja et al. (2017), "Reinforcement Learning with Deep Energy-Based
    Policies", https://arxiv.org/abs/1702.08165, section 5.2. Registered as ``sb3_dqs/Corridor-v0``, with episodes of at most
    20 steps.

    - Observation: position divided by 5, and velocity, shape (4,), in [-5, 5]
    - Action: force, shape (2,), shortened to length 1; the velocity becomes the mean of velocity and force
    - Reward without a door, for pretraining: the speed, which is at most 1, whatever its direction
    - Reward with a door: 10 at distance 3.5 from the middle, which ends the episode, ``info["is_success"]`` is then True; else
      0. The wall of the hall, a circle of radius 2, stops the point except at the open door, which is 30 degrees wide
    - Start: at rest near the middle, normally distributed with standard deviation 0.05

    :param door: number of the open door, from 0 to 7, counterclockwise from the first axis; None for the open field
    :raises ValueError: for another ``door``
    """

    observation_space = spaces.Box(-POSITION_LIMIT / 5, POSITION_LIMIT / 5, (4,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, door: int | None = None):
        if door is not None and door not in range(N_DOORS):
            raise ValueError(f"`door` must be an integer from 0 to {N_DOORS - 1}, or None for the open field, got {door}.")
        self.door = door

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = 0.05 * self.np_random.standard_normal(2)
        self.velocity = np.zeros(2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        force = np.asarray(action, np.float64).clip(-1, 1)
        self.velocity = 0.5 * self.velocity + 0.5 * force / max(1.0, float(np.linalg.norm(force)))
        if self.door is None:
            self.position = (self.position + self.velocity).clip(-POSITION_LIMIT, POSITION_LIMIT)
            return self._observation(), float(np.linalg.norm(self.velocity)), False, False, {}
        part = self.velocity / 10
        for _ in range(10):
            position = self.position + part
            is_crossing = (np.linalg.norm(self.position) <= HALL_RADIUS) != (np.linalg.norm(position) <= HALL_RADIUS)
            if is_crossing and self._angle_to_door(position) > HALF_WIDTH:
                self.velocity = np.zeros(2)
                break
            self.position = position
        reached = bool(np.linalg.norm(self.position) >= GOAL_RADIUS)
        return self._observation(), GOAL_REWARD * reached, reached, False, {"is_success": reached}

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.position / 5, self.velocity]).astype(np.float32)

    def _angle_to_door(self, position: np.ndarray) -> float:
        assert self.door is not None
        difference = np.arctan2(position[1], position[0]) - 2 * np.pi * self.door / N_DOORS
        return float(np.abs((difference + np.pi) % (2 * np.pi) - np.pi))


gym.register("sb3_dqs/Corridor-v0", entry_point="sb3_dqs.envs.corridor:CorridorEnv", max_episode_steps=20)
