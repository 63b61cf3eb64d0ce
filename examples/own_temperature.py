"""A temperature from outside the package: tuned with a learning rate of its own."""

import math

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dqs import DQS
from sb3_dqs.temperature import Temperature


class OwnRateTemperature(Temperature):
    """
    Tuned to a target entropy by gradient steps on its logarithm, at a rate that does not depend on that of the networks.

    :param initial: initial value, positive
    :param target_entropy: in nats
    :param learning_rate: step of the logarithm per nat of error, and its limit
    """

    log_ent_coef: th.Tensor

    def __init__(self, initial: float, target_entropy: float, learning_rate: float = 1e-3):
        super().__init__()
        self.target_entropy, self.learning_rate = target_entropy, learning_rate
        self.register_buffer("log_ent_coef", th.tensor(math.log(initial)))

    def forward(self, progress_remaining: float) -> th.Tensor:
        return self.log_ent_coef.exp()

    @th.no_grad()
    def update(self, entropy: th.Tensor, learning_rate: float) -> th.Tensor:
        gradient = (entropy - self.target_entropy).clamp(-1, 1)
        loss = self.log_ent_coef * gradient
        self.log_ent_coef -= self.learning_rate * gradient
        return loss


def main(total_timesteps: int = 5_000) -> None:
    th.set_num_threads(1)  # networks this small are no faster with more
    temperature = OwnRateTemperature(initial=1.0, target_entropy=-1.0)
    model = DQS("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, ent_coef=temperature, seed=0)
    model.learn(total_timesteps)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"Pendulum-v1, temperature {float(model.ent_coef_tensor):.3f}, {total_timesteps} steps: {mean:.0f} +/- {std:.0f}")


if __name__ == "__main__":
    main()
