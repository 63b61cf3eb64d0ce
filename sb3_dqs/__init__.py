"""Diffusion Q-Sampling (DQS) for Stable-Baselines3."""

import contextlib
from importlib import resources

import sb3_dqs.envs  # noqa: F401  # registers the environments
from sb3_dqs.diagnostics import Diagnosis, DiagnosticCallback, diagnose, plot_policy
from sb3_dqs.dqs import DQS
from sb3_dqs.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__version__ = "unknown"  # where an application is packed without data files
with contextlib.suppress(OSError):
    __version__ = resources.files(__name__).joinpath("version.txt").read_text(encoding="utf-8").strip()

__all__ = [
    "DQS",
    "CnnPolicy",
    "Diagnosis",
    "DiagnosticCallback",
    "MlpPolicy",
    "MultiInputPolicy",
    "__version__",
    "diagnose",
    "plot_policy",
]

# For installations whose start-up files do not run (``pip install --target``); absent in a bare source tree
with contextlib.suppress(ModuleNotFoundError):
    import sb3_dqs_rl_zoo3

    sb3_dqs_rl_zoo3.install()
