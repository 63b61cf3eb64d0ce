"""Everything in ``sb3_dqs.fast`` computes what plain code computes, up to rounding."""

import contextlib
import copy
import warnings

import cloudpickle
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_actor, make_critic
from torch import nn
from torch.nn.utils import parametrizations, prune

from sb3_dqs import fast
from sb3_dqs.actor import Actor


class TwoDimensional(nn.Module):
    def forward(self, x):
        assert x.dim() == 2
        return x.sin()


class OtherParameter(nn.Parameter):
    """As of packages that quantise."""


def subclassed(module):
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, x: 1 - 0.5 * cls.forward(self, x)})
    return module


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 0.5 * output + 1)
    return module


def pre_hooked(module):
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))
    return module


def replaced(module):
    forward = module.forward
    module.forward = lambda x: 0.5 * forward(x) - 1
    return module


def batch_norm(width):
    module = nn.BatchNorm1d(width)
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module


CHANGES = {change.__name__: change for change in (subclassed, hooked, pre_hooked, replaced)}
LINEARS = {
    "plain": nn.Linear,
    "without bias": lambda *sizes: nn.Linear(*sizes, bias=False),
    "frozen": lambda *sizes: nn.Linear(*sizes).requires_grad_(False),
    "spectral norm": lambda *sizes: parametrizations.spectral_norm(nn.Linear(*sizes)),
    "weight norm": lambda *sizes: parametrizations.weight_norm(nn.Linear(*sizes, bias=False)),
    **{name: lambda *sizes, change=change: change(nn.Linear(*sizes)) for name, change in CHANGES.items()},
}
OTHERS = {
    **{cls.__name__: lambda width, cls=cls: cls() for cls in (*fast.ACTIVATIONS, nn.PReLU, TwoDimensional)},
    **{name: lambda width, change=change: change(nn.ReLU()) for name, change in CHANGES.items()},
    "LayerNorm": nn.LayerNorm,
    "BatchNorm1d": batch_norm,
}
NETS = {"plain": lambda net: net, **CHANGES}


def mostly(usual, kinds, n=1):
    return st.sampled_from([usual] * n * len(kinds) + sorted(kinds))


# One that is not plain in the whole net or in the first layer makes everything plain
first_linears, nets = mostly("without bias", LINEARS, 3), mostly("plain", NETS, 3)
linears = mostly("plain", LINEARS)
others = st.lists(mostly("ReLU", OTHERS), max_size=2)
hidden_layers = st.lists(st.tuples(st.integers(1, 16), linears, others), max_size=3)


def make_net(n_in, first, hidden, n_out, last, net):
    """Modules of the given kinds."""
    layers = [OTHERS[kind](n_in) for kind in first]
    for width, linear, following in hidden:
        layers += [LINEARS[linear](n_in, width), *(OTHERS[kind](width) for kind in following)]
        n_in = width
    return NETS[net](nn.Sequential(*layers, LINEARS[last](n_in, n_out))).eval()


def fast_and_plain(function):
    """What a function returns in fast and in plain code, with the same random numbers."""
    results = []
    for context in (contextlib.nullcontext(), fast.disabled()):
        th.manual_seed(1)
        with context:
            results.append(function())
    return results


def assert_close(values, expected, tolerance, is_rounded=False):
    """After coarse rounding a few values can be far away, where layers are steep."""
    assert values.shape == expected.shape and values.dtype == expected.dtype and values.isfinite().all()
    errors = (values - expected).abs()
    assert (errors.median() if is_rounded else errors.max()) <= tolerance * expected.abs().max().clamp(min=1)


@pytest.fixture(autouse=True, scope="module")
def small_layers_in_bfloat16():
    """The networks of these tests are small."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fast, "MIN_WEIGHTS", 1)
        yield


@settings(max_examples=60)
@given(st.data())
def test_fast_is_plain(data):
    draw = data.draw
    action_dim, n_actions = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 300]))
    th.manual_seed(draw(st.integers(0, 1000)))

    actor = make_actor(action_dim, draw(st.sampled_from([(), (1,), (6,), (16,)])), diffusion_steps=3)
    width = len(actor.embed_features.weight)
    actor.embed_action = LINEARS[draw(first_linears)](action_dim, width).eval()
    if actor.net_arch:
        actor.net = make_net(width, draw(others), draw(hidden_layers), action_dim, draw(linears), draw(nets))
    obs, latents = th.randn(64, 3), th.randn(64, action_dim)
    for dtype, n_states in ((None, draw(st.integers(1, 5))), (th.bfloat16, 64)):

        @th.no_grad()
        def act(dtype=dtype, n_states=n_states):
            embedding = actor.embed(obs[:n_states])
            u, log_prob = actor.sample_log_prob(embedding, latents[:n_states], dtype=dtype)
            several = actor.sample(embedding.unsqueeze(1), latents[:n_states].unsqueeze(1).expand(-1, 2, -1), dtype)
            return u, several, actor(obs[:n_states], deterministic=True), log_prob

        tolerances = (1e-5, 1e-3) if dtype is None else (0.01, 0.1)
        for result, expected in zip(*fast_and_plain(act), strict=True):
            assert_close(result, expected, tolerances[expected.dim() == 1], is_rounded=dtype is not None)

    critic, obs = make_critic(action_dim), obs[: draw(st.integers(1, 5))]
    critic.q_networks = [make_net(3 + action_dim, [], draw(hidden_layers), 1, draw(linears), draw(nets))]

    def value():
        actions = th.rand(len(obs), n_actions, action_dim).requires_grad_()
        values = critic.energy(obs)(actions)
        return values.detach(), th.autograd.grad(values.sum(), actions)[0]

    for results in zip(*fast_and_plain(value), strict=True):
        assert_close(*results, 1e-5)


@pytest.mark.filterwarnings("ignore")  # PyTorch recommends another package
def test_quantised_networks():
    """Their weights are no tensors; they round as coarsely as bfloat16 does."""
    actor = th.ao.quantization.quantize_dynamic(make_actor(), {"embed_action", "net"})
    critic = th.ao.quantization.quantize_dynamic(make_critic(), {"qf0"})
    critic.q_networks = [critic.qf0]
    obs, latents, actions = th.randn(64, 3), th.randn(64, 2), th.rand(64, 3, 2)
    for dtype in (None, th.bfloat16):
        assert_close(*fast_and_plain(lambda dtype=dtype: actor.sample(actor.embed(obs), latents, dtype)), 0.01, True)
    assert_close(*fast_and_plain(lambda: critic.energy(obs)(actions)), 0.03)


@given(st.floats(0, 1))
def test_update_of_targets(tau):
    weights = list(make_actor().parameters())

    def update_target():
        targets = [th.randn_like(weight) for weight in weights]
        fast.update_target(weights, targets, tau)
        return th.cat([target.flatten() for target in targets])

    assert_close(*fast_and_plain(update_target), 1e-6)


def count_linear(monkeypatch, seen):
    """Appends what ``seen`` makes of the arguments of every linear product to the list returned."""
    linear, calls = nn.functional.linear, []
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(seen(*args)) or linear(*args))
    return calls


def test_plain_layers_are_not_called_as_modules(monkeypatch):
    """Without this, the test above would hold for a fast path that is never taken."""
    actor, critic = make_actor(net_arch=(16, 8), diffusion_steps=5), make_critic(net_arch=(16, 8))
    calls, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    embedding, latents, energy = actor.embed(th.randn(4, 3)), th.randn(4, 2), critic.energy(th.randn(4, 3))
    calls.clear()
    for dtype in (None, th.bfloat16):
        actor.sample_log_prob(embedding, latents, dtype=dtype)
    energy(th.rand(4, 7, 2))
    assert calls == [actor.embed_level] * 2  # for all levels at once
    with fast.disabled(), contextlib.suppress(ZeroDivisionError), fast.disabled():
        raise ZeroDivisionError
    energy(th.rand(4, 7, 2))
    assert len(calls) == 2  # enabled again
    with fast.disabled():
        actor.sample(embedding, latents)
        critic.energy(th.randn(4, 3))(th.rand(4, 7, 2))
    assert len(calls) == 2 + 5 * 4 + 2 * 3


@pytest.mark.parametrize("dtype", [None, th.bfloat16])
def test_hooks_are_called_with_what_the_layer_gives_in_its_own_precision(dtype):
    """Also those of all modules, and of gradients; what a hook keeps is not overwritten."""
    actor, critic, kept = make_actor(net_arch=(16, 8), diffusion_steps=3), make_critic(), []
    embedding, latents, layers = actor.embed(th.randn(64, 3)), th.randn(64, 2), [actor.embed_action, *actor.net[:3]]

    def run():
        kept.clear()
        actor.sample(embedding, latents, dtype)
        critic.energy(th.randn(64, 3))(th.rand(64, 2, 2).requires_grad_()).sum().backward()
        return len(kept)

    def keep(module, inputs, output):
        kept.append((module, output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    assert run() == 3 * len(layers)
    for module, output in kept:
        assert output.dtype == th.float32 and (output < 0).any() == isinstance(module, nn.Linear)
    for handle in handles:
        handle.remove()
    assert run() == 0
    with nn.modules.module.register_module_forward_hook(keep):
        assert run() > 3 * len(layers)
    critic.q_networks[0][2].register_full_backward_hook(keep)
    assert run() == 1


def test_what_is_plain():
    for module in (nn.Linear(2, 2), nn.Linear(2, 2, bias=False)):
        assert fast.is_plain(module, nn.Linear) and not fast.is_plain(module, nn.ReLU)
        module.register_parameter("weight", OtherParameter(th.zeros(2, 2)))
        assert not fast.is_plain(module, nn.Linear)
    assert not fast.is_plain(prune.identity(nn.Linear(2, 2), "weight"), nn.Linear)


def test_matrix_products_are_in_the_precision_of_the_sampler(monkeypatch):
    """Of the hidden layers: their weights rounded and multiplied in single precision would be no faster."""
    actor = make_actor(net_arch=(16, 8, 8))
    embedding = actor.embed(th.randn(4, 3))
    dtypes = count_linear(monkeypatch, lambda x, weight, *bias: (x.dtype, weight.dtype))
    actor.sample(embedding, th.randn(4, 2), th.bfloat16)
    assert dtypes.count((th.bfloat16, th.bfloat16)) == 3 * 8 and dtypes.count((th.float32, th.float32)) == 1 + 8


def test_a_denoiser_of_the_user_is_used():
    class OwnActor(Actor):
        def denoise(self, embedding, x, sigma):
            return 0 * x + 0.3

    own, replaced = make_actor(cls=OwnActor), make_actor()
    replaced.denoise = lambda embedding, x, sigma: 0 * x - 0.3
    for actor, answer in ((own, 0.3), (replaced, -0.3)):
        assert actor.sample(actor.embed(th.zeros(1, 3)), th.randn(1, 2)).flatten().tolist() == pytest.approx([answer] * 2)


def test_denoiser_at_levels_that_are_not_the_samplers_with_gradients():
    actor, x = make_actor(), th.randn(4, 2, requires_grad=True)
    embedding = actor.embed(th.randn(4, 3))
    inputs = [x, *actor.net.parameters(), actor.embed_action.weight, actor.embed_level.weight]
    for sigma in (0.123, actor.sigmas[3]):

        def denoise_with_gradients(sigma=sigma):
            result = fast.denoiser(actor, embedding)(x, sigma)
            return result, *th.autograd.grad(result.sum(), inputs, retain_graph=True)

        for result, expected in zip(*fast_and_plain(denoise_with_gradients), strict=True):
            assert_close(result, expected, 1e-5)


def test_chunks_of_the_critic_are_small_and_not_of_layers_that_mix_rows(monkeypatch):
    critic, rows = make_critic(), count_linear(monkeypatch, lambda x, *weights: len(x.flatten(end_dim=-2)))
    obs, actions = th.randn(5, 3), th.rand(5, 300, 2)
    critic.energy(obs)(actions)
    assert max(rows) <= fast.CPU_CHUNK_ROWS
    critic.q_networks = [nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))]  # in training mode
    assert_close(*fast_and_plain(lambda: critic.energy(obs)(actions)), 1e-5)


def test_adam_is_fused_unless_the_user_wants_it_otherwise():
    for kwargs in ({}, {"eps": 1e-4}):
        assert fast.optimizer_kwargs(th.optim.Adam, kwargs) == {**kwargs, "fused": True}
        assert fast.optimizer_kwargs(th.optim.SGD, kwargs) == kwargs
    for kwargs in ({"foreach": True}, {"differentiable": True}, {"fused": False}):
        assert fast.optimizer_kwargs(th.optim.Adam, kwargs) == kwargs


@pytest.mark.parametrize(("capability", "dtype"), [("amx_bf16", th.bfloat16), ("avx512_bf16", th.bfloat16), ("avx2", None)])
def test_precision_of_the_training_on_cpus(monkeypatch, capability, dtype):
    monkeypatch.setattr(th.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert fast.training_dtype.__wrapped__(th.device("cpu")) == dtype
    assert fast.training_dtype.__wrapped__(th.device("meta")) is None


class TestCompiled:
    def test_is_compiled_once_and_copies_of_an_actor_sample_with_themselves(self, monkeypatch):
        compiled = []
        monkeypatch.setattr(th, "compile", lambda function, **kwargs: compiled.append(function) or function)
        actor, obs = make_actor(), th.zeros(1, 3)
        fast.compile_sampler(actor)
        actor.action_log_prob(obs)
        actor.action_log_prob(obs)
        copies = [copy.deepcopy(actor), cloudpickle.loads(cloudpickle.dumps(actor))]
        for other in copies:
            other.action_log_prob(obs)
            other.training_sample(other.embed(obs), th.zeros(1, 2))
        owners = [function.__self__ for function in compiled]
        assert owners == [actor, copies[0], copies[0], copies[1], copies[1]]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
    def test_sampler_is_one_graph(self, monkeypatch):
        """By the compiler's front end alone, which is where code that it cannot read fails."""
        compiler = th.compile
        monkeypatch.setattr(th, "compile", lambda function, **kwargs: compiler(function, backend="eager", fullgraph=True))
        actor = make_actor(net_arch=(16, 8), diffusion_steps=3)
        embedding, latents = actor.embed(th.randn(4, 3)).detach(), th.randn(4, 2)
        th.manual_seed(1)
        expected = actor.training_sample_log_prob(embedding, latents)
        fast.compile_sampler(actor)
        th.manual_seed(1)
        for result, plain in zip(actor.training_sample_log_prob(embedding, latents), expected, strict=True):
            assert_close(result, plain, 1e-4)
        assert actor.training_sample_log_prob.is_possible

    @pytest.mark.parametrize("fails_at_the_call", [False, True])
    @pytest.mark.parametrize("message", ["no compiler", "backend='inductor' raised:\nInvalidCxxCompiler: no compiler"])
    def test_what_cannot_be_compiled_runs_uncompiled_after_one_warning(self, monkeypatch, message, fails_at_the_call):
        def fail(*args, **kwargs):
            raise RuntimeError(message + "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

        monkeypatch.setattr(th, "compile", (lambda function, **kwargs: fail) if fails_at_the_call else fail)
        double = fast.Compiled(lambda x: 2 * x)
        with pytest.warns(UserWarning, match=r"compile=True(.|\n)*no compiler\)"):
            assert double(th.tensor(1.0)) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert double(th.tensor(2.0)) == 4

    def test_errors_of_the_function_itself_are_raised_and_not_taken_for_those_of_the_compiler(self, monkeypatch):
        monkeypatch.setattr(th, "compile", lambda function, **kwargs: function)
        number = fast.Compiled(int)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="invalid literal"):
                number("bad")
        assert number("1") == 1 and number.is_possible
