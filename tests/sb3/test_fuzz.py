"""
Random environments, arguments and protocols for DQS, with SAC as the control of each: what works with SAC works with DQS,
or is refused with a ValueError that names argument, value and remedy.

    python tests/sb3/test_fuzz.py --cases 10000 --jobs 2
    python tests/sb3/test_fuzz.py --start 1234 --cases 1

prints a table of kinds and every fault with its number, and ends with status 1 if there is one. A case is a function of its
number alone.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import multiprocessing
import operator
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from fuzz_cases import (
    ACTIONS,
    BOX,
    FAULTS,
    FAULTY_STEP,
    OBSERVATIONS,
    OWN_ARGUMENTS,
    OWN_POLICY_KWARGS,
    PROTOCOLS,
    Case,
    LateNoise,
    floating_parts,
    make_case,
)
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from toys import RandomEnv, same
from tqdm import tqdm

from sb3_dqs import DQS
from sb3_dqs.finite import FiniteStepCallback
from sb3_dqs.policies import DQSPolicy

SECONDS = 30  # an attempt that takes longer hangs
STEPS, MORE_STEPS, EPISODE = 14, 8, 7


class CaseEnv(RandomEnv):
    """The environment of a case, one of several; the reward is between -1 and 1."""

    def __init__(self, case: Case, index: int):
        super().__init__(copy.deepcopy(case.observation_space), copy.deepcopy(case.action_space))
        self.observation_space.seed(case.number % 2**31 + index)
        self.action_space.seed(case.number % 2**31 + index)
        self.case, self.total = case, 0
        self.fault = case.fault if index == case.n_envs - 1 else ""

    def compute_reward(self, achieved_goal, desired_goal, info):
        return -np.linalg.norm(achieved_goal - desired_goal, axis=-1)

    def spoil(self, obs: Any, value: float) -> Any:
        for name in floating_parts(self.observation_space)[-1:]:
            self.case.happened.append(self.fault)
            if not name:
                return np.full(obs.shape, value)
            obs[name] = np.full(obs[name].shape, value)
        return obs

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return (self.spoil(obs, np.nan) if self.fault.startswith("first") and self.total == 0 else obs), info

    def step(self, action):
        action = action.astype(self.action_space.dtype)  # SB3 gives single precision where the space has half
        obs, _, terminated, truncated, info = super().step(action)
        reward = float(np.tanh(np.mean(action, dtype=np.float64)))
        self.total += 1
        what, _, value = self.fault.rpartition(" ")
        if what == "reward" and self.total == FAULTY_STEP:
            reward = float(value)
            self.case.happened.append(self.fault)
        elif (what == "observation" and self.total == FAULTY_STEP) or (what.startswith("terminal") and self.total == EPISODE):
            obs = self.spoil(obs, float(value))
        return obs, reward, terminated, truncated, info


# An attempt with one of the algorithms


class WrongResultError(AssertionError):
    """What worked, but not as it should."""


class Hang(BaseException):
    """No Exception, so that nothing swallows it."""


class Outcome(NamedTuple):
    """
    Of an attempt that worked.

    :param counts: what DQS and SAC must agree on: steps, updates, rows of the buffer, of all models that have learnt
    :param moved: whether the actor and the critic have learnt
    :param fingerprint: a function of all weights, not finite if one of them is not
    """

    counts: list[tuple[int, ...]]
    moved: tuple[bool, ...]
    fingerprint: float


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongResultError(what)


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Numbers of numpy and tuples of widths as SAC takes them, so that it is a control of the rest of the case."""
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}
    if isinstance(found.get("net_arch"), tuple):
        found["net_arch"] = list(found["net_arch"])
    return found


def build(cls: type[OffPolicyAlgorithm], case: Case, env: VecEnv, folder: Path, **changes: Any) -> OffPolicyAlgorithm:
    case = copy.deepcopy(case)  # SB3 writes into dictionaries of the user
    arguments, policy_kwargs = case.arguments, {"net_arch": [4], **case.policy_kwargs}
    if issubclass(cls, DQS):
        policy_kwargs = {"diffusion_steps": 3, **policy_kwargs}
        arguments = {"n_mc_samples": 2, **arguments}
    else:
        policy_kwargs = {name: value for name, value in policy_kwargs.items() if name not in OWN_POLICY_KWARGS}
        arguments = {name: value for name, value in arguments.items() if name not in OWN_ARGUMENTS}
        arguments, policy_kwargs = plain(arguments), plain(policy_kwargs)
    if isinstance(arguments.get("tensorboard_log"), (str, Path)):
        arguments["tensorboard_log"] = str(folder / arguments["tensorboard_log"])
    return cls(**{**case.defaults(), "env": env, "policy_kwargs": policy_kwargs, **arguments, **changes})


def counts(model: OffPolicyAlgorithm) -> tuple[int, ...]:
    return model.num_timesteps, model._n_updates, model.replay_buffer.size()


def state(module: th.nn.Module) -> dict[str, th.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def numbers(value: Any) -> Any:
    """Numbers, texts, arrays, and tuples and dictionaries of them, of what an object holds; None for the rest."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(part) for part in value]
    is_plain = value.dtype != object if isinstance(value, np.ndarray) else isinstance(value, (Real, str))
    return value if is_plain else None


class Protocols:
    """
    What is done after learning, one method each; what should have stayed is compared, not only called.

    :param model: has learnt
    :param case: what it is made of
    :param obs: a batch of observations
    :param folder: for files
    """

    def __init__(self, model: OffPolicyAlgorithm, case: Case, obs: Any, folder: Path):
        self.model, self.case, self.obs, self.folder, self.cls = model, case, obs, folder, type(model)
        self.counts: list[tuple[int, ...]] = []  # of the models that went on

    def action(self, model: Any) -> np.ndarray:
        return model.predict(self.obs, deterministic=True)[0]

    def compare(self, other: OffPolicyAlgorithm, what: str) -> None:
        expect(same(other.get_parameters(), self.model.get_parameters()), f"other parameters after {what}")
        expect(np.array_equal(self.action(other), self.action(self.model)), f"other actions after {what}")

    def reloaded(self) -> OffPolicyAlgorithm:
        self.model.save(self.folder / "model")
        loaded = self.cls.load(self.folder / "model", env=self.model.get_env(), device="cpu")
        self.compare(loaded, "load()")
        for name, value in vars(self.model).items():
            if isinstance(value, (Real, str, tuple)) and not name.startswith("_last"):
                expect(same(numbers(value), numbers(getattr(loaded, name, None))), f"another `{name}` after load()")
        return loaded

    def save(self) -> None:
        loaded = self.reloaded()
        loaded.learn(MORE_STEPS, reset_num_timesteps=False)
        expect(loaded.num_timesteps >= self.model.num_timesteps + MORE_STEPS, "load() does not go on")
        self.counts.append(counts(loaded))

    def buffer(self) -> None:
        loaded = self.reloaded()
        self.model.save_replay_buffer(self.folder / "buffer")
        loaded.load_replay_buffer(self.folder / "buffer", truncate_last_traj=False)
        before, after = (numbers(vars(model.replay_buffer)) for model in (self.model, loaded))
        for name, value in before.items():
            expect(same(value, after[name]), f"other `{name}` after load_replay_buffer()")
        expect(loaded.replay_buffer.size() == self.model.replay_buffer.size() > 0, "no rows after load_replay_buffer()")

    def continue_(self) -> None:
        steps = self.model.num_timesteps
        self.model.learn(MORE_STEPS, reset_num_timesteps=False)
        expect(self.model.num_timesteps >= steps + MORE_STEPS, "learn() does not go on")

    def set_parameters(self) -> None:
        self.model.save(self.folder / "parameters")
        for source in (self.model.get_parameters(), self.folder / "parameters"):
            other = build(self.cls, self.case, self.model.get_env(), self.folder, seed=7)
            expect(not same(other.policy.state_dict(), self.model.policy.state_dict()), "another seed, the same parameters")
            other.set_parameters(source, device="cpu")
            self.compare(other, "set_parameters()")
            expect(other.num_timesteps == other._n_updates == 0, "other counters after set_parameters()")

    def policy(self) -> None:
        self.model.policy.save(self.folder / "policy")
        self.compare_policy(type(self.model.policy).load(self.folder / "policy", device="cpu"), "load() of the policy")

    def deepcopy(self) -> None:
        clone = copy.deepcopy(self.model.policy)
        self.compare_policy(clone, "deepcopy()")
        before = state(self.model.policy)
        for parameter in clone.parameters():
            parameter.data.fill_(0.5)
        expect(same(state(self.model.policy), before), "a copy of the policy shares parameters")

    def compare_policy(self, policy: Any, what: str) -> None:
        expect(same(state(policy), state(self.model.policy)), f"other parameters after {what}")
        expect(np.array_equal(self.action(policy), self.action(self.model)), f"other actions after {what}")

    def evaluate(self) -> None:
        before = state(self.model.policy)
        rewards, lengths = evaluate_policy(
            self.model, self.model.get_env(), self.case.n_envs, return_episode_rewards=True, warn=False
        )
        expect(lengths == [EPISODE] * self.case.n_envs, f"evaluate_policy() ran episodes of {lengths}")
        expect(bool(np.isfinite(rewards).all()), f"evaluate_policy() gave {rewards}")
        expect(same(state(self.model.policy), before), "evaluate_policy() changed parameters")


def run(cls: type[OffPolicyAlgorithm], case: Case, folder: Path) -> Outcome:
    """Build, learn and do the rest."""
    vec_env = DummyVecEnv([functools.partial(CaseEnv, case, index) for index in range(case.n_envs)])
    env = VecNormalize(vec_env) if case.is_normalized else vec_env
    env.action_space.seed(case.number % 2**31)  # `seed=None` leaves it as it is
    model = build(cls, case, env, folder)
    for name, value in case.arguments.items():
        if isinstance(value, (Real, np.number, th.Tensor)) and hasattr(model, name) and name != "train_freq":
            expect(float(getattr(model, name)) == float(value), f"`{name}` became {getattr(model, name)!r}")
    before = state(model.actor), state(model.critic)
    model.learn(STEPS)
    moved = tuple(not same(state(part), old) for part, old in zip((model.actor, model.critic), before, strict=True))
    expect(not case.fault or bool(case.happened) or LateNoise.has_happened, f"{case.fault} did not happen")
    obs = env.reset()
    for deterministic in (False, True):
        actions, _ = model.predict(obs, deterministic=deterministic)
        is_inside = all(action.astype(case.action_space.dtype) in case.action_space for action in actions)
        expect(is_inside, f"{actions} not in {case.action_space}")
    protocols = Protocols(model, case, obs, folder)
    expect(np.array_equal(actions, protocols.action(model)), "two deterministic actions")
    for step in case.protocol:
        getattr(protocols, "continue_" if step == "continue" else step)()
    fingerprint = sum(parameter.detach().double().abs().sum().item() for parameter in model.policy.parameters())
    return Outcome([counts(model), *protocols.counts], moved, fingerprint)


@contextlib.contextmanager
def alone(number: int) -> Iterator[Path]:
    """A folder and random numbers of its own, no output, no warnings, and ``Hang`` after some seconds."""

    def hang(*args):
        raise Hang

    states = random.getstate(), np.random.get_state(), th.get_rng_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    th.manual_seed(number)
    old_handler = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)  # again, where Python ignores what a destructor raises
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield Path(folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
        random.setstate(states[0])
        np.random.set_state(states[1])
        th.set_rng_state(states[2])


def attempt(cls: type[OffPolicyAlgorithm], case: Case) -> tuple[Outcome | BaseException, Case]:
    """
    :param cls: DQS or SAC
    :param case: is copied
    :return: the outcome of ``run()`` or what it raised, and the copy
    """
    case, LateNoise.has_happened = copy.deepcopy(case), False
    try:
        with alone(case.number) as folder:
            result: Outcome | BaseException = run(cls, case, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        result = error
    if LateNoise.has_happened:
        case.happened.append(case.fault)
    return result, case


# The verdict

REMEDY = re.compile(
    r"\b(must|pass|give|use|needs?|remove|leave|mend|fix|load|lower|subtract|flatten|known|did you mean|it is one of)\b", re.I
)
# Training that diverges without a planted fault: for SAC, too
DIVERGED = re.compile(r"^(train/\w+|policy\.\S+|policy: the action .*) is not finite.*load an earlier checkpoint", re.S)


def texts(value: Any) -> set[str]:
    """How a message may write a value."""
    found = {repr(value)[:400], str(value)[:400]}
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found.add(repr(float(value)))
    if isinstance(value, dict):
        found |= {f"{key}={part!r}" for key, part in value.items()}
    if isinstance(value, type):
        found.add(value.__name__)
    elif type(value).__module__ != "builtins":
        found.add(type(value).__name__)
    if callable(value) and not isinstance(value, type):
        for args in ((1.0,), (0.0,), ()):  # a schedule is named by what it gives
            try:
                found |= {repr(value(*args)), str(value(*args))}
            except Exception as error:
                found.add(type(error).__name__)
    return found - {""}


def is_named(name: str, value: Any, text: str) -> bool:
    """Whether a message names argument and value: ``name=value``, or the name and "got" or "gave" the value."""
    value_pattern = "(" + "|".join(rf"(?<![\w.-]){re.escape(written)}(?!\w|\.\d)" for written in texts(value)) + ")"
    if re.search(rf"\b{name}={value_pattern}", text):
        return True
    start = re.search(rf"`{name}`|\b{name}:", text)
    return start is not None and re.search(rf"\b(got|gave|fails)\b.*{value_pattern}", text[start.end() :], re.S) is not None


def named(error: BaseException, case: Case) -> set[str]:
    """What a refusal names, with its value and a remedy; nothing if it is no proper refusal."""
    text = str(error)
    if not isinstance(error, ValueError) or not REMEDY.search(text):
        return set()
    given = {**case.defaults(), "net_arch": [4], **case.arguments, **case.policy_kwargs}
    found = {name for name, value in given.items() if is_named(name, value, text)}
    if text.startswith("env: "):
        for name in ("observation_space", "action_space"):
            space = getattr(case, name)
            if f"the {name.replace('_', ' ')} {space}" in text or f"the {name.replace('_', ' ')} is {space}" in text:
                found.add(name)
    return found


def names_fault(error: BaseException, case: Case) -> bool:
    """Whether a refusal names the quantity that was planted, its value, the environment and the remedy."""
    what, _, value = case.fault.rpartition(" ")
    text = str(error)
    start = "`action_noise`: the noise" if what == "action_noise" else f"the {what}"
    if case.n_envs > 1 and not what.startswith(("first", "action_noise")):
        start += f" of environment {case.n_envs - 1} "
    is_written = re.search(r"\b(inf|1(\.0*)?e\+39)\b" if value != "nan" else r"\bnan\b", text)
    is_refusal = isinstance(error, ValueError) and text.startswith(start) and " is not finite at step " in text
    return is_refusal and is_written is not None and REMEDY.search(text) is not None


def plain_text(error: BaseException) -> str:
    """Type and text of an error, without what may differ between the algorithms: their names, numbers and addresses."""
    text = re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[+-]?\d+)?", "N", str(error))
    return f"{type(error).__name__}: {re.sub('DQS|SAC', '', text)}"


def verdict(case: Case, cls: type[DQS] = DQS) -> tuple[str, str]:
    """
    :param case: is not changed
    :param cls: DQS, or a faulty subclass to test the verdict
    :return: the column of the table, and why
    """
    (dqs, attempted), (sac, _) = attempt(cls, case), attempt(SAC, case)
    reason = plain_reason(dqs)
    column = judge(case, attempted, dqs, sac)
    if not isinstance(dqs, Outcome) or column.startswith("fault"):
        reason += f" | SAC: {plain_reason(sac)}"
    return column, reason


def plain_reason(result: Outcome | BaseException) -> str:
    text = str(result.counts) if isinstance(result, Outcome) else f"{type(result).__name__}: {result}"
    return " ".join(text.split())[:300]


def judge(case: Case, attempted: Case, dqs: Outcome | BaseException, sac: Outcome | BaseException) -> str:
    works = isinstance(sac, Outcome)
    if isinstance(dqs, Hang):
        return "fault: hangs"
    if isinstance(dqs, WrongResultError):
        is_same = isinstance(sac, WrongResultError) and plain_text(sac) == plain_text(dqs)
        return "same error as SAC" if is_same and not case.fault else "fault: wrong result"
    if case.fault:
        if isinstance(dqs, Outcome):
            return "fault: what was planted is not noticed"
        if names_fault(dqs, case):
            return "refused by name"
        is_reached = bool(attempted.happened)
        return judge_error(case, dqs, sac) if not is_reached else "fault: the planted quantity is not named"
    if isinstance(dqs, Outcome):
        if not np.isfinite(dqs.fingerprint):
            return "fault: weights that are not finite"
        if not works:
            return "works, SAC does not"
        if dqs.counts != sac.counts:
            return "fault: other counts than SAC"
        # A small network may have no gradient
        return "works as SAC" if all(map(operator.ge, dqs.moved, sac.moved)) else "fault: does not learn, SAC does"
    return judge_error(case, dqs, sac)


def judge_error(case: Case, dqs: BaseException, sac: Outcome | BaseException) -> str:
    works = isinstance(sac, Outcome)
    if not works and plain_text(dqs) == plain_text(sac):
        return "same error as SAC"
    if DIVERGED.search(str(dqs)) and isinstance(dqs, ValueError) and not (works and np.isfinite(sac.fingerprint)):
        if works or re.search(r"\b(nan|inf)\b", str(sac)):
            return "refused by name"
    names = named(dqs, case)
    if works and names and not names & case.odd:
        return "fault: refuses good values, SAC works"
    if names:
        return "refused by name"
    if isinstance(dqs, ValueError):
        return "fault: refusal without argument, value or remedy"
    return "fault: raw error, SAC works" if works else "fault: another raw error than SAC"


# Tests


@pytest.mark.parametrize("number", range(25))
def test_fuzz(number):
    column, reason = verdict(make_case(number))
    assert not column.startswith("fault"), f"{column}: {reason}"


class RaisesTypeError(DQS):
    def __init__(self, *args, **kwargs):
        raise TypeError("unsupported operand")


class NamesNothing(DQS):
    def __init__(self, *args, **kwargs):
        raise ValueError("The batch size is wrong, pass another.")


class NamesNoValue(DQS):
    def __init__(self, *args, **kwargs):
        raise ValueError("`batch_size` must be an integer >= 1.")


class NamesNoRemedy(DQS):
    def __init__(self, *args, **kwargs):
        raise ValueError(f"batch_size={kwargs['batch_size']} is wrong.")


class RefusesGoodValue(DQS):
    def __init__(self, *args, **kwargs):
        raise ValueError(f"`batch_size` must be an integer >= 256, got {kwargs['batch_size']}.")


class RefusesNotFinite(DQS):
    def learn(self, *args, **kwargs):
        raise ValueError("the reward is not finite at step 4: nan. Fix the environment.")


class Loops(DQS):
    def learn(self, *args, **kwargs):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)


class LearnsNothing(DQS):
    def train(self, gradient_steps, batch_size=64):
        self._n_updates += gradient_steps


class UpdatesTwice(DQS):
    def train(self, gradient_steps, batch_size=64):
        super().train(2 * gradient_steps, batch_size)


class IgnoresValue(DQS):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "gamma": 0.5})


class SetsNothing(DQS):
    """Neither from a dictionary nor when loading."""

    def set_parameters(self, *args, **kwargs):
        pass


class LoadsNoBuffer(DQS):
    def load_replay_buffer(self, *args, **kwargs):
        pass


class LoadsOtherBuffer(DQS):
    def load_replay_buffer(self, *args, **kwargs):
        super().load_replay_buffer(*args, **kwargs)
        self.replay_buffer.rewards += 1


class LosesCounter(DQS):
    def save(self, *args, **kwargs):
        n_updates, self._n_updates = self._n_updates, 0
        super().save(*args, **kwargs)
        self._n_updates = n_updates


class DoesNotGoOn(DQS):
    def learn(self, *args, reset_num_timesteps=True, **kwargs):
        return super().learn(*args, **kwargs) if reset_num_timesteps else self


class RandomPolicy(DQSPolicy):
    """Loads and copies nothing."""

    @classmethod
    def load(cls, path, device="auto"):
        policy = super().load(path, device)
        for parameter in policy.parameters():
            parameter.data.mul_(2)
        return policy

    def __deepcopy__(self, memo):
        return self


class ActsOutside(DQS):
    def predict(self, *args, **kwargs):
        actions, hidden = super().predict(*args, **kwargs)
        return actions + (3 if kwargs.get("deterministic", True) else 0), hidden


class FailsInEvaluation(DQS):
    def predict(self, *args, **kwargs):
        if kwargs.get("episode_start") is not None:  # only evaluate_policy() gives it
            raise TypeError("no evaluation")
        return super().predict(*args, **kwargs)


SIMPLE = Case(BOX, ACTIONS.good[0])


@pytest.mark.parametrize(
    ("cls", "changes", "column"),
    [
        (DQS, {}, "works as SAC"),
        (DQS, {"protocol": PROTOCOLS}, "works as SAC"),
        (DQS, {"arguments": {"ent_coef": 0}, "odd": {"ent_coef"}}, "refused by name"),
        (DQS, {"arguments": {"ent_coef": 0}}, "fault: refuses good values, SAC works"),
        (DQS, {"arguments": {"buffer_size": "x"}, "odd": {"buffer_size"}}, "refused by name"),
        (DQS, {"action_space": spaces.Discrete(3), "odd": {"action_space"}}, "refused by name"),
        (DQS, {"arguments": {"policy": "CnnPolicy"}}, "same error as SAC"),
        (RaisesTypeError, {}, "fault: raw error, SAC works"),
        (RaisesTypeError, {"arguments": {"policy": "CnnPolicy"}}, "fault: another raw error than SAC"),
        *[
            (cls, {"arguments": {"batch_size": 8}, "odd": {"batch_size"}}, "fault: refusal without argument, value or remedy")
            for cls in (NamesNothing, NamesNoValue, NamesNoRemedy)
        ],
        (RefusesGoodValue, {"arguments": {"batch_size": 8}, "odd": {"batch_size"}}, "refused by name"),
        (RefusesGoodValue, {"odd": {"tau"}, "arguments": {"batch_size": 8}}, "fault: refuses good values, SAC works"),
        (RefusesNotFinite, {}, "fault: refusal without argument, value or remedy"),
        (RefusesNotFinite, {"fault": "observation nan"}, "fault: refusal without argument, value or remedy"),
        (Loops, {}, "fault: hangs"),
        (LearnsNothing, {}, "fault: does not learn, SAC does"),
        (UpdatesTwice, {}, "fault: other counts than SAC"),
        (IgnoresValue, {"arguments": {"gamma": 0.9}}, "fault: wrong result"),
        (SetsNothing, {"protocol": ("set_parameters",)}, "fault: wrong result"),
        (SetsNothing, {"protocol": ("save",)}, "fault: wrong result"),
        (LoadsNoBuffer, {"protocol": ("buffer",)}, "fault: wrong result"),
        (LoadsOtherBuffer, {"protocol": ("buffer",)}, "fault: wrong result"),
        (LosesCounter, {"protocol": ("save",)}, "fault: wrong result"),
        (DoesNotGoOn, {"protocol": ("save",)}, "fault: wrong result"),
        (DoesNotGoOn, {"protocol": ("continue",)}, "fault: wrong result"),
        (ActsOutside, {}, "fault: wrong result"),
        (FailsInEvaluation, {"protocol": ("evaluate",)}, "fault: raw error, SAC works"),
    ],
)
def test_verdict(cls, changes, column, monkeypatch):
    if cls is Loops:
        monkeypatch.setitem(globals(), "SECONDS", 1)
    assert verdict(dataclasses.replace(SIMPLE, **changes), cls)[0] == column


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("`batch_size` must be an integer >= 1, got 0.", True),
        ("batch_size=0: it is no size, pass 1.", True),
        ("`batch_size` must be an integer >= 0, got 10.", False),
        ("`batch_size` must be an integer >= 0.", False),
        ("`batch_size` is wrong, got 0.", False),
        ("batch_size must be an integer >= 1, got 0.", False),
        ("batch_size=0.5: it is no size, pass 1.", False),
        ("`my_batch_size` must be an integer >= 1, got 0.", False),
        ("`tau` must be above 0, got 0.", False),
        ("env: the action space must be another, got 0.", False),
    ],
)
def test_refusals_name_argument_value_and_remedy(text, is_refusal):
    case = dataclasses.replace(SIMPLE, arguments={"batch_size": 0})
    assert named(ValueError(text), case) == ({"batch_size"} if is_refusal else set())
    assert named(TypeError(text), case) == set()


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("the reward of environment 1 (of 0 to 1) is not finite at step 8: [0 nan]. Fix the environment.", True),
        ("the reward of environment 0 (of 0 to 1) is not finite at step 8: [0 nan]. Fix the environment.", False),
        ("the reward is not finite at step 8: [0 nan]. Fix the environment.", False),
        ("the observation of environment 1 (of 0 to 1) is not finite at step 8: [0 nan]. Fix the environment.", False),
        ("the reward of environment 1 (of 0 to 1) is not finite at step 8. Fix the environment.", False),
        ("the reward of environment 1 (of 0 to 1) is not finite at step 8: [0 nan].", False),
    ],
)
def test_planted_faults_are_named_with_environment_value_and_remedy(text, is_named):
    case = dataclasses.replace(SIMPLE, fault="reward nan", n_envs=2)
    assert names_fault(ValueError(text), case) == is_named and not names_fault(RuntimeError(text), case)


@pytest.mark.parametrize("step", ["policy", "deepcopy"])
def test_verdict_on_a_policy_that_is_not_copied(step):
    aliases = {"policy_aliases": {"MlpPolicy": RandomPolicy}}
    cls = type("OwnAlias", (DQS,), aliases)
    assert verdict(dataclasses.replace(SIMPLE, protocol=(step,)), cls)[0] == "fault: wrong result"


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_happen_and_are_named(fault, n_envs, monkeypatch):
    noise = {"action_noise": LateNoise(float(fault.split()[1]))} if "noise" in fault else {}
    for space in (OBSERVATIONS.good[1], OBSERVATIONS.good[-2]):
        case = Case(space, ACTIONS.good[0], fault, n_envs, arguments=noise)
        assert verdict(case)[0] == "refused by name"
    monkeypatch.setattr(FiniteStepCallback, "check", lambda *args: None)
    monkeypatch.setattr("sb3_dqs.dqs.check_finite", lambda *args: None)
    result, attempted = attempt(DQS, case)
    assert attempted.happened and not (isinstance(result, ValueError) and names_fault(result, case))
    assert verdict(case)[0].startswith("fault")


def test_fault_that_does_not_happen():
    case = Case(spaces.Discrete(3), ACTIONS.good[0], "observation nan")
    assert verdict(case)[0] == "fault: wrong result"


def test_cases_are_repeatable_and_keep_their_values():
    her = {"n_steps": 2, "replay_buffer_kwargs": {}, "seed": None}
    case = dataclasses.replace(SIMPLE, arguments=her, protocol=PROTOCOLS, number=5)
    first, _ = attempt(DQS, case)
    th.manual_seed(100)
    np.random.seed(100)
    second, _ = attempt(DQS, case)
    assert isinstance(first, Outcome) and first == second and her["replay_buffer_kwargs"] == {}
    assert attempt(DQS, dataclasses.replace(case, number=6))[0].fingerprint != first.fingerprint
    assert repr(make_case(17)) == repr(make_case(17)) != repr(make_case(18))


def test_exit_status(monkeypatch, capsys):
    assert main(["--start", "3", "--cases", "4"]) == 0
    assert "| sum | 4 |" in capsys.readouterr().out
    monkeypatch.setitem(globals(), "DQS", RaisesTypeError)
    monkeypatch.setattr(verdict, "__defaults__", (RaisesTypeError,))
    assert main(["--start", "3", "--cases", "4"]) == 1
    assert re.search(r"case \d: fault: .*unsupported operand", capsys.readouterr().out)


# The campaign


def judge_number(number: int) -> tuple[int, str, str, str]:
    """Number, kind, column of the table, and why."""
    th.set_num_threads(1)
    case = make_case(number)
    return number, case.kind, *verdict(case)


COLUMNS = ["works as SAC", "works, SAC does not", "refused by name", "same error as SAC"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    args = parser.parse_args(arguments)
    numbers_of_cases = range(args.start, args.start + args.cases)
    table: dict[str, Counter] = defaultdict(Counter)
    faults = []
    with contextlib.ExitStack() as stack:
        judged = map(judge_number, numbers_of_cases)
        if args.jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, context))
            judged = pool.map(judge_number, numbers_of_cases, chunksize=20)
        for number, kind, column, reason in tqdm(judged, total=args.cases, mininterval=10, file=sys.stderr):
            is_fault = column.startswith("fault")
            for row in (kind, "sum"):
                table[row].update(["cases", "faults" if is_fault else column])
            if is_fault:
                faults.append(f"case {number}: {column}: {reason}\n    {make_case(number)}")
                print(faults[-1], file=sys.stderr, flush=True)
    columns = ["cases", *COLUMNS, "faults"]
    print(f"\nCases {args.start} to {args.start + args.cases - 1}\n\n| kind | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for kind in sorted(table, key=lambda kind: (kind == "sum", kind)):
        print(f"| {kind} | {' | '.join(str(table[kind][column]) for column in columns)} |")
    print(f"\n{len(faults)} faults" + "".join(f"\n{fault}" for fault in faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
