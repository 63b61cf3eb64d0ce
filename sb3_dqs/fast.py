"""
Speed, and nothing else: every function here computes what a plain one computes, up to the rounding of its precision, and calls
the modules as they are where that is not certain: subclasses of ``nn.Linear`` and ``nn.ReLU``, hooks, quantised weights, a
``forward`` that was replaced. Inside ``with fast.disabled():`` modules and target updates are plain; the optimizer, the
precision of the training and compiled functions stay.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.utils import polyak_update
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from sb3_dqs import noise
from sb3_dqs.batch_norm import BatchNorm

if TYPE_CHECKING:
    from sb3_dqs.actor import Actor
    from sb3_dqs.solvers import Denoiser

Layer = Callable[[th.Tensor], th.Tensor]

# CPU only: the critic is evaluated in chunks of this many rows, so that hidden activations stay in cache
CPU_CHUNK_ROWS = 512
# Of a layer whose products are in bfloat16. A pass of 512 rows and its gradients then take 0.5 of the time in single precision
# with 2**16 weights, 0.7 with 2**15, 1.0 with 2**14 and 1.8 with 2**12
MIN_WEIGHTS = 2**15
# Layers that treat every row alike: chunks of rows change nothing
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity)
ROWWISE = (nn.Linear, nn.LayerNorm, *ACTIVATIONS)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(nn_module, f"_global{hooks}") for hooks in HOOKS)
# th.Tensor: what torch.func puts in the place of parameters
PLAIN_PARAMETERS = (nn.Parameter, th.Tensor, type(None))

_is_disabled = False


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Everything in plain code inside: to compare."""
    global _is_disabled
    before, _is_disabled = _is_disabled, True
    try:
        yield
    finally:
        _is_disabled = before


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """
    Whether a module may be computed without calling it: ``is_unchanged()``, unless everything is to be in plain code.

    :param module: the module
    :param cls: its class; a subclass is not plain
    :return: False also inside ``with fast.disabled():``
    """
    return not _is_disabled and is_unchanged(module, cls)


def is_unchanged(module: nn.Module, cls: type[nn.Module]) -> bool:
    """
    Whether a module computes what its class computes, and has no hooks.

    :param module: the module
    :param cls: its class
    :return: False for subclasses, hooks, a ``forward`` of its own, and parameters of special types (quantised ones)
    """
    if type(module) is not cls:
        return False
    attributes = vars(module)
    return (
        "forward" not in attributes
        and not any(attributes[hooks] for hooks in HOOKS)
        and not any(GLOBAL_HOOKS)
        and all(type(param) in PLAIN_PARAMETERS for param in attributes["_parameters"].values())
    )


def as_functions(layers: Iterable[nn.Module], dtype: th.dtype | None = None, precise: Collection[int] = ()) -> list[Layer]:
    """
    Successive layers as functions: plain linear layers without the overhead of a module, and a plain ReLU that writes into the
    output of the plain linear layer before it. Other layers are called as they are.

    :param layers: in their order
    :param dtype: precision of the matrix products of plain linear layers that are large (``MIN_WEIGHTS``); their results are
        rounded back. By default that of the weights
    :param precise: indices of layers that keep the precision of their weights
    :return: functions, the first of a tensor that nothing else needs
    """
    functions: list[Layer] = []
    is_free = True  # nothing else needs the input
    for index, layer in enumerate(layers):
        is_linear = is_plain(layer, nn.Linear)
        if is_linear:
            functions.append(_linear(layer, None if index in precise else dtype))
        elif is_free and is_plain(layer, nn.ReLU):
            functions.append(th.relu_)
        else:
            functions.append(layer)
        is_free = is_linear
    return functions


def _linear(layer: nn.Module, dtype: th.dtype | None) -> Layer:
    weight: th.Tensor = layer.weight  # type: ignore[assignment]
    bias: th.Tensor | None = layer.bias  # type: ignore[assignment]
    if dtype is None or weight.dtype != th.float32 or weight.numel() < MIN_WEIGHTS:
        return lambda x: F.linear(x, weight, bias)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias).to(x.dtype)


def denoiser(actor: "Actor", embedding: th.Tensor, dtype: th.dtype | None = None) -> "Denoiser":
    """
    ``actor.denoise(embedding, x, sigma)`` as a function of x and sigma. For the noise levels of the sampler, what depends on
    the levels and the weights alone is computed once.

    :param actor: the actor
    :param embedding: what ``actor.embed()`` returned, shape (..., width)
    :param dtype: precision of the large hidden layers, see :func:`as_functions`; by default that of the weights
    :return: from x of shape (..., action_dim) and sigma to the shape of x
    """
    from sb3_dqs.actor import Actor  # circular

    plain = functools.partial(actor.denoise, embedding)
    is_own = type(actor).denoise is Actor.denoise and "denoise" not in vars(actor)
    first = actor.embed_action
    if not (is_own and is_plain(first, nn.Linear) and first.bias is None and is_plain(actor.net, nn.Sequential)):
        return plain
    features, mean, std = actor.split(embedding)
    level_embeddings = actor.embed_level(actor.step_features).unbind()
    sigmas = actor.step_sigmas.reshape(-1, *[1] * std.dim())
    c_in = noise.c_in(sigmas, std)
    steps = dict(zip(actor.sigmas, zip(level_embeddings, c_in, c_in * std, strict=False), strict=False))
    layers = as_functions(actor.net, dtype)

    def denoise(x: th.Tensor, sigma: float) -> th.Tensor:
        if sigma not in steps:
            return plain(x, sigma)
        level_embedding, c_in, share = steps[sigma]
        centered = x - mean
        # The first layer, in single precision: small differences of x need it, and it is small
        hidden = F.linear(c_in * centered, first.weight, level_embedding).add_(features)
        if hidden.dim() > 2:
            hidden = hidden.flatten(end_dim=-2)
        for layer in layers:
            hidden = layer(hidden)
        # c_skip = share^2 and c_out = sigma * share
        residual = hidden if x.dim() == 2 else hidden.reshape(x.shape)
        return th.addcmul(mean, share, (share * centered).add(residual, alpha=sigma))

    return denoise


def energy(q_net: nn.Module, features: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
    """
    Values of a critic network ``q_net(cat(features, actions))`` for many actions per state. The first layer is a sum, of which
    the features' part is computed once per state.

    :param q_net: from (n, features_dim + action_dim) to (n, 1)
    :param features: shape (batch_size, features_dim)
    :return: from actions (batch_size, n_actions, action_dim) to (batch_size, n_actions)
    """
    if not (is_plain(q_net, nn.Sequential) and len(q_net) > 0 and is_plain(q_net[0], nn.Linear)):  # type: ignore[arg-type,index]

        def plain(actions: th.Tensor) -> th.Tensor:
            repeated = features.unsqueeze(1).expand(-1, actions.shape[1], -1)
            return q_net(th.cat([repeated, actions], dim=2).flatten(0, 1)).reshape(actions.shape[:2])

        return plain

    assert isinstance(q_net, nn.Sequential)  # for type checker
    first, *others = q_net
    assert isinstance(first, nn.Linear)
    is_rowwise = all(any(is_plain(layer, cls) for cls in ROWWISE) for layer in others)
    layers = as_functions(others)

    def split(actions: th.Tensor) -> th.Tensor:
        features_weight, actions_weight = first.weight.split([features.shape[1], actions.shape[2]], dim=1)
        features_part = F.linear(features, features_weight, first.bias).unsqueeze(1)
        # An exported graph is for batches of any size
        is_chunked = is_rowwise and features.device.type == "cpu" and not th.compiler.is_compiling()
        chunk_size = max(1, CPU_CHUNK_ROWS // len(features)) if is_chunked else actions.shape[1]
        values = []
        for chunk in actions.split(chunk_size, dim=1):
            hidden = F.linear(chunk, actions_weight).add_(features_part).flatten(0, 1)
            for layer in layers:
                hidden = layer(hidden)
            values.append(hidden.reshape(chunk.shape[:2]))
        return th.cat(values, dim=1)

    return split


@th.no_grad()
def fold_batch_norm(net: nn.Module) -> nn.Module:
    """
    A network whose batch normalisation, by its running means, is multiplied into the linear layers behind it. Without
    gradients to the parameters.

    :param net: the network
    :return: a network of the same function; ``net`` itself if it is no plain sequence of such pairs
    """
    if not is_plain(net, nn.Sequential):
        return net
    layers: list[nn.Module] = []
    norm: BatchNorm | None = None
    for layer in net:  # type: ignore[attr-defined]
        if norm is not None:
            if not is_plain(layer, nn.Linear):
                return net
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            folded = copy.copy(layer)  # its parameters are replaced, not changed
            folded._parameters = {"weight": layer.weight * scale, "bias": F.linear(shift, layer.weight, layer.bias)}
            layers.append(folded)
            norm = None
        elif is_plain(layer, BatchNorm):
            norm = layer
        else:
            layers.append(layer)
    return nn.Sequential(*layers) if norm is None else net


@th.no_grad()
def update_target(parameters: Iterable[th.Tensor], target_parameters: Iterable[th.Tensor], tau: float) -> None:
    """
    SB3's ``polyak_update()``, in one pass over the memory instead of two.

    :param parameters: of the network
    :param target_parameters: of its target
    :param tau: from 0 (nothing changes) to 1 (the target becomes the network)
    """
    parameters, target_parameters = list(parameters), list(target_parameters)
    if _is_disabled or not all(param.is_floating_point() for param in parameters):
        polyak_update(parameters, target_parameters, tau)
    elif parameters:
        th._foreach_lerp_(target_parameters, parameters, tau)


def optimizer_kwargs(
    optimizer_class: type[th.optim.Optimizer], kwargs: dict[str, Any], parameters: Iterable[th.Tensor] = ()
) -> dict[str, Any]:
    """
    Adam fused, unless the user chose an implementation: the same steps up to rounding, in a third of the time.

    :param optimizer_class: class of the optimizer
    :param kwargs: the user's arguments for it
    :param parameters: what it moves; complex numbers cannot be fused
    :return: arguments
    """
    is_chosen = bool({"foreach", "fused", "differentiable"} & set(kwargs))
    can_fuse = all(param.is_floating_point() and param.device.type in ("cpu", "cuda") for param in parameters)
    return {"fused": True, **kwargs} if optimizer_class is th.optim.Adam and can_fuse and not is_chosen else kwargs


@functools.cache
def training_dtype(device: th.device) -> th.dtype | None:
    """
    Precision of large hidden layers of the sampler and of the critics in training, see :func:`as_functions`.

    :param device: device
    :return: bfloat16 where its matrix products are faster: CPUs with AMX or AVX512-BF16, GPUs with tensor cores for it;
        elsewhere None, the precision of the weights
    """
    if device.type == "cuda":
        is_fast = th.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities: dict[str, bool] = getattr(th.cpu, "get_capabilities", dict)()  # older torch has no get_capabilities
        is_fast = device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return th.bfloat16 if is_fast else None


class Compiled:
    """
    A function that is compiled at its first call, and again for new shapes of its arguments (PyTorch keeps eight versions per
    process; what comes after runs as it is). It takes its random numbers from the generator that the function itself would,
    and computes the same up to rounding. Where it cannot be compiled (no C++ compiler, for instance) it warns once,
    and is the function itself from then on. Copies compile anew.

    :param function: of tensors
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        self.is_possible = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_possible:
            try:
                if self.compiled is None:
                    self.compiled = th.compile(self.function, dynamic=False, options={"fallback_random": True})
                return self.compiled(*args, **kwargs)
            except Exception as error:  # compilers fail in many ways
                result = self.function(*args, **kwargs)  # an error of its own comes again, and is raised
                reason = str(error).partition("\n\nSet TORCH")[0].strip()  # advice to developers of torch follows
                warnings.warn(
                    f"compile=True: torch.compile failed, and training goes on without it ({type(error).__name__}: {reason}); "
                    "install what is missing, or leave the argument out.",
                    stacklevel=2,
                )
                self.is_possible = False
                return result
        return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}


def compile_sampler(actor: "Actor") -> None:
    """
    Compile what draws actions in training.

    :param actor: the actor
    """
    actor.training_sample = Compiled(actor.training_sample)  # type: ignore[method-assign]
    actor.training_sample_log_prob = Compiled(actor.training_sample_log_prob)  # type: ignore[method-assign]
