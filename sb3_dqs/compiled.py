"""``torch.compile`` with a way back."""

import warnings
from collections.abc import Callable
from typing import Any

import torch as th


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
