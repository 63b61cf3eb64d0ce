"""
Entries of RL Zoo for DQS, beside those for SAC: trained by RL Zoo's own command, and evaluated.

    python benchmarks/zoo.py --env Pendulum-v1 Reacher-v5 --algos dqs sac --seeds 0 1 2 --steps 20000

Each run is ``python -m rl_zoo3.train`` with the entry of the algorithm, and a row of ``benchmarks/results/zoo.csv``: mean and
standard deviation of the return over deterministic episodes of the last model, as in RL Zoo's ``benchmark.md``. A run that is
there is not run again. Trained agents stay in ``--folder``, in RL Zoo's layout. Without ``--steps`` the entry's number of
steps is run, again if a shorter run is there. ``--hyperparams`` overrides the entry, ``--tag`` names that in the table.

LunarLanderContinuous-v3 and BipedalWalker-v3 need ``pip install box2d``.
"""

import argparse
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import RESULTS, append_rows, bootstrap_interval, iqm, print_provenance, print_table, read_rows, use_one_thread
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, create_test_env, get_latest_run_id, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_dqs  # noqa: F401  registers the environments, and dqs in RL Zoo


def train(algo: str, env_id: str, seed: int, args: argparse.Namespace) -> Path:
    """Train by RL Zoo's command, and give the folder of the run."""
    folder = args.folder / (args.tag or "entry") / f"seed_{seed}"
    command = [sys.executable, "-W", "ignore", "-m", "rl_zoo3.train", "--algo", algo, "--env", env_id, "--seed", str(seed)]
    command += ["-f", str(folder), "--eval-freq", "-1", "--log-interval", "1000000", "--num-threads", "1", "--verbose", "0"]
    command += ["-n", str(args.steps)] if args.steps else []
    command += ["--gym-packages", *args.gym_packages] if args.gym_packages else []
    command += ["--hyperparams", *args.hyperparams] if args.hyperparams and algo == "dqs" else []
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder / algo / f"{env_id}_{get_latest_run_id(str(folder / algo), env_id)}"


def steps_of_entry(algo: str, env_id: str) -> float:
    """Number of steps of the entry that RL Zoo takes."""
    config = ExperimentManager(argparse.Namespace(), algo, env_id, "", n_timesteps=-1).config
    entries = yaml.safe_load(Path(config).read_text())
    return float(entries.get(env_id, entries["default"])["n_timesteps"])


def evaluate(algo: str, env_id: str, run: Path, n_episodes: int) -> tuple[list[float], int]:
    """Returns of deterministic episodes of the last model, and the steps of its training."""
    hyperparams, stats_path = get_saved_hyperparams(str(run / env_id), norm_reward=False, test_mode=True)
    env = create_test_env(env_id, stats_path=stats_path, seed=10_000, should_render=False, hyperparams=dict(hyperparams))
    is_her = "replay_buffer_class" in hyperparams
    model = ALGOS[algo].load(run / f"{env_id}.zip", env=env if is_her else None, device="cpu", buffer_size=1)
    returns, _ = evaluate_policy(model, env, n_episodes, return_episode_rewards=True)
    return [float(value) for value in returns], int(model.num_timesteps)


def measure(algo: str, env_id: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Row of one training."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = train(algo, env_id, seed, args)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    returns, n_timesteps = evaluate(algo, env_id, run, args.episodes)
    return {
        "algo": algo,
        "tag": args.tag if algo == "dqs" else "",
        "env_id": env_id,
        "seed": seed,
        "n_timesteps": n_timesteps,
        "mean_reward": round(float(np.mean(returns)), 3),
        "std_reward": round(float(np.std(returns)), 3),
        "eval_episodes": len(returns),
        # Of all runs that ended meanwhile: exact with --processes 1
        "cpu_seconds": round(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime, 1),
        "hyperparams": " ".join(args.hyperparams) if algo == "dqs" else "",
    }


def report(rows: list[dict[str, str]]) -> None:
    """A row per algorithm, environment and number of steps: mean returns per seed, and their interquartile mean."""
    table = []
    for key in dict.fromkeys((row["env_id"], row["n_timesteps"], row["algo"], row["tag"]) for row in rows):
        chosen = [row for row in rows if (row["env_id"], row["n_timesteps"], row["algo"], row["tag"]) == key]
        means = np.array([float(row["mean_reward"]) for row in chosen])
        low, high = bootstrap_interval(means)
        per_seed = ", ".join(f"{float(row['mean_reward']):.1f} ± {float(row['std_reward']):.1f}" for row in chosen)
        table.append([*key, per_seed, f"{iqm(means):.1f} ({low:.1f} to {high:.1f})", chosen[0]["eval_episodes"]])
    header = ["env_id", "n_timesteps", "algo", "", "mean_reward ± std_reward, per seed", "IQM (95 %)", "eval_episodes"]
    print_table(header, sorted(table, key=lambda row: (row[0], int(row[1]), row[2], row[3])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["Pendulum-v1"])
    parser.add_argument("--algos", nargs="+", default=["dqs", "sac"], choices=sorted(ALGOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the entry's")
    parser.add_argument("--hyperparams", nargs="+", default=[], help="of DQS, instead of the entry's, as for rl_zoo3.train")
    parser.add_argument("--tag", default="", help="name of these hyperparameters in the table")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="to import, for their environments")
    parser.add_argument("--episodes", type=int, default=50, help="deterministic episodes of the evaluation")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("logs/zoo"))
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.csv")
    parser.add_argument("--report-only", action="store_true", help="print what the file has")
    args = parser.parse_args()
    use_one_thread()
    print_provenance()
    for package in args.gym_packages:
        __import__(package)
    done = read_rows(args.out)

    def is_done(algo: str, env_id: str, seed: int) -> bool:
        key = (algo, args.tag if algo == "dqs" else "", env_id, str(seed))
        steps = [int(row["n_timesteps"]) for row in done if (row["algo"], row["tag"], row["env_id"], row["seed"]) == key]
        return max(steps, default=0) >= (args.steps or steps_of_entry(algo, env_id))

    jobs = [(algo, env_id, seed) for env_id in args.env for seed in args.seeds for algo in args.algos]
    if not args.report_only:
        with ThreadPoolExecutor(args.processes) as pool:
            for future in as_completed([pool.submit(measure, *job, args) for job in jobs if not is_done(*job)]):
                append_rows(args.out, [future.result()])
                print(f"done: {future.result()}", flush=True)
    report(read_rows(args.out))


if __name__ == "__main__":
    main()
