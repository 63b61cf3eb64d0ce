"""
Latents of the actions that DQS explores with.

The sampler maps a standard normal latent to an action of the policy. Latents that are standard normal each, but correlated
over time, reach states further from the start. They are correlated with the observation, too, to which earlier latents have
led: given the observation, actions of a rollout are not distributed as the policy. DQS learns off-policy, so this is allowed.
"""

from collections.abc import Sequence

import torch as th
from torch import nn


class PinkLatents(nn.Module):
    """
    Standard normal latents, correlated over time as pink noise, which has equal power per octave of frequency. As action noise
    of SAC and MPO it explores better than white noise on a wide range of tasks (Eberhard et al. 2023,
    https://openreview.net/forum?id=hQ9V5QN27eS).

    A latent is the sum of first-order autoregressive processes of equal variance, whose spectra together are near 1/f between
    the longest and the shortest time constant. The correlation over k steps is the mean of ``exp(-k / time_constant)``.
    Environments and action dimensions are independent. The noise goes on where an episode ends.

    :param action_dim: number of action dimensions d
    :param time_constants: time constants of the processes, in steps; 0 makes a process white noise
    """

    correlations: th.Tensor

    def __init__(self, action_dim: int, time_constants: Sequence[float] = (0, 2, 8, 32, 128)):
        super().__init__()
        times = th.tensor(time_constants, dtype=th.float32)
        self.register_buffer("correlations", (-1 / times).exp(), persistent=False)  # 0 for a time constant of 0
        self.states = th.empty(0, action_dim, len(times))

    def get_extra_state(self) -> th.Tensor:
        return self.states  # no buffer, because a model may be loaded for another number of environments

    def set_extra_state(self, state: th.Tensor) -> None:
        if state.shape[1:] != self.states.shape[1:] or not state.isfinite().all():
            shape = ", ".join(map(str, self.states.shape[1:]))
            raise RuntimeError(
                f"state of the pink latents must be finite, of shape (n_envs, {shape}), got {tuple(state.shape)}"
            )
        self.states = state

    def forward(self, n_envs: int) -> th.Tensor:
        """
        Draw the latents of the next step.

        :param n_envs: number of environments; if it differs from that of the last call, all processes are drawn anew
        :return: shape (n_envs, action_dim)
        """
        shape = (n_envs, *self.states.shape[1:])
        noise = th.randn(shape, device=self.correlations.device)
        if self.states.shape == shape:
            noise = self.correlations * self.states.to(noise.device) + (1 - self.correlations**2).sqrt() * noise
        self.states = noise
        return noise.sum(dim=2) / noise.shape[2] ** 0.5
