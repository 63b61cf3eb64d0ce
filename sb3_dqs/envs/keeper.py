"""A goal, a keeper who dives to the favourite corner, and a shooter who must mix: no single action is good for long."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CORNERS = 0.5 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
# Standard deviation of the reward around a corner
WIDTH = 0.2
# Number of recent shots that the keeper knows
MEMORY = 20


class KeeperEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    One shot at one of four corners. The keeper dives to the corner most often shot at among the last 20 shots, at random
    among equals. Of shooters who do not know the last shots, one who shoots at all corners equally often is the best, and
    scores three times of four; one with a single favourite never scores. Registered as ``sb3_dqs/Keeper-v0``. Episodes are
    one step long; the keeper remembers shots of earlier ones, until ``reset(seed=...)``.

    - Observation: 0, shape (1,)
    - Action: where the ball goes, shape (2,), in [-1, 1]; its quadrant is the corner
    - Reward: 0 if the keeper dives there, else ``exp(-d^2 / 0.08)`` at distance d from the corner's middle (±0.5, ±0.5);
      ``info["corner"]`` is its number, from 0 to 3
    """

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self) -> None:
        self.shots: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.shots = []
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        corner = int(2 * (action[0] > 0) + (action[1] > 0))
        counts = np.bincount(self.shots, minlength=4)
        dive = self.np_random.choice(np.flatnonzero(counts == counts.max()))
        self.shots = [*self.shots, corner][-MEMORY:]
        reward = 0.0 if dive == corner else float(np.exp(-((action - CORNERS[corner]) ** 2).sum() / (2 * WIDTH**2)))
        return np.zeros(1, np.float32), reward, True, False, {"corner": corner}


gym.register("sb3_dqs/Keeper-v0", entry_point="sb3_dqs.envs.keeper:KeeperEnv", max_episode_steps=1)
