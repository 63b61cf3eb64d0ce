"""One short check that the whole learns; returns are measured in benchmarks/."""

import sys
from pathlib import Path

import numpy as np

from sb3_dqs import DQS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bandit_env import BanditEnv, boltzmann_grid, mode_of, reward


def test_bandit_modes_and_entropy():
    """After a short training all four modes are alive and their shares are near."""
    ent_coef = 0.3
    model = DQS(
        "MlpPolicy", BanditEnv(), ent_coef=ent_coef, learning_rate=2e-3, learning_starts=300, seed=0,
        batch_size=128, policy_kwargs={"net_arch": [64, 64], "best_of_n_by_q": 16}, device="cpu",
    )  # fmt: skip
    model.learn(3000)
    actions, _ = model.predict(np.zeros((5000, 1), np.float32))
    grid, probabilities = boltzmann_grid(ent_coef)
    exact = np.bincount(mode_of(grid).ravel(), probabilities.ravel())
    shares = np.bincount(mode_of(actions), minlength=4) / len(actions)
    # The bar of the benchmark, after ten times as many updates, is 0.05
    assert np.abs(shares - exact).max() < 0.1
    # More than half of the way from the uniform policy to the exact one
    exact_reward, uniform_reward = (probabilities * reward(grid)).sum(), reward(grid).mean()
    assert reward(actions).mean() > (exact_reward + uniform_reward) / 2
    # The critic knows where the modes are. (The actor alone need not leave the middle, where at this temperature 40 % lie)
    assert reward(model.predict(np.zeros(1, np.float32), deterministic=True)[0]) > 0.8
