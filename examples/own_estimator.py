"""An estimator of the denoiser's target from outside the package: self-normalised importance sampling."""

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dqs import DQS
from sb3_dqs.denoiser_targets import BoltzmannDensity, DenoiserTarget, Draws, broad_proposal, effective_sample_size


class ImportanceSampling(DenoiserTarget):
    """
    ``E[u | x] = sum_k w_k u_k`` with ``w_k ~ pi(u_k) N(u_k; x, sigma^2) / q(u_k)``, candidates u_k drawn from
    ``q(u) ~ N(u; x, sigma^2) N(u; 0, prior_std^2)``: values of the critic only, no gradients.

    :param n_samples: number of candidates per target
    :param prior_std: standard deviation of the prior, broader than any policy
    """

    def __init__(self, n_samples: int = 32, prior_std: float = 2.0):
        super().__init__()
        self.n_samples, self.prior_std = n_samples, prior_std

    def forward(self, density: BoltzmannDensity, draws: Draws) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        center, width = broad_proposal(draws.x, draws.sigma, self.prior_std)
        shape = (*center.shape[:2], self.n_samples, center.shape[2])
        candidates = center.unsqueeze(2) + width.unsqueeze(2) * th.randn(shape, device=center.device)
        # N(u; x, sigma^2) is in the numerator and in q: pi(u) over the prior remains
        log_weights = density(candidates.flatten(1, 2)).reshape(shape[:3])
        log_weights = th.log_softmax(log_weights + (candidates / self.prior_std).pow(2).sum(dim=3) / 2, dim=2)
        targets = (log_weights.exp().unsqueeze(3) * candidates).sum(dim=2)
        return targets, {"ess": effective_sample_size(log_weights).mean()}


def main(total_timesteps: int = 5_000) -> None:
    th.set_num_threads(1)  # networks this small are no faster with more
    model = DQS("MlpPolicy", "Pendulum-v1", learning_rate=1e-3, denoiser_target=ImportanceSampling(32), seed=0)
    model.learn(total_timesteps)
    mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"Pendulum-v1 with importance sampling, {total_timesteps} steps: return {mean:.0f} +/- {std:.0f}")


if __name__ == "__main__":
    main()
