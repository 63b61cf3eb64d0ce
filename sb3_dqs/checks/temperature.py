"""The temperature ``ent_coef`` and its target entropy."""

import math
from typing import Any

import torch as th

from sb3_dqs.checks.values import show
from sb3_dqs.temperature import AutoTemperature, Temperature, make_temperature


def check_ent_coef(ent_coef: Any) -> None:
    """
    Check a temperature; if it is a function, at both ends of the training.

    :param ent_coef: as the user gave it
    :raises ValueError: if it is none
    """
    try:
        temperature = make_temperature(ent_coef)
        for progress_remaining in (1.0, 0.0):
            temperature(progress_remaining)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("ent_coef"):
            raise
        raise ValueError(
            f"ent_coef={show(ent_coef)}: it fails ({type(error).__name__}: {error}); pass a positive number, or a function "
            "that gives one all the way from 1 to 0."
        ) from error


def check_target_entropy(target_entropy: float, action_dim: int) -> None:
    """
    Check that some policy has the target entropy: without one, the tuned temperature would rise for ever.

    :param target_entropy: in nats
    :param action_dim: d
    :raises ValueError: if the entropy of the uniform policy, d log 2, is below
    """
    if target_entropy >= action_dim * math.log(2):
        raise ValueError(
            f"target_entropy={target_entropy!r} cannot be reached: it must be below {action_dim * math.log(2):.2f}, the "
            f"entropy of uniform actions in [-1, 1]^{action_dim}."
        )


def check_temperature(temperature: Temperature, progress_remaining: float, action_dim: int) -> None:
    """
    Check the present value of a temperature, and the target of one that is tuned.

    :param temperature: what ``ent_coef`` has made
    :param progress_remaining: remaining progress of the training, from 1 to 0
    :param action_dim: d
    :raises ValueError: if the value is not a positive, finite 0-d tensor, or the target is of other actions
    """
    value = temperature(progress_remaining)
    if not (isinstance(value, th.Tensor) and value.ndim == 0 and 0 < value < math.inf):
        raise ValueError(
            f"`ent_coef`: {type(temperature).__name__}.forward({progress_remaining:g}) must return a positive, finite 0-d "
            f"tensor, got {value!r}."
        )
    if isinstance(temperature, AutoTemperature):
        check_target_entropy(temperature.target_entropy, action_dim)
        if temperature.action_dim != action_dim:
            raise ValueError(
                f"`ent_coef`: the environment's actions have {action_dim} dimensions, got an AutoTemperature with "
                f"action_dim={temperature.action_dim}."
            )
