"""
Cost of a gradient step and of an action, relative to SB3's SAC in the same run.

    python benchmarks/speed.py

HalfCheetah-v5 sizes, batch 256, 256x256 networks, one torch thread. The algorithms take turns, so that whatever else the
machine does meets all of them; process CPU time, median of the repeats, and their quartiles as the spread.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from tqdm import trange

from sb3_dqs import DQS

PAPER: dict[str, Any] = {
    "score_target": "energy_gradient",
    "n_mc_samples": 1000,
    "backup": "hard",
    "ent_coef": "log_linear_1.0_0.01",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--paper-repeats", type=int, default=3, help="0 leaves the paper's setting out")
    args = parser.parse_args()
    th.set_num_threads(1)

    models = {
        "SAC": SAC("MlpPolicy", args.env, seed=0, device="cpu", buffer_size=1000),
        "DQS": DQS("MlpPolicy", args.env, seed=0, device="cpu", buffer_size=1000),
        "DQS, paper's setting": DQS("MlpPolicy", args.env, seed=0, device="cpu", buffer_size=1000, **PAPER),
    }
    for model in models.values():
        model.learn(100)  # fills the buffer, sets the logger up
    obs = gym.make(args.env).observation_space.sample().astype(np.float32)

    measures: dict[str, Callable[[Any], Any]] = {
        "train(1, 256)": lambda model: model.train(1, 256),
        "predict, stochastic": lambda model: model.predict(obs, deterministic=False),
        "predict, deterministic": lambda model: model.predict(obs, deterministic=True),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in trange(args.repeats):
        for name, model in models.items():
            if name != "SAC" and "paper" in name and repeat >= args.paper_repeats:
                continue
            for measure, run in measures.items():
                start = time.process_time()
                run(model)
                times.setdefault((name, measure), []).append(1e3 * (time.process_time() - start))

    print("| | " + " | ".join(f"{measure}: ms (quartiles) | x SAC" for measure in measures) + " |\n|---|" + "---|---|" * 3)
    for name in models:
        row = [name]
        for measure in measures:
            if (name, measure) not in times:
                continue
            low, median, high = np.percentile(times[name, measure], [25, 50, 75])
            row += [f"{median:.2f} ({low:.2f}-{high:.2f})", f"{median / np.median(times['SAC', measure]):.2f}"]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
