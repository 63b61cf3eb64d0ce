"""Small networks, for observations of three numbers."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_dqs.actor import Actor
from sb3_dqs.critics import MlpCritic

OBS = spaces.Box(-1, 1, (3,), np.float32)


def make(cls: type, action_dim: int, net_arch: tuple[int, ...], **kwargs: Any):
    """With as many observation features as observations, in evaluation mode."""
    actions = spaces.Box(-1, 1, (action_dim,), np.float32)
    return cls(OBS, actions, list(net_arch), FlattenExtractor(OBS), 3, **kwargs).eval()


def make_actor(action_dim: int = 2, net_arch: tuple[int, ...] = (16,), cls: type[Actor] = Actor, **kwargs: Any) -> Actor:
    return make(cls, action_dim, net_arch, **kwargs)


def make_critic(action_dim: int = 2, net_arch: tuple[int, ...] = (16,), **kwargs: Any) -> MlpCritic:
    return make(MlpCritic, action_dim, net_arch, **kwargs)
