"""
What the package's solver does with an exact denoiser, by number of steps, beside ancestral sampling.

    python benchmarks/fidelity_solvers.py

For the distributions of ``fidelity.py`` in one and two dimensions: sliced Wasserstein-1 distance of the draws to exact samples
over that between two exact sets (1 is perfect), and the error of the mode shares. Every row goes to
``benchmarks/results/fidelity_solvers.csv``. About a minute per target.
"""

import argparse
from itertools import pairwise

import torch as th
from common import RESULTS, append_rows, print_provenance, print_table, use_one_thread
from fidelity import N_ACTIONS, distance_over_floor, share_error
from fidelity_targets import TARGETS, Target, make_target

from sb3_dqs.density import log_det_tanh
from sb3_dqs.diagnostics.metrics import box_grid
from sb3_dqs.noise import NoiseLevels
from sb3_dqs.solvers import MAX_UNSQUASHED, Callback, Denoiser, Solver, dpm_solver_2m

STEP_COUNTS = (4, 6, 8, 10, 16)


def exact_denoiser(target: Target, n_cells: int = 400) -> Denoiser:
    """``E[u | x]`` in one or two dimensions, by quadrature."""
    axis = MAX_UNSQUASHED * box_grid(1, n_cells).squeeze(1).double()
    grid = MAX_UNSQUASHED * box_grid(target.dim, n_cells).double()
    log_mass = target.log_density(grid.tanh().float()).double() + log_det_tanh(grid)
    mass = (log_mass - log_mass.max()).exp().reshape([n_cells] * target.dim)

    def denoise(x: th.Tensor, sigma: float) -> th.Tensor:
        likelihoods = [(-((axis - part) ** 2) / (2 * sigma**2)).softmax(dim=1) for part in x.split(1, dim=1)]
        if target.dim == 1:
            marginals = [likelihoods[0] * mass]
        else:
            first, second = likelihoods
            marginals = [first * (second @ mass.T), second * (first @ mass)]
        return th.stack([marginal @ axis / marginal.sum(dim=1) for marginal in marginals], dim=1)

    return denoise


def ancestral(denoise: Denoiser, x: th.Tensor, sigmas: list[float], callback: Callback | None = None) -> th.Tensor:
    """Draws each noisy action from its posterior given the denoised one (Ho et al. 2020, equations (6) and (7))."""
    for sigma, next_sigma in pairwise(sigmas):
        ratio = (next_sigma / sigma) ** 2
        x = (1 - ratio) * denoise(x, sigma) + ratio * x + next_sigma * (1 - ratio) ** 0.5 * th.randn_like(x)
    return denoise(x, sigmas[-1])


SOLVERS: dict[str, Solver] = {"ODE": dpm_solver_2m, "ancestral": ancestral}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    low = [name for name in TARGETS if make_target(name).dim <= 2]
    parser.add_argument("--targets", nargs="+", default=low, choices=low, metavar="TARGET")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    use_one_thread()
    print_provenance()

    lines = []
    for name in args.targets:
        target = make_target(name)
        denoise = exact_denoiser(target)
        th.manual_seed(args.seed)
        for solver, solve in SOLVERS.items():
            line = [name, solver]
            for n_steps in STEP_COUNTS:
                sigmas = NoiseLevels().sampling(n_steps)
                noises = [sigmas[0] * th.randn(N_ACTIONS, target.dim).double() for _ in range(3)]
                sets = [solve(denoise, x, sigmas, None).tanh().float() for x in noises]
                distance, shares = distance_over_floor(name, sets), share_error(target, th.cat(sets))
                line.append(f"{distance:.1f}" + ("" if target.modes is None else f" ({shares:.3f})"))
                row = {"target": name, "solver": solver, "diffusion_steps": n_steps, "seed": args.seed}
                append_rows(
                    RESULTS / "fidelity_solvers.csv", [row | {"distance": f"{distance:.4g}", "shares": f"{shares:.4g}"}]
                )
            lines.append(line)
    print("Distance over floor (share error), by number of steps:\n")
    print_table(["target", "solver", *map(str, STEP_COUNTS)], lines)


if __name__ == "__main__":
    main()
