"""Batch normalisation, of the critic and of the actor's input."""

import torch as th
from torch import nn
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """
    Batch normalisation (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167). Called as a layer it uses its running means,
    in training as in evaluation; ``normalize()`` uses the statistics of the batch. Both ``normalize()`` and ``observe()`` move
    the running means.

    :param size: number of features
    :param eps: added to the variances; CrossQ's value
    :param momentum: least rate of the running means; CrossQ's value
    :param warm_up: the n-th batch, counted from 1, moves them at the rate ``max(momentum, warm_up / (n + warm_up))``; not
        measured
    """

    running_mean: th.Tensor
    running_var: th.Tensor

    def __init__(self, size: int, eps: float = 1e-3, momentum: float = 0.01, warm_up: float = 10.0):
        super().__init__()
        self.eps, self.momentum, self.warm_up = eps, momentum, warm_up
        self.weight, self.bias = nn.Parameter(th.ones(size)), nn.Parameter(th.zeros(size))
        self.register_buffer("running_mean", th.zeros(size))
        self.register_buffer("running_var", th.ones(size))
        self.n_batches = 0.0  # no buffer: reading one waits for the GPU

    def get_extra_state(self) -> th.Tensor:
        return th.tensor(self.n_batches)  # floating, as users and SB3's tests expect of all that get_parameters() gives

    def set_extra_state(self, state: th.Tensor) -> None:
        self.n_batches = float(state)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def normalize(self, x: th.Tensor) -> th.Tensor:
        """
        Normalise a batch by its own statistics, and move the running means.

        :param x: shape (n, size), n at least 2
        :return: of the same shape
        """
        self.n_batches += 1
        rate = max(self.momentum, self.warm_up / (self.n_batches + self.warm_up))
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps)

    @th.no_grad()
    def observe(self, x: th.Tensor) -> None:
        """
        Move the running means only.

        :param x: shape (n, size); one row has no variance and moves nothing
        """
        if len(x) > 1:
            self.normalize(x)
