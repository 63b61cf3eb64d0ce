"""Critics."""

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from torch import nn
from torch.nn import functional as F

from sb3_dqs.fast import as_functions

# Rows that a critic values at once on a CPU (on this much memory traffic is small beside the products)
CPU_CHUNK_ROWS = 512


class Critic(ContinuousCritic):
    """SB3's critics, whose first can value many actions per state at the price of one pass of the features extractor."""

    def q1_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        The values that define the policy: those of the first critic network alone, as for the actor of TD3 (Fujimoto et
        al. 2018, https://arxiv.org/abs/1802.09477, Algorithm 1), for many actions per state. The first layer is computed
        as a sum, the features' part once per state, the action's part once per action.

        :param features: what ``extract_features()`` returned, shape (batch_size, features_dim)
        :param actions: actions in [-1, 1], shape (batch_size, n_actions, action_dim)
        :return: shape (batch_size, n_actions)
        """
        q_net = self.q_networks[0]
        assert isinstance(q_net, nn.Sequential)
        first, *others = q_net
        assert isinstance(first, nn.Linear)
        layers = as_functions(others)
        features_weight, actions_weight = first.weight.split([features.shape[1], actions.shape[2]], dim=1)
        features_part = F.linear(features, features_weight, first.bias).unsqueeze(1)
        # On a CPU, small pieces stay in its cache; an exported graph is for batches of any size
        is_chunked = features.device.type == "cpu" and not th.compiler.is_compiling()
        chunk_size = max(1, CPU_CHUNK_ROWS // len(features)) if is_chunked else actions.shape[1]
        values = []
        for chunk in actions.split(chunk_size, dim=1):
            hidden = F.linear(chunk, actions_weight).add_(features_part)
            for layer in layers:
                hidden = layer(hidden)
            values.append(hidden)
        return th.cat(values, dim=1).squeeze(2)
