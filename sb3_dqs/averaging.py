"""Running averages of the parameters of modules."""

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
    Running average of a module's parameters, and the module with them in place. ``is_current()`` is False if the parameters
    differ from those at the last ``update()``, in their shapes or in a sample of their elements.

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
        parameters = initialized_parameters(module)
        for i, param in enumerate(parameters):
            self.register_buffer(f"parameter_{i}", param.detach().clone())
        self.register_buffer("sample", sample_elements(parameters))

    def _names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith("parameter_")]

    @property
    def values(self) -> list[th.Tensor]:
        """Averages, in the order of ``module.parameters()``."""
        return [getattr(self, name) for name in self._names()]

    @th.no_grad()
    def update(self, module: nn.Module) -> None:
        """
        Move towards the present parameters. Those that require no gradient are copied.

        :param module: the module, after a gradient step
        """
        self.n_updates += 1
        rate = averaging_rate(float(self.n_updates), self.lowest_rate)
        parameters = list(module.parameters())
        pairs = list(zip(self.values, parameters, strict=True))
        trained = [(a, p) for a, p in pairs if p.requires_grad]
        fast.update_target([p for _, p in trained], [a for a, _ in trained], rate)
        for average, param in pairs:
            if not param.requires_grad:
                average.copy_(param)
        self.sample.copy_(sample_elements(parameters))

    def is_current(self, module: nn.Module) -> bool:
        """
        Whether the average follows the module.

        :param module: the module
        :return: False if parameters were changed, added or taken away since the last update
        """
        parameters = initialized_parameters(module)
        shapes = [param.shape for param in parameters]
        return shapes == [value.shape for value in self.values] and th.equal(sample_elements(parameters), self.sample)

    def stand_in(self, module: nn.Module) -> nn.Module:
        """
        The module with the average for its parameters.

        :param module: the module, which stays as it is
        :return: copy that shares all but the parameters: buffers, hooks, attributes
        """
        averages = {id(param): value for param, value in zip(module.parameters(), self.values, strict=True)}
        return _with_parameters(module, averages)


def _with_parameters(module: nn.Module, values: dict[int, th.Tensor]) -> nn.Module:
    if isinstance(module, th.jit.ScriptModule):  # not made of Python objects
        return module
    result = object.__new__(type(module))
    vars(result).update(vars(module))
    vars(result)["_parameters"] = {name: values.get(id(param)) for name, param in module._parameters.items()}
    vars(result)["_modules"] = {
        name: None if child is None else _with_parameters(child, values) for name, child in module._modules.items()
    }
    if isinstance(module, nn.RNNBase):  # has its parameters a second time
        vars(result)["_flat_weights"] = [values.get(id(param), param) for param in module._flat_weights]
    return result


def initialized_parameters(module: nn.Module) -> list[nn.Parameter]:
    """
    The parameters of a module.

    :param module: the module
    :return: all of them; none as long as one has no shape so far
    """
    parameters = list(module.parameters())
    return [] if any(isinstance(param, nn.parameter.UninitializedParameter) for param in parameters) else parameters


@th.no_grad()
def sample_elements(parameters: list[nn.Parameter]) -> th.Tensor:
    """
    Parameters of at most 4,096 elements, and of larger ones every 61st element: as 61 is prime, some of most rows and columns.

    :param parameters: those of a module
    :return: flat copy
    """
    parts = [param.flatten()[:: 1 if param.numel() <= 4096 else 61] for param in parameters]
    return th.cat([part.to(parts[0].device) for part in parts]) if parts else th.zeros(0)
