"""Warnings at the line of the user, once per process."""

import os
import sys
import warnings
from pathlib import Path

PACKAGES = ("sb3_dqs", "stable_baselines3", "torch")


warned_of: set[str] = set()


def warn_once(message: str, key: str | None = None) -> None:
    """
    Warn once per process, at the line of the user.

    :param message: the warning
    :param key: what it is about, if the message has values in it that change; by default the message
    """
    if (key or message) in warned_of:
        return
    packages = tuple(f"{Path(sys.modules[name].__file__ or '').parent}{os.sep}" for name in PACKAGES)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(packages):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
    warned_of.add(key or message)  # only now: a filter may have made an error of it
