"""Checks that numbers are finite: those of the environment, and those of the networks."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

if TYPE_CHECKING:
    from sb3_dqs.dqs import DQS

# Networks compute in single precision
FLOAT32_MAX = np.finfo(np.float32).max
LOAD_EARLIER = "load an earlier checkpoint, and lower learning_rate or scale the rewards (VecNormalize) if training led here"


def is_finite(value: Any) -> bool:
    """
    Whether all numbers are finite in single precision (1e39 is not).

    :param value: an array, or what numpy makes one of: a number, a list, a data frame, a tensor
    :return: True also for what is no number: SB3 says what is wrong with it
    """
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype == object else array
    except (TypeError, ValueError):
        return True
    if array.dtype.kind not in "fc":
        return True
    return bool((np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= FLOAT32_MAX).all())


def check_finite(what: str, value: Any, num_timesteps: int, remedy: str) -> None:
    """
    Stop at the first number that is not finite.

    :param what: what the value is, for the message
    :param value: a number, an array or a dictionary of arrays
    :param num_timesteps: when
    :param remedy: what to do, for the message
    :raises ValueError: naming the quantity, the step and the remedy
    """
    for part, array in value.items() if isinstance(value, dict) else [("", value)]:
        if not is_finite(array):
            name = f"{what} [{part}]" if part else what
            raise ValueError(f"{name} is not finite at step {num_timesteps}: {array}. {remedy}.")


class FiniteStepCallback(BaseCallback):
    """
    Checks the first observation and every step of the environment. It runs before the user's callbacks, so that they do not
    save a number that is not finite.
    """

    model: "DQS"

    def _on_training_start(self) -> None:
        self.check_observation("the first observation", self.model._last_obs)

    def _on_step(self) -> bool:
        new_obs, vec_normalize = self.locals["new_obs"], self.model.get_vec_normalize_env()
        if vec_normalize is not None:  # the original numbers, which the replay buffer holds
            self.check_observation("the observation", vec_normalize.old_obs)
            self.check("the reward", vec_normalize.old_reward)
        self.check_observation("the observation", new_obs)
        self.check("the reward", self.locals["rewards"])
        for index in self.locals["dones"].nonzero()[0]:
            last_obs = self.locals["infos"][index].get("terminal_observation")
            if last_obs is not None:
                if isinstance(new_obs, dict):
                    last_obs = {key: last_obs[key] for key in new_obs}
                self.check_observation("the terminal observation", last_obs, index)
        return True

    def check(self, what: str, value: Any, env_index: int | None = None) -> None:
        """
        Stop at the first number that is not finite.

        :param what: what the value is, for the message
        :param value: an array or a dictionary of arrays
        :param env_index: the environment that the value is of; by default the value has a row per environment
        """
        parts, n_envs = list(value.values()) if isinstance(value, dict) else [value], self.model.n_envs
        if all(map(is_finite, parts)):
            return
        if env_index is None:
            env_index = next(index for index in range(n_envs) if not all(is_finite(part[index]) for part in parts))
        if n_envs > 1:
            what = f"{what} of environment {env_index} (of 0 to {n_envs - 1}; the step counts all of them)"
        remedy = "Fix the environment (gymnasium's check_env and SB3's VecCheckNan find the place)"
        if self.model.get_vec_normalize_env() is not None:
            remedy += "; VecNormalize's statistics contain this number: load them from an earlier file (VecNormalize.load)"
        check_finite(what, value, self.model.num_timesteps, f"{remedy}. Earlier checkpoints are not affected")

    def check_observation(self, what: str, obs: Any, env_index: int | None = None) -> None:
        """
        Not finite is right where the features extractor takes NaN or infinity for missing values.

        :param what: what the observation is, for the message
        :param obs: one, or a batch
        :param env_index: the environment that one observation is of; by default there is a row per environment
        """
        try:
            self.check(what, obs, env_index)
        except ValueError:
            vec_normalize = self.model.get_vec_normalize_env()
            is_averaged = vec_normalize is not None and vec_normalize.norm_obs
            if is_averaged or not self.model.policy.has_finite_features(obs):
                raise


def find_not_finite(state: Any, parameters: Iterable[str] = (), name: str = "") -> str | None:
    """
    A tensor that cannot be part of a sound model.

    :param state: nested dictionaries and lists of tensors, as of ``state_dict()``
    :param parameters: names of parameters, in which infinity is not allowed either; a mask of minus infinity is a sound buffer
    :param name: of ``state``
    :return: name of the first tensor that is not sound, or None
    """
    if isinstance(state, th.Tensor):
        if not (state.is_floating_point() or state.is_complex()) or state.layout != th.strided:
            return None
        is_bad = ~state.isfinite() if name.partition(".")[2] in parameters else state.isnan()
        return name if is_bad.any() else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    names = (find_not_finite(value, parameters, f"{name}.{key}" if name else str(key)) for key, value in items)
    return next((found for found in names if found is not None), None)


@th.no_grad()
def check_parameters(
    policy: nn.Module, optimizers: Iterable[th.optim.Optimizer], num_timesteps: int, learning_rate: float
) -> None:
    """
    One norm over what the optimizers move.

    :param policy: has the names
    :param optimizers: of its parts
    :param num_timesteps: when
    :param learning_rate: then, for the message
    :raises ValueError: naming the first parameter that is not finite
    """
    tensors = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    tensors = [tensor for tensor in tensors if type(tensor) is nn.Parameter and tensor.layout == th.strided]
    norms = list(th._foreach_norm(tensors)) if tensors else []
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, th.float32) for norm in norms]
    if not norms or th.stack(norms).sum().isfinite():
        return
    state = dict(policy.named_parameters())
    name = find_not_finite({"policy": state}, state)  # None where the norm alone overflowed
    if name is not None:
        raise ValueError(
            f"{name} is not finite at step {num_timesteps}: it became so in the last gradient step; {LOAD_EARLIER} "
            f"({learning_rate=})."
        )
