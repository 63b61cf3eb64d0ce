"""
Random environments, arguments and protocols for DQS, with SAC as the control: where SAC works, DQS works or refuses with a
ValueError that names argument, value and remedy.

    python tests/sb3/test_fuzz.py --cases 10000 --seed 0

prints a table, and the cases that are faults.
"""

import argparse
import contextlib
import functools
import inspect
import io
import signal
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import SACPolicy
from toys import RandomEnv
from tqdm import tqdm

from sb3_dqs import DQS
from sb3_dqs.policies import DQSPolicy

NAN, INF = float("nan"), float("inf")
SECONDS = 120  # a case that takes longer hangs
BOX = spaces.Box(-1, 1, (2,), np.float32)
OBSERVATIONS = [
    BOX,
    spaces.Box(-1, 1, (3, 2), np.float64),
    spaces.Box(-INF, INF, (3,), np.float32),
    spaces.Box(-(2**31), 2**31 - 1, (2,), np.int64),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Box(0, 255, (36, 36, 1), np.uint8),
    spaces.Discrete(4),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
    spaces.Dict({"vector": BOX, "index": spaces.Discrete(3)}),
    spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 1), np.uint8), "bits": spaces.MultiBinary(2)}),
    spaces.Discrete(3, start=1),
    spaces.Tuple([BOX, BOX]),
    spaces.Text(4),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Dict({"a.b": BOX}),
    spaces.Dict({"inner": spaces.Dict({"x": BOX})}),
]
ACTIONS = [
    spaces.Box(-1, 1, (1,), np.float32),
    spaces.Box(-2, 3, (2,), np.float64),
    spaces.Box(np.float32([0, -1e-3]), np.float32([1e-3, 1e6]), (2,), np.float32),
    spaces.Box(-1, 1, (2, 2), np.float32),
    spaces.Box(-1, 1, (17,), np.float32),
    spaces.Box(-1, 1, (1,), np.float16),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(-INF, INF, (1,), np.float32),
    spaces.Box(0, 3, (2,), np.int32),
    spaces.Box(-3e38, 3e38, (1,), np.float32),
    spaces.Box(0, 0, (1,), np.float32),
    spaces.Discrete(3),
    spaces.MultiBinary(2),
]
NUMBERS = [
    0,
    1,
    0.5,
    -0.5,
    1e-3,
    1e39,
    NAN,
    INF,
    None,
    "x",
    True,
    Fraction(1, 3),
    np.float64(0.9),
    np.float32(0.1),
    th.tensor(0.2),
]
SMALL = [0, 1, 2, 3, -1, 2.5, None, "x", True, np.int64(2), np.float64(2), np.uint8(3), th.tensor(2)]
COUNTS = [*SMALL, 10**20]  # where it does not make SAC run for ever
FLAGS = [True, False, None, 0, "x", np.bool_(True)]
FUNCTIONS = [lambda p: 1e-3 * p, lambda p: 1e-3, lambda: 1e-3, lambda p: None, lambda p: NAN, lambda p: np.float32(1e-3)]
ARGUMENTS: dict[str, list[Any]] = {
    "learning_rate": [*NUMBERS, *FUNCTIONS],
    "buffer_size": [30, 40, *COUNTS],
    "learning_starts": [0, 3, 100, *NUMBERS],
    "batch_size": [1, 3, 8, *COUNTS],
    "tau": NUMBERS,
    "gamma": NUMBERS,
    "train_freq": [*SMALL, (2, "step"), (1, "episode"), (1, "minute"), [1, "step"], (np.int64(2), "step")],
    "gradient_steps": SMALL,
    "action_noise": [
        None, "x", NormalActionNoise(np.zeros(1), np.ones(1)), NormalActionNoise(np.zeros(2), np.ones(2)),
        OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)), NormalActionNoise(np.zeros(1), np.full(1, NAN)),
    ],
    "replay_buffer_class": [None, ReplayBuffer, DictReplayBuffer, HerReplayBuffer, dict, "ReplayBuffer"],
    "replay_buffer_kwargs": [
        None, {}, {"handle_timeout_termination": False}, {"n_sampled_goal": 2}, {"x": 1}, [1], {"device": "cpu"},
    ],
    "optimize_memory_usage": FLAGS,
    "n_steps": COUNTS,
    "ent_coef": [*NUMBERS, "auto", "auto_0.1", "auto_0", "auto_x", *FUNCTIONS],
    "target_update_interval": COUNTS,
    "target_entropy": [*NUMBERS, "auto", -1000.0],
    "use_sde": FLAGS,
    "sde_sample_freq": COUNTS,
    "use_sde_at_warmup": FLAGS,
    "stats_window_size": COUNTS,
    "tensorboard_log": [None, 1, Path("logs")],
    "verbose": [0, None, "x", False],
    "seed": [0, 3, -1, None, 1.5, np.int64(3), 2**40],
    "device": ["cpu", "auto", "x", None, th.device("cpu")],
    "policy": ["MlpPolicy", "CnnPolicy", "MultiInputPolicy", "x", 3],
    "n_mc_samples": COUNTS,
    "own_draws_freq": COUNTS,
    "own_share": NUMBERS,
    "n_draws": COUNTS,
    "next_share": NUMBERS,
    "n_copies": COUNTS,
    "policy_delay": COUNTS,
    "denoiser_target": ["posterior_mean", "energy_gradient", "x", None],
    "backup": ["soft", "hard", "x", None],
    "augmentation": [None, th.nn.Identity(), th.nn.Identity, "x"],
}  # fmt: skip
POLICY_KWARGS: dict[str, list[Any]] = {
    "net_arch": [
        [], [4], (4, 3), [np.int64(4)], {"pi": [4], "qf": [3, 2]}, {"pi": [], "qf": []}, {"pi": [4]}, [0], 8, "x", [2.5],
    ],
    "activation_fn": [
        th.nn.ReLU, th.nn.Tanh, th.nn.Mish, th.nn.PReLU, functools.partial(th.nn.LeakyReLU, 0.1), lambda: th.nn.ELU(), "x",
        th.nn.Linear,
    ],
    "log_std_init": NUMBERS,
    "use_expln": FLAGS,
    "clip_mean": NUMBERS,
    "features_extractor_class": [FlattenExtractor, CombinedExtractor, "x", th.nn.Linear],
    "features_extractor_kwargs": [None, {}, {"x": 1}, [1]],
    "normalize_images": FLAGS,
    "optimizer_class": [th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.LBFGS, "x"],
    "optimizer_kwargs": [None, {}, {"eps": 1e-5}, {"weight_decay": 1e-3}, {"lr": 1}, {"x": 1}, {"betas": 3}, [1]],
    "n_critics": SMALL,
    "share_features_extractor": FLAGS,
    "critic_class": ["batch_norm", "mlp", "x", None],
    "critic_kwargs": [None, {}, {"momentum": 0.5}, {"x": 1}],
    "diffusion_steps": COUNTS,
    "n_frequencies": COUNTS,
    "best_of_n_by_q": COUNTS,
    "x": [1],
}  # fmt: skip
PROTOCOLS = ("save", "buffer", "continue", "set_parameters", "policy", "evaluate")
FAULTS = ("reward nan", "reward 1e39", "observation nan", "observation inf")


@dataclass
class Case:
    """An environment, arguments other than the defaults, and what is done after learning."""

    observation_space: spaces.Space
    action_space: spaces.Space
    fault: str = ""
    n_envs: int = 1
    is_normalized: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    protocol: tuple[str, ...] = ()


def some(names: dict[str, list[Any]], at_most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Up to so many arguments, each with one of its values."""
    pairs = st.sampled_from(list(names)).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(names[name])))
    return st.lists(pairs, max_size=at_most, unique_by=lambda pair: pair[0]).map(dict)


def mostly(values: list[Any], n_good: int) -> st.SearchStrategy[Any]:
    """The first values, which work, three times out of four."""
    return st.integers(0, 3).flatmap(lambda i: st.sampled_from(values[:n_good] if i else values))


CASES = st.builds(
    Case,
    observation_space=mostly(OBSERVATIONS, 12),
    action_space=mostly(ACTIONS, 7),
    fault=st.integers(0, 7).flatmap(lambda i: st.just("") if i else st.sampled_from(FAULTS)),
    n_envs=st.sampled_from([1, 1, 1, 2]),
    is_normalized=st.sampled_from([False, False, False, True]),
    arguments=some(ARGUMENTS, 2),
    policy_kwargs=some(POLICY_KWARGS, 2),
    protocol=st.lists(st.sampled_from(PROTOCOLS), max_size=2).map(tuple),
)


class FaultyEnv(RandomEnv):
    """A random environment; the reward or the observation of its ninth step is not finite."""

    def __init__(self, case: Case):
        super().__init__(case.observation_space, case.action_space)
        self.fault, self.total = case.fault, 0

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        reward = float(np.mean(action))
        self.total += 1
        if self.fault and self.total == 9:
            what, _, value = self.fault.partition(" ")
            if what == "reward":
                reward = float(value)
            elif isinstance(obs, np.ndarray) and np.issubdtype(obs.dtype, np.floating):
                obs = np.full_like(obs, float(value))
        return obs, reward, terminated, truncated, info


class WrongResultError(AssertionError):
    """What worked, but not as it should."""


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongResultError(what)


def run(cls: type[OffPolicyAlgorithm], case: Case, folder: Path) -> tuple[int, ...]:
    """
    Build, learn and do the rest.

    :return: what DQS and SAC must agree on: steps, updates, rows of the buffer
    """
    known = inspect.signature(cls).parameters
    dqs_only = inspect.signature(DQSPolicy).parameters.keys() - inspect.signature(SACPolicy).parameters.keys()
    arguments = {name: value for name, value in case.arguments.items() if name in known}
    policy_kwargs = {"net_arch": [4], **case.policy_kwargs}
    if cls is DQS:
        policy_kwargs = {"diffusion_steps": 3, **policy_kwargs}
        arguments = {"n_mc_samples": 2, **arguments}
    else:
        policy_kwargs = {name: value for name, value in policy_kwargs.items() if name not in dqs_only}
    vec_env = DummyVecEnv([functools.partial(FaultyEnv, case)] * case.n_envs)
    env = VecNormalize(vec_env) if case.is_normalized else vec_env
    is_dict = isinstance(case.observation_space, spaces.Dict)
    defaults = {
        "policy": "MultiInputPolicy" if is_dict else "MlpPolicy", "learning_starts": 5, "batch_size": 4, "buffer_size": 40,
        "device": "cpu", "seed": 0,
    }  # fmt: skip
    model = cls(**{**defaults, "env": env, "policy_kwargs": policy_kwargs, **arguments})
    model.learn(14)
    obs = env.reset()
    for deterministic in (False, True):
        actions, _ = model.predict(obs, deterministic=deterministic)
        expect(all(action in case.action_space for action in actions), f"{actions} not in {case.action_space}")
    expect(np.array_equal(actions, model.predict(obs, deterministic=True)[0]), "two deterministic actions")
    for step in case.protocol:
        if step == "save":
            model.save(folder / "model")
            loaded = cls.load(folder / "model", env=env, device="cpu")
            expect(np.array_equal(actions, loaded.predict(obs, deterministic=True)[0]), "another action after load()")
            loaded.learn(8, reset_num_timesteps=False)
        elif step == "buffer":
            model.save_replay_buffer(folder / "buffer")
            rows = model.replay_buffer.size()
            model.load_replay_buffer(folder / "buffer")
            expect(model.replay_buffer.size() == rows, "another replay buffer after load_replay_buffer()")
        elif step == "continue":
            model.learn(8, reset_num_timesteps=False)
        elif step == "set_parameters":
            model.set_parameters(model.get_parameters())
        elif step == "policy":
            model.policy.save(folder / "policy")
            policy = type(model.policy).load(folder / "policy", device="cpu")
            expect(
                np.array_equal(*(p.predict(obs, deterministic=True)[0] for p in (policy, model.policy))),
                "another policy after load()",
            )
        else:
            model.get_env().reset()
        actions, _ = model.predict(obs, deterministic=True)
    if cls is DQS:
        expect(all(th.isfinite(p).all() for p in model.policy.parameters()), "weights that are not finite")
    return model.num_timesteps, model._n_updates, model.replay_buffer.size()


def attempt(cls: type[OffPolicyAlgorithm], case: Case) -> Any:
    """The result of ``run()``, or the exception."""

    def hang(*args):
        raise TimeoutError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    state = np.random.get_state()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                return run(cls, case, Path(folder))
    except Exception as error:
        return error
    finally:
        signal.alarm(0)
        np.random.set_state(state)


def is_refusal(error: Exception, case: Case) -> bool:
    """Whether it is a ValueError that names what is at fault and its value."""
    text = str(error)
    given = {**case.arguments, **case.policy_kwargs}
    named = [name for name in given if name in text]
    from_env = ("env:", "observation", "reward", "`batch_size`", "CnnPolicy", "dictionary", "buffer", "policy=", "n_steps")
    return isinstance(error, ValueError) and len(text) > 30 and bool(named or any(word in text for word in from_env))


def verdict(case: Case) -> tuple[str, Any]:
    """Which row of the table a case belongs to, and what DQS raised."""
    dqs, sac = attempt(DQS, case), attempt(SAC, case)
    works = not isinstance(sac, Exception)
    if isinstance(dqs, TimeoutError):
        return "fault: hangs", dqs
    if isinstance(dqs, WrongResultError):
        return ("fault: wrong result" if not isinstance(sac, WrongResultError) else "wrong result, as SAC"), dqs
    if not isinstance(dqs, Exception):
        if works and dqs != sac:
            return "fault: other steps, updates or rows than SAC", (dqs, sac)
        return ("both work" if works else "DQS works, SAC does not"), None
    if is_refusal(dqs, case):
        return ("DQS refuses by name, SAC works" if works else "DQS refuses by name, SAC fails, too"), dqs
    if not works and type(dqs) is type(sac):
        return "the same error as SAC", dqs
    return ("fault: raw error, SAC works" if works else "fault: raw error, SAC fails, too"), dqs


@settings(max_examples=25, derandomize=True)
@given(CASES)
def test_fuzz(case):
    row, error = verdict(case)
    assert not row.startswith("fault"), f"{row}: {error!r}"


@pytest.mark.parametrize(
    ("case", "row"),
    [
        (Case(BOX, ACTIONS[0]), "both work"),
        (Case(BOX, ACTIONS[0], arguments={"ent_coef": 0}), "DQS refuses by name, SAC works"),
        (Case(BOX, ACTIONS[0], fault="reward nan"), "DQS refuses by name, SAC fails, too"),
        (Case(BOX, ACTIONS[0], arguments={"buffer_size": "x"}), "DQS refuses by name, SAC fails, too"),
        (Case(BOX, ACTIONS[11]), "DQS refuses by name, SAC fails, too"),
    ],
)
def test_verdicts(case, row):
    assert verdict(case)[0] == row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    th.set_num_threads(1)
    rows, faults, refused = Counter(), Counter(), Counter()
    progress = tqdm(total=args.cases)

    @seed(args.seed)
    @settings(
        max_examples=args.cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(CASES)
    def campaign(case):
        row, error = verdict(case)
        rows[row] += 1
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        if row.startswith("fault"):
            faults[f"{row}: {reason}"] += 1
            if faults[f"{row}: {reason}"] == 1:
                tqdm.write(f"{row}: {reason}\n    {case}")
        elif row == "DQS refuses by name, SAC works":
            refused[reason.split(",")[0][:70]] += 1
        progress.update()

    campaign()
    progress.close()
    print(f"\n| {args.cases} cases, seed {args.seed} | |\n|---|---|")
    for row, count in sorted(rows.items(), key=lambda pair: (pair[0].startswith("fault"), -pair[1])):
        print(f"| {row} | {count} |")
    print("\nRefused where SAC works:")
    for reason, count in refused.most_common(60):
        print(f"{count:6d}  {reason}")


if __name__ == "__main__":
    main()
