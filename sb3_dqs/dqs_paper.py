"""
The paper's setting for RL Zoo: ``python -m rl_zoo3.train --algo dqs --conf-file sb3_dqs.dqs_paper --env ...``.

Every entry of ``dqs.yml``, with SAC's critic and learning rate, and with the arguments that make DQS the published algorithm (https://arxiv.org/abs/2410.01312).
"""

import yaml

from sb3_dqs.rl_zoo import get_hyperparams_path

PAPER = {
    "denoiser_target": "energy_gradient",
    "n_mc_samples": 1000,
    "policy_delay": 1,
    "backup": "hard",
    "ent_coef": "log_linear_1.0_0.01",
    "use_sde": False,
}


# The name that RL Zoo looks for. Zoo evaluates policy_kwargs; the paper's critic is that of SAC
hyperparams = {
    env_id: {
        "learning_rate": 3e-4,
        **entry,
        **PAPER,
        "policy_kwargs": f"{{'critic_class': 'mlp', **{entry.get('policy_kwargs', 'dict()')}}}",
    }
    for env_id, entry in yaml.safe_load(get_hyperparams_path().read_text(encoding="utf-8")).items()
}
