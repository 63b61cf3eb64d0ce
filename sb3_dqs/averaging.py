"""Running averages of the parameters and buffers of a module."""

import torch as th
from torch import nn

from sb3_dqs import fast


@th.no_grad()
def update_average(average: nn.Module, module: nn.Module, rate: float) -> None:
    """
    Move a running average towards a module.

    :param average: a copy of the module, whose parameters and floating buffers are averages; other buffers are copied
    :param module: the module
    :param rate: weight of the module's present values, from 0 to 1
    """
    fast.update_target(module.parameters(), average.parameters(), rate)
    for average_buffer, buffer in zip(average.buffers(), module.buffers(), strict=True):
        if buffer.is_floating_point():
            average_buffer.lerp_(buffer, rate)
        else:
            average_buffer.copy_(buffer)
