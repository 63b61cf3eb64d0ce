"""Running averages of the parameters and buffers of a module."""

import copy
from typing import TypeVar

import torch as th
from torch import nn

from sb3_dqs import fast

Module = TypeVar("Module", bound=nn.Module)


@th.no_grad()
def update_average(average: nn.Module, module: nn.Module, rate: float) -> None:
    """
    Move a running average towards a module.

    :param average: a copy of the module, whose parameters and floating buffers are averages. Other buffers are copied, and
        those that are not saved are left alone
    :param module: the module
    :param rate: weight of the module's present values, from 0 to 1
    """
    states = [part.state_dict(keep_vars=True).values() for part in (average, module)]
    pairs = [(a, m) for a, m in zip(*states, strict=True) if isinstance(m, th.Tensor) and a is not m]
    parameters = [(a, m) for a, m in pairs if isinstance(m, nn.Parameter)]
    fast.update_target([m for _, m in parameters], [a for a, _ in parameters], rate)
    for average_buffer, buffer in pairs:
        if isinstance(buffer, nn.Parameter) or th.equal(average_buffer, buffer):  # equal infinities have no average
            continue
        if buffer.is_floating_point():
            average_buffer.lerp_(buffer, rate)
        else:
            average_buffer.copy_(buffer)


def averaging_rate(n_updates: float, lowest: float) -> float:
    """
    Rate of an average over about the last twentieth of the updates, until that is more than 1 / ``lowest`` updates: the
    power-function average of Karras et al. 2024 (https://arxiv.org/abs/2312.02696, equation 4), with a limit.

    :param n_updates: number of updates, with the present one, at least 1
    :param lowest: rate from then on
    :return: weight of the module's present values
    """
    return max(20 / (n_updates + 19), lowest)


def copy_without_gradients(module: Module) -> Module:
    """
    Copy a module, in evaluation mode.

    :param module: whose parameters that require no gradient are shared with the copy; an optimizer is not copied
    :return: copy, none of whose parameters requires a gradient
    """
    shared = [param for param in module.parameters() if not param.requires_grad]
    memo: dict[int, object] = {id(param): param for param in shared}
    if hasattr(module, "optimizer"):
        memo[id(module.optimizer)] = None
    result: Module = copy.deepcopy(module, memo).requires_grad_(False)
    return result.eval()


@th.no_grad()
def parameter_norm(module: nn.Module) -> th.Tensor:
    """
    Euclidean norm of all floating parameters of a module.

    :param module: the module
    :return: 0-d
    """
    parameters: list[th.Tensor] = [param for param in module.parameters() if param.is_floating_point()]
    return th.stack(th._foreach_norm(parameters)).norm() if parameters else th.zeros(())
