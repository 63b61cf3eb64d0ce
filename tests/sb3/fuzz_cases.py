"""Random cases of test_fuzz.py: pools of good and odd values, planted faults, and the case of a number."""

import functools
import inspect
import random
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.sac.policies import SACPolicy

from sb3_dqs import DQS
from sb3_dqs.policies import DQSPolicy

NAN, INF = float("nan"), float("inf")
FAULTY_STEP = 4


class Pool(NamedTuple):
    """
    Values of an argument.

    :param good: DQS works wherever SAC does
    :param odd: DQS works, or refuses by name
    """

    good: list[Any]
    odd: list[Any]


BOX = spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
GOAL = spaces.Dict({"observation": BOX, "achieved_goal": BOX, "desired_goal": BOX})
OBSERVATIONS = Pool(
    [
        BOX,
        spaces.Box(-1, 1, (3, 2), np.float64),
        spaces.Box(-INF, INF, (3,), np.float32),
        spaces.Box(-(2**31), 2**31 - 1, (2,), np.int64),
        spaces.Box(0, 255, (3,), np.uint8),
        IMAGE,
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.MultiBinary([2, 2]),
        spaces.Dict({"vector": BOX, "index": spaces.Discrete(3)}),
        spaces.Dict({"image": IMAGE, "bits": spaces.MultiBinary(2), "vector": spaces.Box(-1, 1, (3,), np.float64)}),
        GOAL,
    ],
    [
        spaces.Discrete(3, start=1),
        spaces.Tuple([BOX, BOX]),
        spaces.Text(4),
        spaces.Box(-1, 1, (), np.float32),
        spaces.Dict({"a.b": BOX}),
        spaces.Dict({"inner": spaces.Dict({"x": BOX})}),
    ],
)
ACTIONS = Pool(
    [
        spaces.Box(-1, 1, (1,), np.float32),
        spaces.Box(-2, 3, (2,), np.float64),
        spaces.Box(np.float32([0, -1e-3]), np.float32([1e-3, 1e6]), (2,), np.float32),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Box(-1, 1, (17,), np.float32),
        spaces.Box(-1, 1, (1,), np.float16),
    ],
    [
        spaces.Box(-1, 1, (), np.float32),
        spaces.Box(-INF, INF, (1,), np.float32),
        spaces.Box(0, 3, (2,), np.int32),
        spaces.Box(-3e38, 3e38, (1,), np.float32),
        spaces.Box(0, 0, (1,), np.float32),
        spaces.Discrete(3),
        spaces.MultiBinary(2),
    ],
)
NO_NUMBERS = [None, "x", True, [1], NAN, INF, -INF]
NUMBERS = [0, 1, 0.5, -0.5, 1e-3, 1e39, Fraction(1, 3), np.float64(0.9), np.float32(0.1), th.tensor(0.2), *NO_NUMBERS]
SMALL = [0, -1, -2, 2.5, np.float64(2), np.uint8(3), th.tensor(2), *NO_NUMBERS]
COUNTS = [*SMALL, 10**20]  # where it does not make SAC run for ever
FLAGS = Pool([True, False], [None, 0, "x", np.bool_(True)])
FEW = Pool([1, 2, 3, np.int64(2)], COUNTS)
SHARES = Pool([0.25, 0.5, 1, np.float32(0.5)], NUMBERS)
ODD_FUNCTIONS = [lambda: 1e-3, lambda p: None, lambda p: NAN, lambda p: -1.0, lambda p: "x"]
ARGUMENTS: dict[str, Pool] = {
    "learning_rate": Pool(
        [1e-3, 3e-4, np.float32(1e-3), lambda p: 1e-3 * p, lambda p: 1e-3, lambda p: np.float32(1e-3)],
        [*NUMBERS, *ODD_FUNCTIONS],
    ),
    "buffer_size": Pool([1, 2, 3, 10, 30, np.int64(40)], COUNTS),
    "learning_starts": Pool([0, 3, 5, 100, 2.5], NUMBERS),
    "batch_size": Pool([2, 3, 8, 64, np.int64(4)], [1, *COUNTS]),
    "tau": Pool([0.005, 0.5, 1, np.float32(0.1)], NUMBERS),
    "gamma": Pool([0, 0.9, 1, np.float32(0.9)], NUMBERS),
    "train_freq": Pool([1, 2, 3, (2, "step"), (1, "episode")], [*SMALL, (1, "minute"), [1, "step"], (np.int64(2), "step")]),
    "gradient_steps": Pool([0, 1, 2, -1], SMALL),
    "action_noise": Pool(
        [
            None,
            NormalActionNoise(np.zeros(1), np.ones(1)),
            OrnsteinUhlenbeckActionNoise(np.zeros(1), np.ones(1)),
        ],
        [
            "x",
            0.1,
            NormalActionNoise(np.zeros(2), np.ones(2)),
            NormalActionNoise(np.zeros(1), np.full(1, NAN)),
            NormalActionNoise(np.zeros(1), np.full(1, INF)),
        ],
    ),
    "replay_buffer_class": Pool([None, ReplayBuffer, DictReplayBuffer, HerReplayBuffer], [dict, "ReplayBuffer", 1]),
    "replay_buffer_kwargs": Pool(
        [None, {}, {"handle_timeout_termination": False}, {"n_sampled_goal": 2}],
        [{"x": 1}, [1], {"device": "cpu"}, {"n_sampled_goal": "x"}],
    ),
    "optimize_memory_usage": FLAGS,
    "n_steps": FEW,
    "ent_coef": Pool(
        ["auto", "auto_0.1", 0.1, 1, np.float64(0.9), np.float32(0.1)],
        [*NUMBERS, "auto_0", "auto_x", "auto_nan", lambda p: 1e-3, lambda p: 1e-3 * p, *ODD_FUNCTIONS],
    ),
    "target_update_interval": FEW,
    "target_entropy": Pool(["auto", -1, -3.0, 0.0, np.float32(-2)], [*NUMBERS, "auto_x", -1000.0]),
    "use_sde": FLAGS,
    "sde_sample_freq": Pool([-1, 1, 2, 4], COUNTS),
    "use_sde_at_warmup": FLAGS,
    "stats_window_size": Pool([1, 3, 100], COUNTS),
    "tensorboard_log": Pool([None, "logs", Path("logs") / "more"], [1, ["logs"]]),
    "verbose": Pool([0, 1, 2], [None, "x", False, -1]),
    "seed": Pool([0, 3, None, np.int64(3)], [-1, 1.5, 2**40, "x"]),
    "device": Pool(["cpu", "auto", th.device("cpu")], ["x", None, 3.5]),
    "policy": Pool(["MlpPolicy", "CnnPolicy", "MultiInputPolicy"], ["x", 3, None]),
    "n_mc_samples": Pool([2, 3, 8, np.int64(4)], [1, *COUNTS]),
    "own_draws_freq": FEW,
    "own_share": SHARES,
    "n_draws": FEW,
    "next_share": SHARES,
    "n_copies": FEW,
    "policy_delay": FEW,
    "denoiser_target": Pool(["posterior_mean", "energy_gradient"], ["x", None, 1]),
    "exploration_noise": Pool(["pink", "white"], ["red", None, 1]),
    "backup": Pool(["soft", "hard"], ["x", None, True]),
    "augmentation": Pool([None, th.nn.Identity()], [th.nn.Identity, "x"]),
}
POLICY_KWARGS: dict[str, Pool] = {
    "net_arch": Pool(
        [None, [], [4], (4, 3), [np.int64(4)], {"pi": [4], "qf": [3, 2]}, {"pi": [], "qf": []}],
        [{"pi": [4]}, [0], [-4], 8, "x", [2.5], [None], {}],
    ),
    "activation_fn": Pool(
        [th.nn.ReLU, th.nn.Tanh, th.nn.Mish, th.nn.PReLU, functools.partial(th.nn.LeakyReLU, 0.1), lambda: th.nn.ELU()],
        ["x", None, th.nn.Linear, lambda: None],
    ),
    "log_std_init": Pool([-3, 0.0, -1], NUMBERS),
    "use_expln": FLAGS,
    "clip_mean": Pool([2.0, 1.0], NUMBERS),
    "features_extractor_class": Pool([FlattenExtractor, CombinedExtractor], ["x", None, th.nn.Linear]),
    "features_extractor_kwargs": Pool([None, {}], [{"x": 1}, [1], "x"]),
    "normalize_images": FLAGS,
    "optimizer_class": Pool([th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop], [th.optim.LBFGS, "x", None]),
    "optimizer_kwargs": Pool(
        [None, {}, {"eps": 1e-5}, {"weight_decay": 1e-3}], [{"lr": 1}, {"x": 1}, {"betas": 3}, {"eps": "x"}, {"eps": -1}, [1]]
    ),
    "n_critics": Pool([1, 2, 3], [*SMALL]),
    "share_features_extractor": FLAGS,
    "critic_class": Pool(["batch_norm", "mlp"], ["x", None]),
    "critic_kwargs": Pool([None, {}], [{"momentum": 0.5}, {"momentum": "x"}, {"x": 1}, [1]]),
    "diffusion_steps": Pool([3, 4, np.int64(5)], [2, *COUNTS]),
    "n_frequencies": FEW,
    "best_of_n_by_q": Pool([None, 1, 4], COUNTS),
    "actor_averaging_rate": Pool([1.0, 0.01], [0, 1.5, "slow"]),
    "x": Pool([], [1]),
}
PROTOCOLS = ("save", "buffer", "continue", "set_parameters", "policy", "deepcopy", "evaluate")
# Planted in the last environment, at its 4th step (the terminal observation at its 7th), and in the 4th draw of the noise
FAULTS = (
    "reward nan", "reward inf", "reward -1e39", "observation nan", "observation inf", "observation 1e39",
    "first observation nan", "terminal observation nan", "terminal observation inf", "action_noise nan", "action_noise inf",
)  # fmt: skip
OWN_ARGUMENTS = inspect.signature(DQS).parameters.keys() - inspect.signature(SAC).parameters.keys()
OWN_POLICY_KWARGS = inspect.signature(DQSPolicy).parameters.keys() - inspect.signature(SACPolicy).parameters.keys()


@dataclass
class Case:
    """
    An environment, arguments other than the defaults, and what is done after learning.

    :param odd: names of what is not good
    :param happened: planted faults that came to pass; of one attempt
    """

    observation_space: spaces.Space
    action_space: spaces.Space
    fault: str = ""
    n_envs: int = 1
    is_normalized: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    protocol: tuple[str, ...] = ()
    odd: set[str] = field(default_factory=set)
    number: int = 0
    happened: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Row of the table."""
        if self.fault:
            return f"planted: {self.fault}"
        if self.odd & {"observation_space", "action_space"}:
            return "odd space"
        if not self.odd:
            return "good values only"
        own = (OWN_ARGUMENTS | OWN_POLICY_KWARGS) & self.odd
        return "odd value of an argument of DQS alone" if own else "odd value of an argument of SAC"

    def defaults(self) -> dict[str, Any]:
        """Arguments of both algorithms that make a case short."""
        is_dict = isinstance(self.observation_space, spaces.Dict)
        policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
        return {
            "policy": policy, "learning_starts": 5, "batch_size": 4, "buffer_size": 40, "device": "cpu", "seed": 0,
        }  # fmt: skip


def floating_parts(space: spaces.Space) -> list[str]:
    """Names of what can be NaN in an observation; ``""`` for one without parts."""
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    return [name for name, part in parts.items() if isinstance(part, spaces.Box) and part.dtype.kind == "f"]


def make_case(number: int) -> Case:
    """
    :param number: any integer
    :return: the same case for the same number
    """
    rng = random.Random(number)
    odd = set()
    fault = "" if rng.randrange(6) else rng.choice(FAULTS)
    may_be_odd = not fault and rng.random() < 0.5

    def choose(name: str, pool: Pool, odd_share: float) -> Any:
        is_odd = not pool.good or (may_be_odd and rng.random() < odd_share)
        if is_odd:
            odd.add(name)
        return rng.choice(pool.odd if is_odd else pool.good)

    def some(pools: dict[str, Pool]) -> dict[str, Any]:
        names = rng.sample([name for name, pool in pools.items() if pool.good or may_be_odd], rng.randint(0, 3))
        return {name: choose(name, pools[name], 0.4) for name in names}

    case = Case(
        choose("observation_space", OBSERVATIONS, 0.15),
        choose("action_space", ACTIONS, 0.15),
        fault,
        rng.choice([1, 1, 2]),
        arguments=some(ARGUMENTS),
        policy_kwargs=some(POLICY_KWARGS),
        protocol=tuple(rng.sample(PROTOCOLS, rng.randint(0, 2))),
        odd=odd,
        number=number,
    )
    if "action_noise" in fault:
        case.arguments["action_noise"] = LateNoise(float(fault.split()[-1]))
    elif "observation" in fault and not floating_parts(case.observation_space):
        case.fault = "reward nan"
    # What VecNormalize takes; it would clip an infinite terminal observation before DQS sees it
    if isinstance(case.observation_space, spaces.Box) and case.observation_space.shape and fault != "terminal observation inf":
        case.is_normalized = rng.randrange(3) == 0
    return case


class LateNoise(NormalActionNoise):
    """Not finite at the 4th draw."""

    has_happened = False  # of any copy

    def __init__(self, value: float):
        super().__init__(np.zeros(1), np.full(1, 0.1))
        self.value, self.count = value, 0

    def __call__(self):
        self.count += 1
        if self.count != FAULTY_STEP:
            return super().__call__()
        LateNoise.has_happened = True
        return np.full(1, self.value, np.float32)
