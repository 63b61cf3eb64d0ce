"""What a value must be, and its plain form: numbers, switches, dictionaries."""

import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch as th

# Larger integers do not fit into torch's sizes
MAX_INT = 2**31 - 1


class Argument(NamedTuple):
    """
    What an argument must be.

    :param is_valid: test of a value; raises nothing
    :param requirement: what it must be, for the message
    :param convert: to plain Python, from numbers of numpy and torch, fractions and other mappings
    """

    is_valid: Callable[[Any], bool]
    requirement: str
    convert: Callable[[Any], Any] = lambda value: value


def is_int(value: Any, low: int, high: float = MAX_INT) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        return low <= operator.index(value) <= high
    except TypeError:
        return False


def is_real(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    is_scalar = isinstance(value, (np.ndarray, th.Tensor)) and value.ndim == 0
    if isinstance(value, (bool, np.bool_)) or not (isinstance(value, Real) or is_scalar):
        return False
    try:
        return math.isfinite(float(value)) and low <= float(value) <= high
    except (TypeError, ValueError, OverflowError):
        return False


def is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def plain(value: Any) -> Any:
    return operator.index(value) if is_int(value, -MAX_INT) else float(value) if is_real(value) else value


def integer(low: int, requirement: str = "") -> Argument:
    return Argument(lambda v: is_int(v, low), requirement or f"an integer >= {low}", operator.index)


def number(requirement: str, low: float = -math.inf, high: float = math.inf) -> Argument:
    return Argument(lambda v: is_real(v, low, high), requirement, plain)


def optional(argument: Argument) -> Argument:
    is_valid, requirement, convert = argument
    return Argument(lambda v: v is None or is_valid(v), f"None or {requirement}", lambda v: None if v is None else convert(v))


BOOL = Argument(is_bool, "True or False", bool)
SHARE = Argument(lambda v: is_real(v, 0, 1) and v > 0, "a number above 0, at most 1", float)
MAPPING = Argument(
    lambda v: v is None or isinstance(v, Mapping), "a dictionary or None", lambda v: None if v is None else dict(v)
)
CALLABLE = Argument(callable, "a class or a function")
IGNORED = Argument(lambda v: True, "anything: it is ignored")


def show(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 500 else f"{text[:500]}..."
