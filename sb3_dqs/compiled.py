"""``torch.compile`` with a way back."""

import warnings
from collections.abc import Callable
from typing import Any

import torch as th


class Compiled:
    """
    A function that is compiled at its first call, and again for every new shape of its arguments. It takes its random numbers
    from the generator that the function itself would, and computes the same up to rounding. Where it cannot be compiled (for
    want of a C++ compiler, for instance) it warns once, and is the function itself from then on.

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
            except Exception as error:  # compilers fail in many ways; an error of the function itself comes again below
                warnings.warn(
                    f"compile=True: torch.compile failed, and training goes on without it ({type(error).__name__}: {error}); "
                    "install what is missing, or leave the argument out.",
                    stacklevel=2,
                )
                self.is_possible = False
        return self.function(*args, **kwargs)
