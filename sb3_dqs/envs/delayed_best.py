"""A near goal that is good, and a far one that is better: the value of the far one arrives late."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

NEAR, FAR = -1.0, 6.0
NEAR_REWARD, FAR_REWARD = 5.0, 20.0


class DelayedBestEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A point on a line between a goal at -1, one step away, and a better goal at 6, six steps away; small steps cost.
    Registered as ``sb3_dqs/DelayedBest-v0``, with episodes of at most 20 steps.

    - Observation: position divided by 6, shape (1,), in [-1, 1.2]
    - Action: displacement, shape (1,), in [-1, 1]
    - Reward: ``-(1 - action^2)``, and 5 more at -1 or 20 more at 6, which end the episode; ``info["goal"]`` is then "near"
      or "far"
    - Start: 0
    """

    observation_space = spaces.Box(-1, 1.2, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        displacement = float(np.clip(action[0], -1, 1))
        self.position += displacement
        is_near, is_far = self.position <= NEAR + 1e-6, self.position >= FAR - 1e-6
        reward = displacement**2 - 1 + NEAR_REWARD * is_near + FAR_REWARD * is_far
        info = {"goal": "near" if is_near else "far"} if is_near or is_far else {}
        return np.array([self.position / FAR], np.float32), float(reward), is_near or is_far, False, info


gym.register("sb3_dqs/DelayedBest-v0", entry_point="sb3_dqs.envs.delayed_best:DelayedBestEnv", max_episode_steps=20)
