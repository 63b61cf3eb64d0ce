"""Entropy from the distances of samples to their neighbours, for the benchmarks that check the policy's own."""

import numpy as np
import torch as th

NEIGHBOUR = 3


def nearest_neighbour_entropy(samples: th.Tensor) -> float:
    """Differential entropy from the distances to the third neighbours (Kozachenko and Leonenko 1987)."""
    n, dim = samples.shape
    samples = samples.double() + 1e-4 * th.randn(n, dim)  # clipped actions are equal
    distances = [th.cdist(part, samples).topk(NEIGHBOUR + 1, largest=False).values[:, -1] for part in samples.split(1000)]
    log_ball = dim / 2 * np.log(np.pi) - th.lgamma(th.tensor(dim / 2 + 1)).item()
    digammas = th.digamma(th.tensor([float(n), float(NEIGHBOUR)]))
    return dim * th.cat(distances).log().mean().item() + (digammas[0] - digammas[1]).item() + log_ball
