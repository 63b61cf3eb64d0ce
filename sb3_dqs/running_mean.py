"""A running mean that is saved with the part that uses it."""

import torch as th
from torch import nn


class RunningMean(nn.Module):
    """
    Exponential moving average, held in the buffer ``value``.

    :param initial: value before the first update
    :param rate: weight of the newest value
    """

    value: th.Tensor

    def __init__(self, initial: th.Tensor | float, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("value", th.as_tensor(initial, dtype=th.float32).clone())

    @th.no_grad()
    def update(self, value: th.Tensor, weight: th.Tensor | float = 1.0) -> None:
        """
        Move towards a new value.

        :param value: of the shape of the running mean
        :param weight: factor of the rate, 0 for a value that says nothing
        """
        self.value.lerp_(value, self.rate * weight)
