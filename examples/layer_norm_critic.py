"""A critic from outside the package: that of SAC with layer normalisation (https://arxiv.org/abs/2302.02948)."""

from typing import Any

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

from sb3_dqs import DQS
from sb3_dqs.critics import MlpCritic


class LayerNormCritic(MlpCritic):
    """The twin networks with a ``LayerNorm`` between every hidden linear layer and its activation."""

    def __init__(self, *, net_arch: list[int], features_dim: int, activation_fn: type[nn.Module], **kwargs: Any):
        super().__init__(net_arch=net_arch, features_dim=features_dim, activation_fn=activation_fn, **kwargs)
        input_dim = features_dim + get_action_dim(self.action_space)
        for i in range(self.n_critics):
            layers = create_mlp(input_dim, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm])
            self.q_networks[i] = nn.Sequential(*layers)
            self.add_module(f"qf{i}", self.q_networks[i])


def main(total_timesteps: int = 5_000) -> None:
    th.set_num_threads(1)  # networks this small are no faster with more
    policy_kwargs = dict(critic_class=LayerNormCritic)
    model = DQS("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, policy_kwargs=policy_kwargs, seed=0)
    model.learn(total_timesteps)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"Pendulum-v1 with layer normalisation, {total_timesteps} steps: return {mean:.0f} +/- {std:.0f}")


if __name__ == "__main__":
    main()
