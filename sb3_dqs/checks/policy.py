"""The policy, its arguments, and whether they fit the observations."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

from sb3_dqs.checks.arguments import ARGUMENT_CHECKS
from sb3_dqs.checks.values import show
from sb3_dqs.policies import CRITICS, CnnPolicy, DQSPolicy, MultiInputPolicy

DEFAULT_EXTRACTORS: dict[type, type] = {DQSPolicy: FlattenExtractor, CnnPolicy: NatureCNN, MultiInputPolicy: CombinedExtractor}
# What the policy gives to its critics; `critic_kwargs` may replace it
CRITIC_ARGUMENTS = ["observation_space", "action_space", "net_arch", "features_extractor", "features_dim", "activation_fn"]
CRITIC_ARGUMENTS += ["normalize_images", "n_critics", "share_features_extractor"]


def check_policy(policy_class: type, policy_kwargs: dict[str, Any], observation_space: gym.Space) -> None:
    """
    Check that the policy is one of DQS, fits the observations, and knows all the names in ``policy_kwargs``.

    :param policy_class: class of the policy
    :param policy_kwargs: as the user gave them
    :param observation_space: of the environment
    :raises ValueError: naming the argument, the value and the remedy
    """
    if not issubclass(policy_class, DQSPolicy):
        raise ValueError(
            f"policy={policy_class.__name__} is not a policy of DQS: pass MlpPolicy, CnnPolicy or MultiInputPolicy of "
            "sb3_dqs; load a file with the algorithm that saved it."
        )
    _check_observations(policy_class, policy_kwargs, observation_space)
    _check_names(policy_class, policy_kwargs)
    _check_extractor(policy_class, policy_kwargs, observation_space)
    if policy_kwargs.get("critic_kwargs"):
        _check_critic_kwargs(policy_class, policy_kwargs)
    optimizer_class = policy_kwargs.get("optimizer_class", th.optim.Adam)
    optimizer_kwargs = policy_kwargs.get("optimizer_kwargs") or {}
    check_call("policy_kwargs: `optimizer_class` and `optimizer_kwargs`", optimizer_class, [[]], {"lr": 0}, optimizer_kwargs)


def _check_observations(policy_class: type, policy_kwargs: dict[str, Any], observation_space: gym.Space) -> None:
    is_dict, has_own_extractor = isinstance(observation_space, spaces.Dict), "features_extractor_class" in policy_kwargs
    if issubclass(policy_class, MultiInputPolicy) and not has_own_extractor and not is_dict:
        raise ValueError(
            f'policy=MultiInputPolicy needs dictionary observations, but they are {observation_space}; pass "MlpPolicy", '
            'or "CnnPolicy" for images.'
        )
    if policy_class is DQSPolicy and not has_own_extractor and is_dict:
        raise ValueError(
            f'policy=MlpPolicy cannot read dictionary observations, but they are {observation_space}; pass "MultiInputPolicy".'
        )


def _check_names(policy_class: type, policy_kwargs: dict[str, Any]) -> None:
    known: set[str] = set()
    for cls in policy_class.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls).parameters.values()
        known |= {parameter.name for parameter in parameters}
        # Subclasses that pass **kwargs on are asked for the names of their parents, too
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
        if cls not in (CnnPolicy, MultiInputPolicy):
            known |= set(policy_kwargs)  # a class of the user may take names out of **kwargs
    known -= {"args", "kwargs", "observation_space", "action_space", "lr_schedule"}
    for name, value in policy_kwargs.items():
        if name not in known:
            offered = sorted(known - {"use_sde"})
            listed, close = ", ".join(offered), difflib.get_close_matches(str(name), offered, 1)
            hint = f"did you mean {close[0]}? Known are {listed}" if close else f"known are {listed}"
            hint = "it is one of DQS itself" if name in ARGUMENT_CHECKS else hint
            raise ValueError(f"policy_kwargs: {name}={value!r} is not an argument of {policy_class.__name__}; {hint}.")


def _check_extractor(policy_class: type, policy_kwargs: dict[str, Any], observation_space: gym.Space) -> None:
    is_dict = isinstance(observation_space, spaces.Dict)
    extractor = policy_kwargs.get("features_extractor_class", DEFAULT_EXTRACTORS.get(policy_class))
    if "features_extractor_class" in policy_kwargs and extractor is (FlattenExtractor if is_dict else CombinedExtractor):
        raise ValueError(
            f"policy_kwargs: features_extractor_class={extractor.__name__} cannot read the observations {observation_space}; "
            "leave it out, with the policy that fits them."
        )
    if extractor in DEFAULT_EXTRACTORS.values():
        _check_extractor_reads(observation_space)
    if extractor is not None:
        extractor_kwargs = policy_kwargs.get("features_extractor_kwargs") or {}
        names = "policy_kwargs: `features_extractor_class` and `features_extractor_kwargs`"
        check_call(names, extractor, [observation_space], {}, extractor_kwargs)


def _check_critic_kwargs(policy_class: type, policy_kwargs: dict[str, Any]) -> None:
    names = "policy_kwargs: `critic_class` and `critic_kwargs`"
    signatures = [inspect.signature(cls).parameters for cls in (policy_class, DQSPolicy)]
    default = next(own["critic_class"].default for own in signatures if "critic_class" in own)
    critic = policy_kwargs.get("critic_class", default)
    critic = CRITICS[critic] if isinstance(critic, str) else critic
    check_call(names, critic, [], {}, dict.fromkeys(CRITIC_ARGUMENTS) | policy_kwargs["critic_kwargs"])


def check_call(names: str, function: Callable, args: list[Any], own: dict[str, Any], given: Mapping[str, Any]) -> None:
    """
    Check that a function or class can be called, without calling it.

    :param names: the arguments of DQS that it is made of, for the message
    :param function: the function or class
    :param args: arguments by position
    :param own: keyword arguments that DQS gives
    :param given: keyword arguments of the user
    :raises ValueError: naming the arguments
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    problem = f"{', '.join(own.keys() & given.keys())} is given by DQS" if own.keys() & given.keys() else ""
    try:
        signature.bind(*args, **{**own, **given})
    except TypeError as error:
        problem = problem or str(error)
    if problem:
        given = {name: value for name, value in given.items() if value is not None}
        raise ValueError(
            f"{names} must go together, got {show(function)} and {show(given)}: {problem}; "
            f"known arguments are {', '.join(signature.parameters)}."
        )


def _check_extractor_reads(observation_space: gym.Space) -> None:
    """What SB3's features extractor of dictionaries cannot read; one of the user may."""
    for name in observation_space.spaces if isinstance(observation_space, spaces.Dict) else ():
        if name == "" or "." in name:
            raise ValueError(
                f"env: the observation space {observation_space} has the key {name!r}, which cannot be the name of a module "
                "of torch; give it one without a dot."
            )
