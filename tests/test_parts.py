"""The parts of a block that are one kernel each: against what PyTorch computes, and when the model takes them.

Without a GPU they are interpreted, with products in float32 whatever the dtype; with one they are compiled.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vig_ref.model
from cases import FUSED_DEVICE, in_red_zone, interpreted
from test_model import Results
from vig_ref import BACKENDS, parts
from vig_ref.fused.launch import INTERPRETED
from vig_ref.model import Mixer, SwiGLU, one_kernel
from vig_ref.ops import product_dtype

#: Half the distance from 1 to the next number; the interpreter cuts bits off where a GPU rounds to bfloat16.
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
DTYPES = list(UNIT)


def log_gates(x, W_1, W_2, b, tau):
    return F.logsigmoid(F.linear(F.linear(x, W_1), W_2, b)) / tau


def swiglu(x, W):
    gate, up = F.linear(x, W).chunk(2, -1)
    return F.silu(gate) * up


def weigh(z, far, near, w_far, w_near, eps_far, eps_near, silu):
    z, far, near = (x.unflatten(-1, (-1, len(w_far))) for x in (z, far, near))
    gate = torch.sigmoid(z)
    far, near = F.rms_norm(far, w_far.shape, w_far, eps_far), F.rms_norm(near, w_near.shape, w_near, eps_near)
    y = (gate * far + (1 - gate) * near).flatten(-2)
    return F.silu(y) if silu else y


def tensors(seed, dtype, *shapes):
    """Of sizes that keep results near 1: a matrix is divided by the root of what it sums."""
    r = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=r) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [in_red_zone(x.to(dtype)).to(FUSED_DEVICE).requires_grad_() for x in drawn]


def agree(kernel, oracle, inputs, *numbers):
    """Result and gradients, against float64, in norm.

    Roundings of random numbers average out: a sum in float32 is off by a few of its units, whatever its length, and
    100 are granted. In 16 bits the operands of products and the result are rounded, and in a gradient what has been
    summed on the way, twice at most. Gates are float32.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = kernel(*inputs, *numbers), oracle(*exact, *numbers)
    dtype = inputs[0].dtype
    assert got.shape == expected.shape
    assert got.dtype == (torch.float32 if oracle is log_gates else dtype)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(got)
    grads = torch.autograd.grad(got, inputs, dy), torch.autograd.grad(expected, exact, dy.double())
    assert [x.dtype for x in grads[0]] == [x.dtype for x in inputs]
    for n, (a, b) in enumerate(((got, expected), *zip(*grads, strict=True))):
        limit = 100 * UNIT[torch.float32] + (0 if dtype == torch.float32 else UNIT[dtype] * (4 if n else 1))
        assert (a.double() - b).norm() <= limit * b.norm() + 1e-30, n


#: Where a gradient is one number, it may be what a cancellation leaves of roundings of 16 bits.
LEAST = {torch.float32: 1, torch.float16: 16, torch.bfloat16: 16}
sizes = st.integers(1, 70)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstPyTorch:
    @given(shape=shapes, D=st.integers(1, 100), R=st.integers(1, 20), N=sizes, seed=st.integers(0, 2**16))
    def test_log_gates(self, dtype, shape, D, R, N, seed):
        D, N = max(D, LEAST[dtype]), max(N, LEAST[dtype])
        inputs = tensors(seed, dtype, (1, *shape, D), (R, D), (N, R), (N,))
        agree(parts.log_gates, log_gates, inputs, seed % 7 + 0.5)

    @given(shape=shapes, D=st.integers(1, 100), N=sizes, seed=st.integers(0, 2**16))
    def test_swiglu(self, dtype, shape, D, N, seed):
        D, N = max(D, LEAST[dtype]), max(N, LEAST[dtype])
        agree(parts.swiglu, swiglu, tensors(seed, dtype, (1, *shape, D), (2 * N, D)))

    @given(shape=shapes, H=st.integers(1, 4), V=sizes, silu=st.booleans(), seed=st.integers(0, 2**16))
    def test_weigh(self, dtype, shape, H, V, silu, seed):
        V = max(V, LEAST[dtype])
        weights = tensors(seed + 1, torch.float32, (V,), (V,))
        inputs = [*tensors(seed, dtype, *[(1, *shape, H * V)] * 3), *weights]
        agree(parts.weigh, weigh, inputs, 0.7, 0.5, silu)  # a small eps and one channel leave no gradient but roundoff

    def test_the_sizes_of_vig(self, dtype):
        """More than one block in every axis, and the last of them not full."""
        agree(parts.log_gates, log_gates, tensors(0, dtype, (2, 3, 30, 192), (16, 192), (192, 16), (192,)), 16.0)
        agree(parts.swiglu, swiglu, tensors(0, dtype, (1, 3, 50, 192), (2 * 100, 192)))
        weights = tensors(1, torch.float32, (64,), (64,))
        agree(parts.weigh, weigh, [*tensors(0, dtype, *[(2, 50, 192)] * 3), *weights], 1e-6, 4e-6, True)

    def test_any_strides(self, dtype):
        """Of every input; a vector's is 2."""

        def laid_out(shape):
            x = torch.randn(shape).to(FUSED_DEVICE, dtype) / shape[-1] ** 0.5
            x = x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]
            return x.requires_grad_()

        torch.manual_seed(0)
        agree(parts.swiglu, swiglu, [laid_out(s) for s in ((1, 12, 40), (60, 40))])
        agree(parts.log_gates, log_gates, [laid_out(s) for s in ((1, 12, 40), (7, 40), (30, 7), (30,))], 16.0)
        inputs = [laid_out(s) for s in ((2, 9, 24), (2, 9, 24), (2, 9, 24), (8,), (8,))]
        agree(parts.weigh, weigh, inputs, 0.1, 0.2, True)

    def test_nothing_overflows(self, dtype):
        """Sigmoids of what exp cannot take. Below -87 the kernel's is 0; so small a number is none in float16."""
        z = torch.tensor([1e4, 200.0, 88.0, 30.0, 0.0, -30.0, -88.0, -200.0, -1e4], dtype=dtype, device=FUSED_DEVICE)
        eye = torch.eye(len(z), dtype=dtype, device=FUSED_DEVICE)
        exact = z.double()
        for got, expected in (
            (parts.log_gates(z[None], eye, eye, torch.zeros_like(z), 16.0), F.logsigmoid(exact) / 16),
            (parts.swiglu(z[None], torch.cat([eye, eye / 2048])), F.silu(exact) * exact / 2048),
            (parts.weigh(z[None], 0 * z[None], z[None], eye[0] + 1, eye[0] + 1, 1e-6, 1e-6, False), None),
        ):
            assert got.isfinite().all()
            if expected is not None:
                torch.testing.assert_close(got.double()[0], expected, rtol=4 * UNIT[dtype] + 1e-6, atol=1e-7)

    def test_no_gate_is_above_zero(self, dtype):
        """Where the logarithm of a number next to 1 is a roundoff."""
        z = torch.linspace(5, 30, 4096, device=FUSED_DEVICE).to(dtype)[:, None]
        one = torch.ones(1, 1, dtype=dtype, device=FUSED_DEVICE)
        g = parts.log_gates(z, one, one, 0 * one[0], 16.0)
        assert (g <= 0).all()
        assert (g >= F.logsigmoid(z.double()) / 16 - 2e-8).all()

    def test_nan_stays_nan(self, dtype):
        x = torch.full((1, 16), torch.nan, dtype=dtype, device=FUSED_DEVICE)
        eye = torch.eye(16, dtype=dtype, device=FUSED_DEVICE)
        assert parts.log_gates(x, eye, eye, eye[0], 16.0).isnan().all()
        assert parts.swiglu(x, torch.cat([eye, eye])).isnan().all()
        assert parts.weigh(x, 0 * eye[:1], 0 * eye[:1] + 1, eye[0], eye[0] + 1, 1e-6, 1e-6, True).isnan().all()

    def test_no_tokens(self, dtype):
        x, W, b = (torch.zeros(*shape, dtype=dtype, device=FUSED_DEVICE) for shape in ((2, 0, 32), (64, 32), (32,)))
        assert parts.swiglu(x, W).shape == (2, 0, 32)
        assert parts.log_gates(x, W[:16], W[:32, :16], b, 16.0).shape == (2, 0, 32)
        assert parts.weigh(x, x, x, b[:8], b[:8], 1e-6, 1e-6, True).shape == (2, 0, 32)


def test_registered_as_pytorch_wants_it():
    x, W, W_1, W_2, b, w = tensors(0, torch.float32, (2, 5, 12), (16, 12), (4, 12), (12, 4), (12,), (6,))
    for operator, inputs in (
        (torch.ops.vig_ref.log_gates, (x, W_1, W_2, b, 16.0)),
        (torch.ops.vig_ref.swiglu, (x, W)),
        (torch.ops.vig_ref.weigh, (x, x.detach() + 1, x.detach() - 1, w, w.detach() + 1, 1e-6, 1e-6, True)),
    ):
        torch.library.opcheck(operator.default, inputs)


def test_a_second_derivative_is_refused():
    x, W, w = tensors(0, torch.float32, (1, 3, 8), (8, 8), (8,))
    for y in (parts.swiglu(x, W), parts.weigh(x, x.detach(), x.detach(), w, w, 1e-6, 1e-6, True)):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="chunked"):
            dx.sum().backward()


def test_weights_that_are_frozen_cost_nothing():
    x, W, W_1, W_2, b = tensors(0, torch.float32, (1, 3, 12), (16, 12), (4, 12), (20, 4), (20,))
    frozen = [t.detach() for t in (W, W_1, W_2, b)]
    M = 3
    for y, products in (
        (parts.swiglu(x, frozen[0]), M * 16 * 12),
        (parts.log_gates(x, *frozen[1:], 16.0), 2 * M * (12 * 4 + 4 * 20)),  # z, computed again, and back to x
    ):
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * products


def test_other_dtypes_of_weights_are_refused():
    x = torch.zeros(1, 16, dtype=torch.bfloat16, device=FUSED_DEVICE)
    W = torch.zeros(32, 16, device=FUSED_DEVICE)
    with pytest.raises(ValueError, match=r"W: expected the dtype of x, torch\.bfloat16, got torch\.float32"):
        parts.swiglu(x, W)
    with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch\.float64; write it with"):
        parts.swiglu(x.double(), W.double())
    with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch\.int64; write it with"):
        parts.weigh(x.long(), x, x, W[0], W[0], 1e-6, 1e-6, True)


def test_shapes_that_do_not_fit_are_refused():
    """The kernels would read behind the end."""
    x, b = torch.zeros(2, 12, device=FUSED_DEVICE), torch.zeros(20, device=FUSED_DEVICE)
    W, W_1, W_2, w = (torch.zeros(*s, device=FUSED_DEVICE) for s in ((16, 12), (4, 12), (20, 4), (6,)))
    gates, weighed = (x, W_1, W_2, b, 16.0), (x, x, x, w, w, 1e-6, 1e-6, True)
    parts.log_gates(*gates), parts.weigh(*weighed), parts.swiglu(x, W)
    for function, inputs, wrong in (
        (parts.log_gates, gates, {1: "W_1", 2: "W_2", 3: "b"}),
        (parts.weigh, weighed, {1: "far", 2: "near", 4: "w_near"}),
        (parts.swiglu, (x, W), {1: "W"}),
    ):
        for n, name in wrong.items():
            with pytest.raises(ValueError, match=f"^{name}: expected shape"):
                function(*inputs[:n], inputs[n][..., 1:], *inputs[n + 1 :])
    with pytest.raises(ValueError, match="W: expected shape"):
        parts.swiglu(x, W[1:])
    with pytest.raises(ValueError, match="z: expected heads of 5 channels, as w_far has, got 12 channels"):
        parts.weigh(x, x, x, w[1:], w[1:], 1e-6, 1e-6, True)


def test_weigh_refuses_what_it_would_round_or_divide_by_zero():
    x, w = torch.zeros(1, 16, device=FUSED_DEVICE), torch.zeros(16, device=FUSED_DEVICE)
    with pytest.raises(ValueError, match="expected one dtype of z, far and near"):
        parts.weigh(x.bfloat16(), x, x, w, w, 1e-6, 1e-6, True)
    with pytest.raises(ValueError, match="eps_far, eps_near: expected positive numbers, got 1e-06, 0"):
        parts.weigh(x, x, x, w, w, 1e-6, 0.0, True)
    with pytest.raises(ValueError, match=r"w_far: expected the first tensor's device, .*, got meta"):
        parts.weigh(x, x, x, w.to("meta"), w, 1e-6, 1e-6, True)


def test_one_token_alone():
    """`[D]` without a dimension before it."""
    agree(parts.swiglu, swiglu, tensors(0, torch.float32, (12,), (16, 12)))
    agree(parts.log_gates, log_gates, tensors(0, torch.float32, (12,), (4, 12), (20, 4), (20,)), 16.0)
    agree(parts.weigh, weigh, tensors(0, torch.float32, (12,), (12,), (12,), (6,), (6,)), 0.1, 0.2, True)


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(parts, "INTERPRETED", False)
    with pytest.raises(ValueError, match="expected CUDA tensors, got cpu; write it with PyTorch, or move them"):
        parts.swiglu(torch.zeros(1, 16), torch.zeros(32, 16))


def test_the_dtype_of_products_is_autocasts():
    x = torch.zeros(1)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) == F.linear(x.double(), x[None].double()).dtype == torch.float64


# --- in the model ----------------------------------------------------------------------------------------------------

NAMES = {"vig_ref::log_gates", "vig_ref::swiglu", "vig_ref::weigh"}


class Half(torch.nn.Module):
    """What of a block can be one kernel: a mixer, then an MLP. Every number of it is one of its own."""

    def __init__(self, backend="auto", silu=True):
        super().__init__()
        torch.manual_seed(0)
        self.mixer, self.mlp = Mixer(32, 2, silu=silu, backend=backend), SwiGLU(32, 32, backend=backend)
        self.mixer.norm_o.eps, self.mixer.norm_local.eps = 0.1, 0.2
        for p in self.parameters():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 1.0)

    def forward(self, x):
        return self.mlp(self.mixer(x))


def taken(model, dtype=torch.bfloat16, device="cuda"):
    """Which kernels a pass takes, by tensors without numbers, for which a GPU need not be there."""
    with FakeTensorMode(), Results() as results:
        weights = {name: torch.empty(p.shape, device=device, dtype=dtype) for name, p in model.named_parameters()}
        torch.func.functional_call(model, weights, torch.empty(2, 3, 4, 32, device=device, dtype=dtype))
    return NAMES & {name.removesuffix(".default") for name in results.operations}


def test_the_model_takes_them_on_cuda_in_16_bits():
    assert taken(Half()) == taken(Half("fused")) == taken(Half(), torch.float16) == NAMES
    assert taken(Half(), torch.float32) == set()
    assert taken(Half(), device="cpu") == set()
    with FakeTensorMode():
        x = torch.empty(2, 32, device="cuda", dtype=torch.bfloat16)
    assert [one_kernel(x, backend, [], []) for backend in BACKENDS] == [parts, None, None, parts]


def adapted(layer):
    """As adapters and parametrisations do: a class of its own."""
    layer.__class__ = type("Adapter", (type(layer),), {})


def elsewhere(layer):
    layer.forward = layer.forward


def with_another_bias(layer):
    if isinstance(layer, torch.nn.Sequential):
        layer.append(torch.nn.Identity())
    else:
        layer.bias = None if getattr(layer, "bias", None) is not None else torch.nn.Parameter(torch.ones(1))


def sparse(layer):
    for name, p in layer.named_parameters():
        owner, _, name = name.rpartition(".")
        setattr(layer.get_submodule(owner), name, torch.nn.Parameter(p.detach().reshape(len(p), -1).to_sparse()))


def hooked(kind):
    return lambda layer: getattr(layer, f"register_{kind}")(lambda *_: None)


CHANGES = {change.__name__: change for change in (adapted, elsewhere, with_another_bias, sparse)} | {
    kind: hooked(kind) for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
}
LAYERS = {
    "mixer.forget_proj": "log_gates", "mixer.forget_proj.0": "log_gates", "mixer.forget_proj.1": "log_gates",
    "mixer.norm_o": "weigh", "mixer.norm_local": "weigh", "mlp.gate_up_proj": "swiglu",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_as_made_is_called(name, change, monkeypatch):
    """The kernel would not know. What the layers' own `forward` makes of the change does not matter here."""
    model, chosen = Half("fused"), []
    CHANGES[change](model.get_submodule(name))
    monkeypatch.setattr(vig_ref.model, "one_kernel", lambda *a: chosen.append((a, one_kernel(*a))))
    with FakeTensorMode():
        x = torch.empty(2, 12, 32, device="cuda", dtype=torch.bfloat16)
    for function in (model.mixer.log_gates, lambda x: model.mixer.weigh(x, x, x), model.mlp):
        with contextlib.suppress(Exception):
            function(x)
    assert [parts is None for _, parts in chosen] == [k == LAYERS[name] for k in ("log_gates", "weigh", "swiglu")]


def test_norms_may_be_left_out():
    """As chapter 5 does."""
    model = Half("chunked")
    model.mixer.norm_o = model.mixer.norm_local = torch.nn.Identity()
    assert model(torch.zeros(1, 2, 2, 32)).shape == (1, 2, 2, 32)


def test_hooks_of_all_modules_and_tangents_are_for_pytorch():
    made = [[torch.nn.Linear(2, 2)], [(torch.nn.Linear, "weight", "bias")]]
    with FakeTensorMode():
        x = torch.empty(2, 32, device="cuda", dtype=torch.bfloat16)
    assert one_kernel(x, "fused", *made) is parts
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert one_kernel(x, "fused", *made) is None
    handle.remove()
    with torch.autograd.forward_ad.dual_level():
        assert one_kernel(x, "fused", *made) is None
    assert one_kernel(x, "fused", *made) is parts


@interpreted
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_a_block_with_them_is_the_block_without(silu, autocast, monkeypatch):
    """In float32: some hundred roundings one after another. In bfloat16: ten, and PyTorch's own are as many."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 7, 32)
    results = []
    for choose in (lambda *_: None, lambda *_: parts):
        monkeypatch.setattr(vig_ref.model, "one_kernel", choose)
        model = Half("chunked", silu)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().sum().backward()
        results.append([y.detach().float(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= (10 * 2**-8 if autocast else 1e-5) * a.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_they_are_closer_to_float32(dtype, monkeypatch):
    """They round less often than PyTorch's operations do; gradients are off by a few roundings."""
    x = torch.randn(4, 14, 14, 32, device="cuda")

    def results(model, autocast):
        with torch.autocast("cuda", dtype, enabled=autocast):
            y = model(x)
        y.float().square().sum().backward()
        return [y.detach().float(), *(p.grad for p in model.parameters())]

    exact = results(Half("fused").cuda(), autocast=False)
    errors, used = [], set()
    for name in ("log_gates", "swiglu", "weigh"):
        function = getattr(parts, name)
        monkeypatch.setattr(parts, name, lambda *a, name=name, function=function: used.add(name) or function(*a))
    for choose in (vig_ref.model.one_kernel, lambda *_: None):
        monkeypatch.setattr(vig_ref.model, "one_kernel", choose)
        got = results(Half("fused").cuda(), autocast=True)
        assert {g.dtype for g in got} == {torch.float32}
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)])
    assert used == {"log_gates", "swiglu", "weigh"}
    assert errors[0][0] < errors[1][0]
    assert max(errors[0]) <= 8 * UNIT[dtype]


@pytest.mark.gpu
def test_more_than_2_31_numbers():
    """An offset of 32 bits would be negative. 18 GB."""
    rows, V = 2**31 // 64 + 100, 64
    z = torch.zeros(rows, V, dtype=torch.bfloat16, device="cuda")
    far, near, w = z + 0, z + 0, torch.ones(V, device="cuda")
    far[-7:] = 2
    y = parts.weigh(z, far, near, w, w, 1e-6, 1e-6, False)
    assert (y[-7:] == 0.5).all()
    assert not y[:-7].any()
