"""Replay buffers that sample new transitions more often than old ones."""

from numbers import Integral
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize


class RecentSampling:
    """
    Sampling for a replay buffer: a share of each batch comes from the newest transitions, the rest from all of them, as in
    "Emphasizing Recent Experience" (Wang & Ross 2019, https://arxiv.org/abs/1906.04009), with one window instead of one that
    shrinks.

    Uniform samples from a buffer of 100,000 transitions, 256 per step, hold a new transition 2.5 times within 1,000 steps, so
    that critic and actor lag at the states where the policy acts. Measured: see docs/ablations.md, "Recent transitions".

    :param recent_share: share of the batch that comes from the newest transitions, from 0 to 1
    :param recent_size: how many transitions, of all environments together, are the newest
    :raises ValueError: naming the argument and the value
    """

    recent_share: float
    recent_size: int
    buffer_size: int
    n_envs: int
    pos: int
    full: bool
    optimize_memory_usage: bool

    def __init__(self, *args: Any, recent_share: float = 0.5, recent_size: int = 2_000, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not 0 <= recent_share <= 1:
            raise ValueError(f"`recent_share` must be a number from 0 to 1, got {recent_share!r}.")
        if not isinstance(recent_size, Integral) or recent_size < 1:
            raise ValueError(f"`recent_size` must be an integer >= 1, got {recent_size!r}.")
        self.recent_share, self.recent_size = recent_share, recent_size

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """
        As SB3's.

        :param batch_size: number of transitions
        :param env: environment by which observations and rewards are normalised
        :return: transitions; those of the newest are last
        """
        # With optimize_memory_usage a full buffer has the newest next observation where its oldest one was
        n_rows = self.buffer_size - int(self.optimize_memory_usage) if self.full else self.pos
        n_recent_rows = min(max(self.recent_size // self.n_envs, 1), n_rows)
        n_recent = round(self.recent_share * batch_size)
        ages = np.concatenate(
            [
                np.random.randint(n_rows, size=batch_size - n_recent),
                np.random.randint(n_recent_rows, size=n_recent),
            ]
        )
        return self._get_samples((self.pos - 1 - ages) % self.buffer_size, env=env)  # type: ignore[attr-defined]


class RecentReplayBuffer(RecentSampling, ReplayBuffer):
    """:class:`RecentSampling` for SB3's ``ReplayBuffer``, whose arguments it takes."""


class RecentDictReplayBuffer(RecentSampling, DictReplayBuffer):
    """:class:`RecentSampling` for SB3's ``DictReplayBuffer``, whose arguments it takes."""


class RecentNStepReplayBuffer(RecentSampling, NStepReplayBuffer):
    """:class:`RecentSampling` for SB3's ``NStepReplayBuffer``, whose arguments it takes."""
