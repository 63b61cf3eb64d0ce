"""Pictures of a policy over the density that it should have."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_dqs.checks import is_int
from sb3_dqs.denoiser_targets import effective_sample_size
from sb3_dqs.diagnostics.diagnose import GRID_CELLS, check_int, policy_and_tempered_q, to_tensors
from sb3_dqs.diagnostics.importance_sampling import TemperedQ, importance_sample
from sb3_dqs.diagnostics.metrics import box_grid
from sb3_dqs.dqs import DQS
from sb3_dqs.observations import count
from sb3_dqs.policies import evaluation_mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_policy(
    model: DQS,
    observation: np.ndarray | dict[str, np.ndarray] | PyTorchObs,
    dims: tuple[int, int] = (0, 1),
    n_actions: int = 1000,
    *,
    n_cells: int | None = None,
    n_candidates: int = 32768,
    n_bins: int = 40,
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
    :param n_bins: number of bins per dimension of the histogram of candidates
    :return: figure, independent of pyplot: ``figure.savefig(...)``
    :raises ValueError: if the model is none of DQS, if the observation is not finite, does not fit the observation space
        or is not one, if ``dims`` are not two different action dimensions, or if a number is not an integer or too small
    """
    for name, value, low in (
        ("n_actions", n_actions, 2),
        ("n_cells", 2 if n_cells is None else n_cells, 2),
        ("n_candidates", n_candidates, 2),
        ("n_bins", n_bins, 1),
    ):
        check_int(name, value, low)
    obs = to_tensors(model, "observation", observation)
    if count(obs) != 1:
        raise ValueError(f"`observation` must be one observation (observations[0] for instance), got {count(obs)}.")
    action_dim = model.actor.action_dim
    check_dims(dims, action_dim)

    from matplotlib.figure import Figure  # takes a while to import

    with evaluation_mode(model.policy), th.no_grad():
        u, tempered_q = policy_and_tempered_q(model, obs, n_actions)
        figure = Figure(figsize=(6, 3.6) if action_dim == 1 else (5.4, 4.6), layout="constrained")
        ax = figure.add_subplot()
        ess = ""
        if action_dim in GRID_CELLS:
            grid = box_grid(action_dim, n_cells or GRID_CELLS[action_dim], dtype=u.dtype, device=u.device)
            density = _grid_density(tempered_q, grid)
        else:
            density, ess = _marginal_density(tempered_q, u, dims, n_candidates, n_bins)
    actions = th.tanh(u).cpu().numpy()
    if action_dim == 1:
        _draw_curve(ax, actions[:, 0], density)
    else:
        _draw_map(ax, actions, density if action_dim > 2 else density.transpose(dims), dims)
    ax.set(xlim=(-1, 1), title=f"{ess}ent_coef = {float(model.ent_coef_tensor):.3g}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _grid_density(tempered_q: TemperedQ, grid: th.Tensor) -> np.ndarray:
    """Density at the points of a grid, of one axis per dimension."""
    n_cells, dim = grid.shape
    probabilities = th.softmax(tempered_q(grid), dim=0).reshape([round(n_cells ** (1 / dim))] * dim)
    return probabilities.cpu().numpy() * n_cells / 2**dim


def _marginal_density(
    tempered_q: TemperedQ, u: th.Tensor, dims: tuple[int, int], n_candidates: int, n_bins: int
) -> tuple[np.ndarray, str]:
    """Density of two dimensions, shape (n_bins, n_bins), and the effective sample size for the title."""
    candidates, log_weights, _ = importance_sample(tempered_q, u, n_candidates)
    first, second = candidates[:, list(dims)].T.cpu().numpy()
    weights = log_weights.exp().cpu().numpy()
    density, *_ = np.histogram2d(first, second, n_bins, [(-1, 1), (-1, 1)], weights=weights, density=True)
    return density, f"ess {float(effective_sample_size(log_weights)) / len(candidates):.2g}, "


def _draw_curve(ax: "Axes", actions: np.ndarray, density: np.ndarray) -> None:
    bins = np.linspace(-1, 1, 61).tolist()
    ax.hist(actions, bins, density=True, color="tab:orange", alpha=0.6, label="policy's actions")
    midpoints = box_grid(1, len(density)).flatten().numpy()
    ax.plot(midpoints, density, color="black", label="exp(Q / ent_coef) / Z")
    ax.set(xlabel="action, scaled to [-1, 1]", ylabel="density", ylim=(0, None))


def _draw_map(ax: "Axes", actions: np.ndarray, density: np.ndarray, dims: tuple[int, int]) -> None:
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, vmin=0)  # so that weak modes are seen
    image = ax.imshow(density.T, origin="lower", extent=(-1, 1, -1, 1), cmap="Greys", norm=norm, interpolation="bilinear")
    ax.figure.colorbar(image, ax=ax, label="density of exp(Q / ent_coef) / Z")
    ax.plot(*actions[:, list(dims)].T, ".", markersize=2, color="tab:orange", label="policy's actions")
    ticks = [-1, -0.5, 0, 0.5, 1]
    ax.set(
        xticks=ticks,
        yticks=ticks,
        xlabel=f"action dimension {dims[0]}, scaled",
        ylabel=f"action dimension {dims[1]}, scaled",
        ylim=(-1, 1),
    )


def check_dims(dims: Any, action_dim: int) -> None:
    """
    Check the dimensions of a picture.

    :param dims: as the user gave them
    :param action_dim: number of action dimensions
    :raises ValueError: if they are not two different action dimensions, unless there is one only
    """
    is_pair = isinstance(dims, tuple | list) and len(dims) == 2 and dims[0] != dims[1]
    if action_dim > 1 and not (is_pair and all(is_int(dim, 0) and dim < action_dim for dim in dims)):
        raise ValueError(f"`dims` must be two different ones of the action dimensions 0 to {action_dim - 1}, got {dims!r}.")
