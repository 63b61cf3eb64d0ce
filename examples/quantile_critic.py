"""A critic from outside the package: the truncated quantile critics of TQC (https://arxiv.org/abs/2005.04269)."""

from typing import Any

import torch as th
from sb3_contrib.common.utils import quantile_huber_loss
from sb3_contrib.tqc import policies as tqc
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs import DQS
from sb3_dqs.critics import Critic, Energy


class QuantileCritic(tqc.Critic, Critic):
    """
    Networks that give quantiles of the return. The target is made of all but the largest of them; the mean over all of them
    defines the policy.

    :param n_dropped: number of quantiles per network that the target leaves out
    """

    def __init__(self, *args: Any, n_dropped: int = 2, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.n_kept = self.quantiles_total - n_dropped * self.n_critics

    def backup_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        return self(obs, actions).flatten(start_dim=1).sort(dim=1).values[:, : self.n_kept]

    def loss(self, obs: PyTorchObs, actions: th.Tensor, targets: th.Tensor) -> th.Tensor:
        return quantile_huber_loss(self(obs, actions), targets.unsqueeze(1), sum_over_quantiles=False)

    def energy(self, obs: PyTorchObs) -> Energy:
        features = self.extract_features(obs, self.features_extractor).unsqueeze(1)

        def values(actions: th.Tensor) -> th.Tensor:
            inputs = th.cat([features.expand(-1, actions.shape[1], -1), actions], dim=2)
            return th.stack([q_net(inputs) for q_net in self.q_networks]).mean(dim=(0, 3))

        return values


def main(total_timesteps: int = 5_000) -> None:
    th.set_num_threads(1)  # networks this small are no faster with more
    policy_kwargs = dict(critic_class=QuantileCritic, critic_kwargs=dict(n_quantiles=25, n_dropped=2))
    model = DQS("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, policy_kwargs=policy_kwargs, seed=0)
    model.learn(total_timesteps)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"Pendulum-v1 with quantile critics, {total_timesteps} steps: return {mean:.0f} +/- {std:.0f}")


if __name__ == "__main__":
    main()
