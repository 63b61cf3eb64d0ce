"""The temperature of the policy, SB3's ``ent_coef``: fixed, scheduled, or tuned to reach a target entropy."""

import math

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

# Steps of log ent_coef, in learning rates: per unit of the error, and at most so many upwards (downwards one)
GAIN = 10.0
MAX_RISE = 3.0
# Rate of the running mean of the error, to take the noise from few actions
ERROR_UPDATE_RATE = 0.05


class LogLinearSchedule:
    """
    From ``initial`` to ``final``, linearly in the logarithm: the anneal of the paper.

    :param initial: value at the beginning of training, positive
    :param final: value at its end, positive
    """

    def __init__(self, initial: float, final: float):
        self.initial, self.final = initial, final

    def __call__(self, progress_remaining: float) -> float:
        return math.exp(progress_remaining * math.log(self.initial) + (1 - progress_remaining) * math.log(self.final))

    def __repr__(self) -> str:
        return f"LogLinearSchedule(initial={self.initial}, final={self.final})"


class ScheduledTemperature(nn.Module):
    """
    Temperature given by a function of the remaining progress (constant for a fixed one).

    :param schedule: from the remaining progress (1 to 0) to the temperature
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, progress_remaining: float) -> float:
        # SB3's remaining progress falls below 0 when the last rollout overshoots
        progress_remaining = max(progress_remaining, 0.0)
        value = float(self.schedule(progress_remaining))
        if not (0 < value < math.inf):
            raise ValueError(
                f"ent_coef: the schedule gave {value} at progress_remaining={progress_remaining:.3f}; "
                "it must be positive and finite all the way from 1 to 0."
            )
        return value


class AutoTemperature(nn.Module):
    """
    Temperature tuned by gradient steps on its logarithm, as in SAC (Haarnoja et al. 2018,
    https://arxiv.org/abs/1812.05905, equation (18)): it falls while the entropy is above the target.

    Where Adam would make the steps even, they are in proportion to a running mean of the error, up to a limit: the learning
    rate on the way down, as in SAC, and ``MAX_RISE`` times as much on the way up, because Q, when returns improve, grows
    faster than SAC's steps.

    :param initial: initial value, positive
    """

    log_ent_coef: th.Tensor
    mean_error: th.Tensor

    def __init__(self, initial: float):
        super().__init__()
        self.register_buffer("log_ent_coef", th.full((1,), math.log(initial)))
        self.register_buffer("mean_error", th.zeros(()))

    def forward(self, progress_remaining: float) -> th.Tensor:
        return self.log_ent_coef.exp()

    @th.no_grad()
    def update(self, entropy: th.Tensor, target_entropy: float, action_dim: int, learning_rate: float) -> th.Tensor:
        """
        One gradient step.

        :param entropy: estimate of the policy's entropy in nats, scalar
        :param target_entropy: in nats
        :param action_dim: d
        :param learning_rate: learning rate
        :return: the loss, before the step
        """
        # d/2 nats more: a temperature e times as high, for a Boltzmann policy of a quadratic Q
        error = (entropy - target_entropy) / (action_dim / 2)
        self.mean_error.lerp_(error, ERROR_UPDATE_RATE)
        gradient = (GAIN * self.mean_error).clamp(-MAX_RISE, 1)
        loss = self.log_ent_coef * gradient
        self.log_ent_coef -= learning_rate * gradient
        return loss


def make_temperature(ent_coef: str | float | Schedule) -> ScheduledTemperature | AutoTemperature:
    """
    Read ``ent_coef``: ``"auto"``, ``"auto_0.1"`` (tuned, from 1 or from 0.1), a number, a function of the remaining
    progress, or ``"log_linear_1.0_0.01"`` (from the first number to the second).

    :param ent_coef: as the user gave it
    :return: the temperature
    :raises ValueError: if it can be none of these
    """
    if callable(ent_coef):
        return ScheduledTemperature(ent_coef)
    try:
        if isinstance(ent_coef, str) and ent_coef.startswith("auto"):
            initial = 1.0 if ent_coef == "auto" else _positive(ent_coef.removeprefix("auto_"))
            return AutoTemperature(initial)
        if isinstance(ent_coef, str) and ent_coef.startswith("log_linear_"):
            initial, final = map(_positive, ent_coef.removeprefix("log_linear_").split("_"))
            return ScheduledTemperature(LogLinearSchedule(initial, final))
        return ScheduledTemperature(ConstantSchedule(_positive(ent_coef)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'ent_coef={ent_coef!r} is not a temperature: pass "auto", "auto_0.1", a positive number, '
            '"log_linear_1.0_0.01", or a function of the remaining progress.'
        ) from error


def _positive(value: str | float) -> float:
    number = float(value)
    if isinstance(value, bool) or not (0 < number < math.inf):
        raise ValueError(f"{number} is not positive and finite")
    return number
