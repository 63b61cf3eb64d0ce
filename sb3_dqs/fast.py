"""Speed."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F


def as_functions(layers: Iterable[nn.Module], dtype: th.dtype | None = None) -> list[Callable[[th.Tensor], th.Tensor]]:
    """
    What successive layers compute, as functions: ReLUs write into the output of the plain linear layer before them, plain
    linear layers are in the given precision. Others, and those with hooks, are called as they are.

    :param layers: in their order
    :param dtype: precision; by default that of the weights
    :return: functions, the first of a tensor that nothing else needs
    """
    functions: list[Callable[[th.Tensor], th.Tensor]] = []
    is_free = True  # nothing else needs the input
    for layer in layers:
        has_hooks = bool(layer._forward_hooks or layer._forward_pre_hooks)
        if is_free and type(layer) is nn.ReLU and not has_hooks:
            functions.append(th.relu_)
        elif dtype is None:
            functions.append(layer)
        elif type(layer) is nn.Linear and not has_hooks:
            functions.append(_linear_in(dtype, layer.weight, layer.bias))
        else:
            functions.append(_in_own_precision(layer))
        is_free = type(layer) is nn.Linear and not has_hooks
    return functions


def _linear_in(dtype: th.dtype, weight: th.Tensor, bias: th.Tensor | None) -> Callable[[th.Tensor], th.Tensor]:
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


def _in_own_precision(layer: nn.Module) -> Callable[[th.Tensor], th.Tensor]:
    weight = next(layer.parameters(), None)
    return layer if weight is None else lambda x: layer(x.to(weight.dtype))


class Compiled:
    """
    A function that is compiled at its first call, and again for new shapes of its arguments (PyTorch keeps eight versions per
    process; what comes after runs as it is). It takes its random numbers from the generator that the function itself would,
    and computes the same up to rounding. Where it cannot be compiled (for want of a C++ compiler, for instance) it warns once,
    and is the function itself from then on. Copies compile anew.

    :param function: of tensors
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        self.is_possible = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_possible:
            try:
                if self.compiled is None:
                    self.compiled = th.compile(self.function, dynamic=False, options={"fallback_random": True})
                return self.compiled(*args, **kwargs)
            except Exception as error:  # compilers fail in many ways
                result = self.function(*args, **kwargs)  # an error of its own comes again, and is raised
                reason = str(error).partition("\n\nSet TORCH")[0].strip()  # advice to developers of torch follows
                warnings.warn(
                    f"compile=True: torch.compile failed, and training goes on without it ({type(error).__name__}: {reason}); "
                    "install what it misses, or leave the argument out.",
                    stacklevel=2,
                )
                self.is_possible = False
                return result
        return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}


def has_fast_bfloat16(device: th.device) -> bool:
    """
    Whether products of matrices are faster in bfloat16.

    :param device: device
    :return: true for CPUs with AMX or AVX512-BF16, and for GPUs with tensor cores for it
    """
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, bool] = getattr(th.cpu, "get_capabilities", dict)()  # older torch does not tell
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
