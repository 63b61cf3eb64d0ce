"""Diffusion Q-Sampling (DQS) for Stable-Baselines3."""

from pathlib import Path

from sb3_dqs.dqs import DQS
from sb3_dqs.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__version__ = Path(__file__).with_name("version.txt").read_text(encoding="utf-8").strip()

__all__ = ["DQS", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "__version__"]
