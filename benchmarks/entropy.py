"""
Is the entropy that the policy reports that of its actions?

    python benchmarks/entropy.py Hopper-v5 logs/checkpoints/Hopper-v5/DQS_100000_0.zip

Runs the saved model (of ``returns.py``), and at 20 of its states compares ``policy.entropy`` with the nearest-neighbour
estimate from 2,000 actions (Kozachenko and Leonenko 1987; here the third neighbour), in nats. Neighbours are those before
the tanh, whose mean log-determinant is added: near the bounds of the box the density of the actions changes over many scales,
and their nearest neighbours give too large an entropy. Adds a row to ``benchmarks/results/entropy.csv``. Takes seconds.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch as th
from common import RESULTS, append_rows, nearest_neighbour_entropy, print_provenance, use_one_thread

from sb3_dqs import DQS
from sb3_dqs.density import log_det_tanh

N_ACTIONS, N_STATES = 2000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("model")
    args = parser.parse_args()
    use_one_thread()
    th.manual_seed(0)
    print_provenance()

    model, env = DQS.load(args.model, device="cpu", buffer_size=1), gym.make(args.env)
    states, (obs, _) = [], env.reset(seed=0)
    for step in range(20 * N_STATES):
        if step % 20 == 0:
            states.append(obs)
        action, _ = model.predict(obs)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    batch = th.as_tensor(np.array(states), dtype=th.float32)
    neighbours = []
    with th.no_grad():
        for state in batch:
            embedding = model.actor.embed(state.expand(N_ACTIONS, -1))
            u = model.actor.sample(embedding, th.randn(N_ACTIONS, model.actor.action_dim))
            neighbours.append(nearest_neighbour_entropy(u) + log_det_tanh(u).mean().item())
    row = {"env": args.env, "model": args.model, "policy_entropy": f"{model.policy.entropy(batch).mean():.2f}"}
    row |= {"nearest_neighbours": f"{np.mean(neighbours):.2f}"}
    append_rows(RESULTS / "entropy.csv", [row])
    print("{env}: policy.entropy {policy_entropy}, nearest neighbours {nearest_neighbours}".format(**row))


if __name__ == "__main__":
    main()
