"""Pictures of a policy over the density that it should have."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs.checks.values import is_int
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.diagnostics.diagnose import GRID_CELLS, check_ints, policy_and_tempered_q, to_tensors
from sb3_dqs.diagnostics.importance_sampling import importance_sample
from sb3_dqs.diagnostics.metrics import box_grid
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import count
from sb3_dqs.training_mode import evaluation_mode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_BINS = 40  # per dimension, of the histogram of candidates


def plot_policy(
    model: DQS,
    observation: np.ndarray | dict[str, np.ndarray] | PyTorchObs,
    dims: tuple[int, int] = (0, 1),
    n_actions: int = 1000,
    *,
    n_cells: int | None = None,
    n_candidates: int = 32768,
) -> "Figure":
    """
    Draw the policy's actions over the density of ``exp(Q / ent_coef) / Z`` at one state; both axes are scaled actions in
    [-1, 1].

    With two action dimensions the density comes from a grid. With one it is a curve, with a histogram of the actions. With
    more, it is the marginal density of the two chosen dimensions (the others are integrated out, as they are in the
    cloud of actions), a histogram of the importance-weighted candidates of :func:`sb3_dqs.diagnose`: noisy, and with modes
    missing, where the effective sample size that the title then gives is small.

    :param model: a model of DQS
    :param observation: one observation as the model sees it (see :func:`sb3_dqs.diagnose`), or a batch of one
    :param dims: the action dimensions on the horizontal and vertical axes; not used with one action dimension
    :param n_actions: number of actions
    :param n_cells: cells of the grid per dimension, see :func:`sb3_dqs.diagnose`
    :param n_candidates: number of candidates of importance sampling
    :return: figure, independent of pyplot: ``figure.savefig(...)``
    :raises ValueError: if the model is none of DQS, if the observation is not finite, does not fit the observation space
        or is not one, if ``dims`` are not two different action dimensions, or if a number is not an integer or too small
    """
    check_ints(n_actions=(n_actions, 2), n_cells=(2 if n_cells is None else n_cells, 2), n_candidates=(n_candidates, 2))
    obs = to_tensors(model, "observation", observation)
    if count(obs) != 1:
        raise ValueError(f"`observation` must be one observation (observations[0] for instance), got {count(obs)}.")
    dim, ent_coef = model.actor.action_dim, float(model.ent_coef_tensor)
    check_dims(dims, dim)

    from matplotlib.colors import PowerNorm  # takes a while to import
    from matplotlib.figure import Figure

    with evaluation_mode(model.policy), th.no_grad():
        u, tempered_q = policy_and_tempered_q(model, obs, n_actions)
        if dim in GRID_CELLS:
            n_cells = n_cells or GRID_CELLS[dim]
            points = box_grid(dim, n_cells, dtype=u.dtype, device=u.device)
            density = th.softmax(tempered_q(points), dim=0).reshape([n_cells] * dim).cpu().numpy() * (n_cells / 2) ** dim
            title = f"ent_coef = {ent_coef:.3g}"
        else:
            points, log_weights, _ = importance_sample(tempered_q, u, n_candidates)
            first, second = points[:, list(dims)].T.cpu().numpy()
            weights = log_weights.exp().cpu().numpy()
            density, *_ = np.histogram2d(first, second, N_BINS, [(-1, 1), (-1, 1)], weights=weights, density=True)
            title = f"ess {float(effective_sample_size(log_weights)) / len(points):.2g}, ent_coef = {ent_coef:.3g}"
    actions = th.tanh(u).cpu().numpy()
    figure = Figure(figsize=(6, 3.6) if dim == 1 else (5.4, 4.6), layout="constrained")
    ax = figure.add_subplot()
    if dim == 1:
        bins = np.linspace(-1, 1, 61).tolist()
        ax.hist(actions[:, 0], bins, density=True, color="tab:orange", alpha=0.6, label="policy's actions")
        ax.plot(points[:, 0].cpu().numpy(), density, color="black", label="exp(Q / ent_coef) / Z")
        ax.set(xlabel="action, scaled to [-1, 1]", ylabel="density", ylim=(0, None))
    else:
        image = ax.imshow(
            (density.transpose(dims) if dim == 2 else density).T,  # rows: vertical axis
            origin="lower",
            extent=(-1, 1, -1, 1),
            cmap="Greys",
            norm=PowerNorm(0.5, 0, max(1.0, density.max())),  # so that weak modes are seen, and the uniform 0.25 is pale
            interpolation="bilinear",
        )
        figure.colorbar(image, ax=ax, label="density of exp(Q / ent_coef) / Z")
        ax.plot(*actions[:, list(dims)].T, ".", markersize=2, color="tab:orange", label="policy's actions")
        labels = {f"{axis}label": f"action dimension {i}, scaled" for axis, i in zip("xy", dims, strict=True)}
        ax.set(ylim=(-1, 1), xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1], **labels)
    ax.set(xlim=(-1, 1), title=title)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def check_dims(dims: Any, action_dim: int) -> None:
    """Raise a ValueError if they are not two different action dimensions, unless there is one only."""
    is_pair = isinstance(dims, tuple | list) and len(dims) == 2 and dims[0] != dims[1]
    if action_dim > 1 and not (is_pair and all(is_int(dim, 0) and dim < action_dim for dim in dims)):
        raise ValueError(f"`dims` must be two different ones of the action dimensions 0 to {action_dim - 1}, got {dims!r}.")
