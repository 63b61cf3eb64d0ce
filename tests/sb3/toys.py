"""Environments and helpers of these tests."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dqs.critics import MlpCritic
from sb3_dqs.denoiser_targets import DenoiserTarget


class RandomEnv(gym.Env):
    """Samples observations from their space; the reward is a function of the action."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Box):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert action in self.action_space, f"{action} ({action.dtype}) is not in {self.action_space}"
        self.n_steps += 1
        return self.observation_space.sample(), -float(np.mean(action)), False, self.n_steps >= 7, {}


class OneStepEnv(gym.Env):
    """The reset observation is never a next observation; the best action is 0.7 in both dimensions of a matrix."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2, 1), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([1, 0], np.float32), {}

    def step(self, action):
        return np.array([0, 1], np.float32), -5 * float(np.abs(action - 0.7).sum()), True, False, {}


class Recorder(DenoiserTarget):
    """Remembers what the actor's update asks; its answers are the actions themselves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, density, draws):
        self.seen.append((density, draws))
        return draws.u, {}


class TwoRecorders(Recorder):
    """One more for the next states."""

    def __init__(self):
        super().__init__()
        self.next = Recorder()

    @property
    def for_next_states(self):
        return self.next


class RecordingCritic(MlpCritic):
    """Remembers what it is asked."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def backup_values(self, obs, actions):
        self.seen.append((obs, actions))
        return super().backup_values(obs, actions)

    def loss(self, obs, actions, targets):
        self.seen.append((obs, actions, targets))
        return super().loss(obs, actions, targets)


def same(first: Any, second: Any) -> bool:
    """Whether nested dictionaries and lists of tensors, arrays and numbers are equal bit for bit; NaN of an array is."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return th.equal(first, second) if isinstance(first, th.Tensor) else first == second
