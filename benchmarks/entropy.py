"""
Is the entropy that the policy reports that of its actions?

    python benchmarks/entropy.py Hopper-v5 benchmarks/results/returns/DQS_Hopper-v5_20000_0.zip

Runs the saved model (of ``returns.py``), and at 20 of its states compares ``policy.entropy`` with the nearest-neighbour
estimate from 2,000 actions (Kozachenko and Leonenko 1987; here the third neighbour), in nats. Neighbours are those before
the tanh, whose mean log-determinant is added: near the bounds of the box a density changes over many scales, and
neighbours there say too much. Takes seconds.
"""

import argparse

import gymnasium as gym
import numpy as np
import torch as th
from nearest_neighbours import nearest_neighbour_entropy

from sb3_dqs import DQS
from sb3_dqs.density import log_det_tanh

N_ACTIONS, N_STATES = 2000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("model")
    args = parser.parse_args()
    th.set_num_threads(1)
    th.manual_seed(0)

    model, env = DQS.load(args.model, device="cpu", buffer_size=1), gym.make(args.env)
    observations, (obs, _) = [], env.reset(seed=0)
    for step in range(20 * N_STATES):
        if step % 20 == 0:
            observations.append(obs)
        action, _ = model.predict(obs)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
    states = th.as_tensor(np.array(observations), dtype=th.float32)
    neighbours = 0.0
    with th.no_grad():
        for state in states:
            embedding = model.actor.embed(state.expand(N_ACTIONS, -1))
            unsquashed = model.actor.sample_unsquashed(embedding, th.randn(N_ACTIONS, model.actor.action_dim))
            log_det = log_det_tanh(unsquashed).mean().item()
            neighbours += (nearest_neighbour_entropy(unsquashed) + log_det) / N_STATES
    print(f"{args.env}: policy.entropy {model.policy.entropy(states).mean():.1f}, nearest neighbours {neighbours:.1f}")


if __name__ == "__main__":
    main()
