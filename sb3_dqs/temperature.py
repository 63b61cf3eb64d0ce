"""
The temperature of the policy, SB3's ``ent_coef``: fixed, scheduled, or tuned to reach a target entropy.

A temperature of your own is a :class:`Temperature`; pass an instance to ``DQS(ent_coef=...)``.
"""

import copy
import math
from functools import partial

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_dqs.running_mean import RunningMean
from sb3_dqs.warn_once import warn_once


class Temperature(nn.Module):
    """The methods of a temperature that ``DQS.train()`` calls. Its buffers are saved with the model."""

    def forward(self, progress_remaining: float) -> th.Tensor:
        """
        The present temperature.

        :param progress_remaining: remaining progress of the training, from 1 to 0
        :return: positive, 0-d
        """
        raise NotImplementedError

    def update(self, entropy: th.Tensor, learning_rate: float) -> th.Tensor | None:
        """
        Called once per gradient step; does nothing unless overridden.

        :param entropy: estimate of the policy's entropy at the next states of the batch, in nats, 0-d
        :param learning_rate: present learning rate
        :return: the loss before the step, 0-d, to log; or None
        """
        return None

    def bound(self, q_spread: th.Tensor) -> None:
        """
        Called after each update by ``actor_loss()``; does nothing unless overridden.

        :param q_spread: standard deviation of Q over uniform actions at a state, root mean square over states, 0-d
        """


class FixedTemperature(Temperature):
    """
    A constant.

    :param value: temperature, positive
    """

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, progress_remaining: float) -> th.Tensor:
        return th.tensor(self.value)


def log_linear(initial: float, final: float, progress_remaining: float) -> float:
    """From ``initial`` to ``final``, linearly in the logarithm: the anneal of the paper."""
    return math.exp(progress_remaining * math.log(initial) + (1 - progress_remaining) * math.log(final))


class ScheduledTemperature(Temperature):
    """
    A function of the remaining progress.

    :param schedule: from the remaining progress (1 to 0) to the temperature
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, progress_remaining: float) -> th.Tensor:
        value = float(self.schedule(progress_remaining))
        if not (0 < value < math.inf):
            raise ValueError(
                f"ent_coef: the schedule gave {value} at progress_remaining={progress_remaining:.3f}; "
                "it must be positive and finite all the way from 1 to 0."
            )
        return th.tensor(value)


class AutoTemperature(Temperature):
    """
    Temperature tuned by gradient steps on its logarithm, as in SAC (Haarnoja et al. 2018,
    https://arxiv.org/abs/1812.05905, equation (18)): it falls while the entropy is above the target.

    A step is ``learning_rate * clamp(gain * mean_error, -max_rise, 1)``; Adam's steps would have the same size whatever the
    error. Upwards the limit is larger than SAC's, one learning rate, because Q grows faster than that when returns improve.

    :param initial: initial value, positive
    :param target_entropy: in nats
    :param action_dim: d. An error of d/2 nats is that of a temperature e times too high, for a quadratic Q
    :param gain: steps in learning rates per unit of the error. Measured together with ``max_rise`` on HalfCheetah-v5: entropy
        -6.2, -6.2, -6.3 after 30,000 steps (target -6)
    :param max_rise: largest step upwards, in learning rates. With 1 the entropy fell to -8.3, -6.9, -7.1 there
    :param error_update_rate: rate of the running mean of the error: a memory of 20 steps, not measured
    :param min_ratio: least temperature, in standard deviations of Q over uniform actions. Derived: with a quadratic Q the
        policy has a standard deviation of ``0.6 * ratio**0.5``, here 0.002 of a box of width 2, nearly a point
    :param max_ratio: the temperature does not rise above this, likewise. Derived: Q moves the log-density by a hundredth,
        so that the policy is uniform, and a higher temperature cannot make it broader
    """

    log_ent_coef: th.Tensor
    log_max: th.Tensor

    def __init__(
        self,
        initial: float,
        target_entropy: float,
        action_dim: int,
        gain: float = 10.0,
        max_rise: float = 3.0,
        error_update_rate: float = 0.05,
        min_ratio: float = 1e-5,
        max_ratio: float = 100.0,
    ):
        super().__init__()
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.has_warned = False
        self.target_entropy, self.action_dim = target_entropy, action_dim
        self.gain, self.max_rise = gain, max_rise
        self.register_buffer("log_ent_coef", th.tensor([math.log(initial)]))  # of SAC's shape
        self.register_buffer("log_max", th.tensor(math.inf))
        self.mean_error = RunningMean(0.0, error_update_rate)

    def forward(self, progress_remaining: float) -> th.Tensor:
        return self.log_ent_coef.exp().squeeze()

    @th.no_grad()
    def update(self, entropy: th.Tensor, learning_rate: float) -> th.Tensor:
        self.mean_error.update((entropy - self.target_entropy) / (self.action_dim / 2))
        gradient = (self.gain * self.mean_error.value).clamp(-self.max_rise, 1)
        loss = self.log_ent_coef * gradient
        highest = th.maximum(self.log_ent_coef, self.log_max)
        self.log_ent_coef.copy_(th.minimum(self.log_ent_coef - learning_rate * gradient, highest))
        return loss.squeeze()

    @th.no_grad()
    def bound(self, q_spread: th.Tensor) -> None:
        if not 0 < q_spread < math.inf:  # a critic that does not depend on the action gives no scale
            return
        log_min = (q_spread * self.min_ratio).log()
        self.log_max.copy_((q_spread * self.max_ratio).log())
        is_lowest = self.log_ent_coef < log_min
        is_highest = self.log_ent_coef >= self.log_max and self.mean_error.value < 0
        if (is_lowest or is_highest) and not self.has_warned:
            self.has_warned = True
            warn_once(
                f"ent_coef={self.log_ent_coef.exp().item():.2g} is at its bound: Q varies by {q_spread.item():.2g} over the "
                f"actions, and the policy does not reach target_entropy={self.target_entropy:g} with it: it is nearly "
                f"{'a point; raise' if is_lowest else 'uniform; lower'} target_entropy, or fix ent_coef."
            )
        self.log_ent_coef.clamp_(min=log_min)


def read_target_entropy(target_entropy: str | float, action_dim: int) -> float:
    """
    Read ``target_entropy``: ``"auto"`` is -d, as in SAC.

    :param target_entropy: as the user gave it
    :param action_dim: d
    :return: in nats
    """
    return -float(action_dim) if target_entropy == "auto" else float(target_entropy)


def make_temperature(
    ent_coef: str | float | Schedule | Temperature, target_entropy: float = -1.0, action_dim: int = 1
) -> Temperature:
    """
    Read ``ent_coef``: ``"auto"``, ``"auto_0.1"`` (tuned, from 1 or from 0.1), a number, a function of the remaining
    progress, ``"log_linear_1.0_0.01"`` (from the first number to the second), or a temperature, which is copied.

    :param ent_coef: as the user gave it
    :param target_entropy: of a tuned one, in nats
    :param action_dim: d
    :return: the temperature
    :raises ValueError: if it can be none of these
    """
    if isinstance(ent_coef, Temperature):
        return copy.deepcopy(ent_coef)
    if callable(ent_coef):
        return ScheduledTemperature(ent_coef)
    try:
        if isinstance(ent_coef, str) and ent_coef.startswith("auto"):
            initial = 1.0 if ent_coef == "auto" else _positive(ent_coef.removeprefix("auto_"))
            return AutoTemperature(initial, target_entropy, action_dim)
        if isinstance(ent_coef, str) and ent_coef.startswith("log_linear_"):
            initial, final = map(_positive, ent_coef.removeprefix("log_linear_").split("_"))
            return ScheduledTemperature(partial(log_linear, initial, final))
        return FixedTemperature(_positive(ent_coef))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'ent_coef={ent_coef!r} is not a temperature: pass "auto", "auto_0.1", a positive number, '
            '"log_linear_1.0_0.01", a function of the remaining progress, or a Temperature. A policy of temperature 0 would '
            "be one action per state: for nearly that, pass 0.001."
        ) from error


def _positive(value: str | float) -> float:
    number = float(value)
    if isinstance(value, bool) or not (0 < number < math.inf):
        raise ValueError(f"{number} is not positive and finite")
    return number
