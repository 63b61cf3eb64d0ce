"""An augmentation from outside the package: random shifts of images (DrQ-v2, https://arxiv.org/abs/2107.09645)."""

import torch as th
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from sb3_dqs import DQS


class RandomShift(nn.Module):
    """
    Shifts every image by up to ``pad`` pixels in both directions, and repeats the pixels of the edge.

    :param pad: largest shift, in pixels
    """

    def __init__(self, pad: int = 4):
        super().__init__()
        self.pad = pad

    def forward(self, images: th.Tensor) -> th.Tensor:
        n, _, height, width = images.shape
        shifts = th.randint(-self.pad, self.pad + 1, (2, n, 1), device=images.device)
        rows = (th.arange(height, device=images.device) + shifts[0]).clamp(0, height - 1)
        columns = (th.arange(width, device=images.device) + shifts[1]).clamp(0, width - 1)
        batch = th.arange(n, device=images.device)
        return images.movedim(1, -1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def main(total_timesteps: int = 300) -> None:
    th.set_num_threads(1)
    env = FakeImageEnv(screen_height=36, screen_width=36, discrete=False)  # random images and no reward: put yours here
    model = DQS("CnnPolicy", env, buffer_size=1_000, batch_size=32, augmentation=RandomShift(), seed=0)
    model.learn(total_timesteps)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    print(f"Images with random shifts, {total_timesteps} steps: return {mean:.0f}")


if __name__ == "__main__":
    main()
