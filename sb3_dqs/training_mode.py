"""Training mode and evaluation mode of modules; one thread at a time sets them."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from stable_baselines3.common.policies import BaseModel

Method = TypeVar("Method", bound=Callable[..., Any])


class Lock:
    """One thread at a time; a copy is another lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()


def locked(method: Method) -> Method:
    """
    For methods that set the training mode: another thread that predicts waits until ``train()`` is over.

    :param method: of a policy, or of an algorithm that has one
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(self, "policy", self).lock:
            return method(self, *args, **kwargs)

    return alone  # type: ignore[return-value]


@contextlib.contextmanager
def evaluation_mode(module: BaseModel) -> Iterator[None]:
    """
    Evaluation mode inside (batch normalisation, dropout), the former one afterwards.

    :param module: a policy, or a critic
    """
    was_training = module.training
    module.set_training_mode(False)
    try:
        yield
    finally:
        module.set_training_mode(was_training)
