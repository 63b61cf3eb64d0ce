"""The critic: its methods are called once, when the policy is built."""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn

from sb3_dqs.batch_norm_critic import BatchNormCritic
from sb3_dqs.critics import Critic
from sb3_dqs.observations import zero_observations
from sb3_dqs.training_mode import evaluation_mode


def check_critic(critic: Critic, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    Call the methods of a critic for two observations of zeros.

    :param critic: the critic
    :param observation_space: Observation space
    :param action_space: Action space
    :raises ValueError: if one of them fails or gives a wrong shape, and if the gradient of the values with respect to the
        actions, or of the loss with respect to the critic's parameters, is missing; see also :func:`check_networks`
    """
    n_states, n_actions, action_dim = 2, 3, get_action_dim(action_space)
    obs = zero_observations(observation_space, n_states, critic.device)
    actions = th.zeros(n_states, n_actions, action_dim, device=critic.device)
    start = f"policy_kwargs: `critic_class`={type(critic).__name__}"
    if isinstance(critic, BatchNormCritic):
        check_networks(critic, start)

    def call(method: str, function: Callable[[], th.Tensor], *expected: int | None) -> th.Tensor:
        try:
            result = function()
        except Exception as error:
            raise ValueError(
                f"{start}: {method} fails on {n_states} observations of zeros ({type(error).__name__}: {error}); "
                "see sb3_dqs.critics.Critic for what it must return."
            ) from error
        shape = tuple(getattr(result, "shape", ("none",)))
        if len(shape) != len(expected) or any(want not in (None, size) for size, want in zip(shape, expected, strict=True)):
            wanted = ", ".join("m" if size is None else str(size) for size in expected)
            raise ValueError(f"{start}: {method} must give shape ({wanted}), got {shape}.")
        return result

    before = copy.deepcopy(critic.state_dict())
    with evaluation_mode(critic), th.enable_grad():
        with th.no_grad():
            targets = call("backup_values", lambda: critic.backup_values(obs, actions[:, 0]), n_states, None)
        first, zeros = actions[:, 0], th.zeros(n_states, 1, device=critic.device)
        call("loss", lambda: critic.loss(obs, first, th.zeros_like(targets)))
        loss = call("td_loss", lambda: critic.td_loss(critic, obs, first, obs, first, zeros, zeros))
        # After td_loss(), which may change buffers that the energy's gradient needs
        values = call("energy", lambda: critic.energy(obs)(actions.requires_grad_()), n_states, n_actions)
    if not has_gradient(values, [actions]):
        raise ValueError(f"{start}: the values of energy must have a gradient with respect to the actions, got none.")
    registered = set(critic.parameters())
    n_unregistered = sum(leaf not in registered for leaf in leaves(loss))
    if n_unregistered > 0:
        raise ValueError(
            f"{start}: loss depends on {n_unregistered} weights that are not registered as its parameters and would not "
            "be trained; keep networks in a torch.nn.ModuleList, register each that is in `q_networks` by add_module(), "
            "and call requires_grad_(False) on one that stays constant."
        )
    networks = [param for name, param in critic.named_parameters() if not name.startswith("features_extractor.")]
    if not has_gradient(loss, networks):
        raise ValueError(f"{start}: the gradient of loss reaches none of its registered networks; compute loss by them.")
    critic.load_state_dict(before)  # loss() may have changed buffers


def check_networks(critic: BatchNormCritic, start: str) -> None:
    """
    What a subclass of :class:`BatchNormCritic` inherits must fit what it changes.

    :param critic: the critic, new
    :param start: of the message
    :raises ValueError: if it overrides what the inherited ``td_loss()`` does not call, if the inherited ``td_loss()`` cannot
        pass its networks, and if their averages are not a copy of them
    """
    cls, parent = type(critic), BatchNormCritic
    if cls.td_loss is parent.td_loss:
        for method, instead in (("backup_values", "combine"), ("loss", "errors")):
            if getattr(cls, method) is not getattr(parent, method):
                raise ValueError(f"{start}: td_loss() of BatchNormCritic does not call {method}(); override {instead}().")
        if not all(isinstance(network, nn.Sequential) and len(network) > 0 for network in critic.q_networks):
            raise ValueError(f"{start}: each of `q_networks` must be a torch.nn.Sequential; or override td_loss().")
    networks, averages = critic.q_networks, critic.averaged_networks
    state, averaged = networks.state_dict(), averages.state_dict()
    is_copy = repr(networks) == repr(averages) and list(state) == list(averaged)
    if not (is_copy and all(th.equal(value, averaged[name]) for name, value in state.items())):
        raise ValueError(
            f"{start}: `averaged_networks` must be a copy of `q_networks`; where they are changed, end with "
            "self.averaged_networks = copy.deepcopy(self.q_networks).requires_grad_(False)."
        )


@th.enable_grad()
def has_gradient(value: th.Tensor, inputs: Iterable[th.Tensor]) -> bool:
    """
    Whether the gradient of a value reaches any of the inputs.

    :param value: of any shape
    :param inputs: tensors; those that require no gradient do not count
    :return: False also without inputs
    """
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    if not inputs or not value.requires_grad:
        return False
    return any(gradient is not None for gradient in th.autograd.grad(value.sum(), inputs, allow_unused=True))


def leaves(value: th.Tensor) -> Iterator[th.Tensor]:
    """
    The tensors without history that a value depends on.

    :param value: a tensor
    """
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]
        nodes += [parent for parent, _ in node.next_functions]
