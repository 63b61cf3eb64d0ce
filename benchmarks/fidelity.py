"""
How close is the learned policy to exp(Q / ent_coef) / Z, beside the estimators of other papers and SAC's Gaussian?

    python benchmarks/fidelity.py --seeds 0 1 2 3

Trains the actor by ``DQS.actor_loss()`` and ``DQS.next_actor_loss()``, with the log-density of a known distribution in place
of Q, once per estimator of the regression target, with the same steps. Prints the sliced Wasserstein-1 distance of its actions
to exact samples over that between two exact sets (1 is perfect), the errors of the mode shares and of the entropy, and the
cost, as means and standard deviations over seeds. "exact samples" is ordinary denoising of exact samples: the limit of network
and solver. Every run is a row of ``benchmarks/results/fidelity.csv``; runs of this commit that are there are not run again,
and ``--report-only`` prints the rows of all commits. Some twenty seconds of one core per estimator, target and seed.

A name such as "four modes 17-D, many states" trains at random observations of 17 numbers instead of one observation. The
energy is the same at all of them, and the error of the shares is the mean of those at single observations: an actor can have
the right shares over all states together, and keep one mode in each. Distance and entropy are those of the actions of all
states together; from 500 actions per state an exact policy has an error of the shares of some 0.03.
"""

import argparse
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from common import (
    RESULTS,
    SizedEnv,
    append_rows,
    mean_and_spread,
    minimise,
    nearest_neighbour_entropy,
    print_provenance,
    print_table,
    provenance,
    read_rows,
    use_one_thread,
)
from fidelity_estimators import ESTIMATORS, DrawsThemselves
from fidelity_targets import TARGETS, Target, make_target
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution, TanhBijector
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs import DQS
from sb3_dqs.critics import Energy, MlpCritic
from sb3_dqs.denoiser_targets import LogDensity
from sb3_dqs.diagnostics.metrics import sliced_wasserstein

# Half as wide as the default, to save time; the learning rate falls to zero
NET_ARCH, BATCH_SIZE, LEARNING_RATE = [128, 128], 256, 2e-3
# The temperature falls from here to 1 in the first part of the training
INITIAL_ENT_COEF, ANNEALED = 20.0, 0.5
# The Gaussian has two parameters per dimension and needs larger steps than a network
GAUSSIAN_LEARNING_RATE = 2e-2
# The distance of finite sets is itself noisy: medians of a few
N_ACTIONS, N_REPEATS = 5000, 5
# At the end of the name of a target: so many random observations are compared, of so many numbers
MANY, N_STATES, N_FEATURES = ", many states", 50, 17
EXACT, GAUSSIAN = "exact samples", "tanh Gaussian"
NAMES = (*ESTIMATORS, GAUSSIAN, EXACT)
NAMES_OF_TARGETS = [*TARGETS, *(name + MANY for name in TARGETS)]
# Minutes per target: run on these targets only, unless asked for by name
SLOW, SLOW_TARGETS = "energy gradient, K=1000", ("two modes 1-D", "four modes 2-D")
KEYS = ("target", "estimator", "steps", "seed")
# Columns of the CSV file: title in the table, and digits
COLUMNS = {
    "distance": ("distance", 1),
    "shares": ("share error", 3),
    "entropy_error": ("entropy error", 2),
    "own_entropy_error": ("of its own estimate", 2),
    "ess": ("ESS", 1),
    "forward": ("values", 0),
    "backward": ("gradients", 0),
    "microseconds": ("CPU µs", 0),
}

Policy = Callable[[], th.Tensor]  # draws N_ACTIONS actions, the same number at each state, one state after another


class TargetCritic(MlpCritic):
    """
    A critic whose energy is a known log-density at every observation; its networks are not used.

    :param log_density: from actions (..., d) to (...), differentiable
    """

    def __init__(self, *args: Any, log_density: LogDensity, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.log_density, self.n_values, self.n_gradients = log_density, 0, 0

    def energy(self, obs: PyTorchObs) -> Energy:
        return self.count

    def count(self, actions: th.Tensor) -> th.Tensor:
        """The log-density; counts its values and gradients."""
        values = self.log_density(actions)
        self.n_values += values.numel()
        if values.requires_grad:
            values.register_hook(self.count_gradients)
        return values

    def count_gradients(self, gradient: th.Tensor) -> None:
        self.n_gradients += gradient.numel()


def train_actor(target: Target, estimator: str, steps: int, seed: int, n_states: int) -> tuple[Policy, dict[str, float]]:
    """
    DQS for one state, or for random states that are alike, whose critic is known.

    :param n_states: number of states that the policy is compared at; 1 for one observation of zeros
    :return: the policy; its own estimate of its entropy, the mean effective sample size in the last quarter, and the values
        and gradients of Q per regression target
    """
    critic_kwargs = {"log_density": target.log_density}
    env = SizedEnv(N_FEATURES if n_states > 1 else 1, target.dim)
    model = DQS(
        "MlpPolicy", env, learning_rate=LEARNING_RATE, buffer_size=1, seed=seed, device="cpu",
        policy_kwargs={"net_arch": NET_ARCH, "critic_class": TargetCritic, "critic_kwargs": critic_kwargs},
        denoiser_target=ESTIMATORS.get(estimator, DrawsThemselves()),
    )  # fmt: skip
    if estimator == EXACT:

        def draw_exactly(embedding: th.Tensor, latents: th.Tensor) -> th.Tensor:
            return TanhBijector.inverse(target.sample(latents[..., 0].numel())).reshape(latents.shape)

        model.actor.training_sample = draw_exactly  # type: ignore[method-assign]
    dones = th.zeros(BATCH_SIZE, 1)
    ess, n_targets = [], []

    def draw_obs(n_obs: int) -> th.Tensor:
        return th.randn(n_obs, N_FEATURES) if n_states > 1 else th.zeros(n_obs, 1)

    def compute_loss(step: int) -> th.Tensor:
        # As ent_coef="auto" does, from the uniform policy down
        ent_coef = max(INITIAL_ENT_COEF ** (1 - step / (ANNEALED * steps)), 1.0)
        obs = draw_obs(BATCH_SIZE)
        if model.draws_own_actions(step, dones):
            loss, metrics = model.actor_loss(obs, ent_coef)
            n_targets.append(round(model.own_share * BATCH_SIZE) * model.n_draws)
        else:
            with th.no_grad():
                next_u, _ = model.actor.draw(model.actor.embed(obs))
            loss, metrics = model.next_actor_loss(obs, next_u, ent_coef)
            n_targets.append(round(model.next_share * BATCH_SIZE) * model.n_copies)
        ess.append(float(metrics.get("ess", np.nan)))
        return loss

    minimise(model.actor.optimizer, steps, compute_loss)
    critic: Any = model.critic
    states = draw_obs(n_states)
    repeated = states.repeat_interleave(N_ACTIONS // n_states, dim=0).numpy()
    return lambda: th.as_tensor(model.predict(repeated)[0]), {
        "entropy": model.policy.entropy(states, n_actions=2048 // n_states).mean().item(),
        "ess": float(np.nanmean(ess[-steps // 4 :])),
        "forward": critic.n_values / sum(n_targets),
        "backward": critic.n_gradients / sum(n_targets),
    }


def train_gaussian(target: Target, steps: int, seed: int) -> tuple[Policy, dict[str, float]]:
    """SAC's policy, and its objective: tanh of a diagonal Gaussian that maximises ``E[Q] / ent_coef`` plus entropy."""
    th.manual_seed(seed)
    parameters = [th.zeros(target.dim, requires_grad=True) for _ in range(2)]  # mean and logarithm of the standard deviation
    distribution = SquashedDiagGaussianDistribution(target.dim)

    def draw(n: int) -> tuple[th.Tensor, th.Tensor]:
        return distribution.log_prob_from_params(*(parameter.expand(n, -1) for parameter in parameters))

    def loss(step: int) -> th.Tensor:
        actions, log_prob = draw(BATCH_SIZE)
        return (log_prob - target.log_density(actions)).mean()

    minimise(th.optim.Adam(parameters, lr=GAUSSIAN_LEARNING_RATE), steps, loss)
    entropy = -draw(N_ACTIONS)[1].mean().item()
    return lambda: draw(N_ACTIONS)[0].detach(), {"entropy": entropy, "ess": np.nan, "forward": 1.0, "backward": 1.0}


@lru_cache
def floors(name: str) -> tuple[float, float]:
    """Distance between two sets of exact samples (median), and their nearest-neighbour entropy."""
    target = make_target(name)
    with th.random.fork_rng():
        th.manual_seed(0)
        pairs = [target.sample(2 * N_ACTIONS).chunk(2) for _ in range(15)]
        distance = float(np.median([sliced_wasserstein(first, second).item() for first, second in pairs]))
        return distance, float(np.mean([nearest_neighbour_entropy(first) for first, _ in pairs[:3]]))


def distance_over_floor(name: str, sets: list[th.Tensor]) -> float:
    """Sliced Wasserstein distance of sets of actions to exact samples over that between exact sets; medians."""
    target = make_target(name)
    distances = [sliced_wasserstein(actions, target.sample(N_ACTIONS)).item() for actions in sets]
    return float(np.median(distances)) / floors(name)[0]


def share_error(target: Target, actions: th.Tensor) -> float:
    """
    Total variation between the mode shares (by the nearest centre) of the actions and the exact ones; NaN without modes.

    :param actions: shape (n_states, n_actions, d); the mean over states is returned
    """
    if target.modes is None:
        return float("nan")
    modes = target.modes

    def shares(points: th.Tensor) -> th.Tensor:
        return th.cdist(points, modes).argmin(dim=1).bincount(minlength=len(modes)) / len(points)

    exact = shares(target.sample(4 * N_ACTIONS))
    return 0.5 * th.stack([(shares(points) - exact).abs().sum() for points in actions]).mean().item()


def run(name: str, estimator: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one policy and measure it: a row of the CSV file."""
    use_one_thread()
    distribution, n_states = name.removesuffix(MANY), N_STATES if name.endswith(MANY) else 1
    target = make_target(distribution)
    _, exact_entropy = floors(distribution)
    start = time.process_time()
    if estimator == GAUSSIAN:
        policy, metrics = train_gaussian(target, steps, seed)
    else:
        policy, metrics = train_actor(target, estimator, steps, seed, n_states)
    seconds = time.process_time() - start
    sets = [policy() for _ in range(N_REPEATS)]
    values = {
        "distance": distance_over_floor(distribution, sets),
        # Every set has the states in the same order
        "shares": share_error(target, th.cat([s.reshape(n_states, -1, target.dim) for s in sets], 1)),
        "entropy_error": (nearest_neighbour_entropy(sets[0]) - exact_entropy) / target.dim,
        "own_entropy_error": (metrics.pop("entropy") - target.entropy) / target.dim,
        **metrics,
        "microseconds": 1e6 * seconds / (steps * BATCH_SIZE),
    }
    return dict(zip(KEYS, (name, estimator, steps, seed), strict=True)) | {key: f"{v:.4g}" for key, v in values.items()}


def report(rows: list[dict[str, str]]) -> None:
    """One table of the distances, and one of everything."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (NAMES_OF_TARGETS.index(row["target"]), NAMES.index(row["estimator"]))):
        groups[row["target"], row["estimator"], row["commit"]].append(row)
    targets = list(dict.fromkeys(target for target, *_ in groups))
    lines = sorted(dict.fromkeys(key[1:] for key in groups), key=lambda line: NAMES.index(line[0]))

    def cell(group: list[dict[str, str]], column: str) -> str:
        return mean_and_spread([float(row[column]) for row in group], COLUMNS[column][1])

    print("\nSliced Wasserstein distance to exact samples, over that between exact sets:\n")
    cells = [[cell(groups.get((target, *line), []), "distance") for target in targets] for line in lines]
    print_table(["estimator", "commit", *targets], [[*line, *shown] for line, shown in zip(lines, cells, strict=True)])
    print("Per regression target: values and gradients of Q, CPU time. Entropy errors in nats per dimension:\n")
    print_table(
        ["target", "estimator", "commit", "seeds", *(title for title, _ in COLUMNS.values())],
        [[*key, len(group), *(cell(group, column) for column in COLUMNS)] for key, group in groups.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=NAMES_OF_TARGETS, metavar="TARGET")
    parser.add_argument("--estimators", nargs="+", default=list(NAMES), choices=NAMES, metavar="ESTIMATOR")
    parser.add_argument("--steps", type=int, default=1500, help="gradient steps, each on 256 regression targets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity.csv")
    parser.add_argument("--report-only", action="store_true", help="print what the file has, of all commits")
    args = parser.parse_args()
    print_provenance()

    is_all = set(args.estimators) == set(NAMES)
    jobs = [
        (target, estimator, args.steps, seed)
        for target in args.targets
        for estimator in args.estimators
        for seed in args.seeds
        if estimator != SLOW or target in SLOW_TARGETS or not is_all
    ]
    commit = provenance()["commit"]

    def find_rows() -> dict[tuple[str, ...], dict[str, str]]:
        """Rows of the file that were asked for, by commit and job; of equal ones the last."""
        rows = {(row["commit"], *(row[key] for key in KEYS)): row for row in read_rows(args.out)}
        asked = {tuple(map(str, job)) for job in jobs}
        return {key: row for key, row in rows.items() if key[1:] in asked and (args.report_only or key[0] == commit)}

    if not args.report_only:
        # With changes that are not committed all are run again
        done = set() if commit.endswith("+") else set(find_rows())
        missing = [job for job in jobs if (commit, *map(str, job)) not in done]
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run, *job): job for job in missing}
            for i, future in enumerate(as_completed(futures), start=1):
                append_rows(args.out, [future.result()])
                print(f"done {i}/{len(missing)}: {futures[future]}", flush=True)
    report(list(find_rows().values()))


if __name__ == "__main__":
    main()
