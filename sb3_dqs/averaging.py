"""Running averages of the parameters of modules."""

import contextlib
from collections.abc import Iterator

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


def averaging_rate(n_updates: float, lowest: float) -> float:
    """
    Rate of an average over about the last twentieth of the updates, but at most ``1 / lowest`` of them: the power-function
    average of Karras et al. 2024 (https://arxiv.org/abs/2312.02696, equation 4), with a limit.

    :param n_updates: number of updates, with the present one, at least 1
    :param lowest: lower limit of the rate
    :return: weight of the present values
    """
    return max(20 / (n_updates + 19), lowest)


class RunningAverage(nn.Module):
    """
    Running average of a module's parameters, which can stand in for them. It notices if something other than ``update()``'s
    caller changed them, by a sample of their elements.

    :param module: the module; its buffers are not averaged
    :param lowest_rate: see :func:`averaging_rate`
    """

    n_updates: th.Tensor  # in the average, 0-d; a float, as all that is saved
    sample: th.Tensor  # of the parameters at the last update, flat

    def __init__(self, module: nn.Module, lowest_rate: float):
        super().__init__()
        self.lowest_rate = lowest_rate
        self.register_buffer("n_updates", th.zeros(()))
        self.restart(module)

    def restart(self, module: nn.Module) -> None:
        """
        Begin anew.

        :param module: whose present parameters become the average
        """
        self.n_updates.zero_()
        for name in self._names():
            delattr(self, name)
        for i, param in enumerate(module.parameters()):
            self.register_buffer(f"parameter_{i}", param.detach().clone())
        self.register_buffer("sample", sample_elements(module))

    def _names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith("parameter_")]

    @property
    def values(self) -> list[th.Tensor]:
        """Averages, in the order of ``module.parameters()``."""
        return [getattr(self, name) for name in self._names()]

    @th.no_grad()
    def update(self, module: nn.Module) -> None:
        """
        Move towards the present parameters.

        :param module: the module, after a gradient step
        """
        self.n_updates += 1
        pairs = [(a, p) for a, p in zip(self.values, module.parameters(), strict=True) if p.requires_grad]
        rate = averaging_rate(float(self.n_updates), self.lowest_rate)
        fast.update_target([p for _, p in pairs], [a for a, _ in pairs], rate)
        self.sample.copy_(sample_elements(module))

    def is_current(self, module: nn.Module) -> bool:
        """
        Whether the average follows the module.

        :param module: the module
        :return: False if parameters were changed, added or taken away since the last update
        """
        return th.equal(sample_elements(module), self.sample)

    @contextlib.contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """
        Inside, the module has the average for its parameters.

        :param module: the module
        """
        averages = {id(param): value for param, value in zip(module.parameters(), self.values, strict=True)}
        places = [
            (part._parameters, name, param)
            for part in module.modules()
            for name, param in part._parameters.items()
            if param is not None
        ]
        try:
            for parameters, name, param in places:
                parameters[name] = averages[id(param)]  # type: ignore[assignment]  # without gradients
            yield
        finally:
            for parameters, name, param in places:
                parameters[name] = param


@th.no_grad()
def sample_elements(module: nn.Module) -> th.Tensor:
    """
    Every 61st element of each parameter, from the first on: of rows and columns some, because 61 is prime.

    :param module: the module
    :return: flat copy
    """
    parts = [param.flatten()[::61] for param in module.parameters()]
    return th.cat([part.to(parts[0].device) for part in parts]) if parts else th.zeros(0)
