"""The parts of a block that are one kernel each: against what PyTorch computes, and when the model takes them.

Without a GPU they are interpreted, in float32; with one they are compiled, in every dtype that the model uses them in.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import vig_ref.model
from cases import FUSED_DEVICE, in_red_zone, interpreted
from test_model import Results
from vig_ref import BACKENDS
from vig_ref.fused import parts
from vig_ref.model import Mixer, SwiGLU
from vig_ref.ops import product_dtype

#: Half the distance from 1 to the next number.
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = [torch.float32] if FUSED_DEVICE == "cpu" else list(UNIT)


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
    """Result and gradients, against float64.

    Sums of at most 200 float32 products are off by 200 units of float32, much less on average. In 16 bits two more
    roundings count, that of x W_1 or of the product dz and that of the result; in PyTorch's sum of a bias' gradient,
    and in gradients that go through two products, one more each.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = kernel(*inputs, *numbers), oracle(*exact, *numbers)
    assert got.shape == expected.shape
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(got)
    grads = torch.autograd.grad(got, inputs, dy), torch.autograd.grad(expected, exact, dy.double())
    unit = UNIT[inputs[0].dtype]
    for n, (a, b) in enumerate(((got, expected), *zip(*grads, strict=True))):
        assert a.shape == b.shape
        limit = 200 * UNIT[torch.float32] + (4 if n else 2) * unit * (unit > UNIT[torch.float32])
        assert (a.double() - b).norm() <= limit * b.norm() + 1e-30, n


sizes = st.integers(1, 70)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstPyTorch:
    @given(shape=shapes, D=st.integers(1, 100), R=st.integers(1, 20), N=sizes, seed=st.integers(0, 2**16))
    def test_log_gates(self, dtype, shape, D, R, N, seed):
        inputs = tensors(seed, dtype, (1, *shape, D), (R, D), (N, R), (N,))
        agree(parts.log_gates, log_gates, inputs, 16.0)

    @given(shape=shapes, D=st.integers(1, 100), N=sizes, seed=st.integers(0, 2**16))
    def test_swiglu(self, dtype, shape, D, N, seed):
        agree(parts.swiglu, swiglu, tensors(seed, dtype, (1, *shape, D), (2 * N, D)))

    @given(shape=shapes, H=st.integers(1, 4), V=sizes, silu=st.booleans(), seed=st.integers(0, 2**16))
    def test_weigh(self, dtype, shape, H, V, silu, seed):
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
        x, W, z, far, near = (
            t.detach().mT.contiguous().mT.requires_grad_()
            for t in tensors(0, dtype, (1, 12, 40), (60, 40), *[(2, 9, 24)] * 3)
        )
        agree(parts.swiglu, swiglu, [x, W])
        agree(parts.weigh, weigh, [z, far, near, *tensors(1, torch.float32, (8,), (8,))], 1e-6, 1e-6, True)

    def test_nothing_overflows(self, dtype):
        """Sigmoids of what exp cannot take. Below -87 the kernel's is 0; so small a number is none in float16."""
        z = torch.tensor([1e4, 200.0, 88.0, 30.0, 0.0, -30.0, -88.0, -200.0, -1e4], dtype=dtype, device=FUSED_DEVICE)
        eye = torch.eye(len(z), dtype=dtype, device=FUSED_DEVICE)
        exact = z.double()
        for got, expected in (
            (parts.log_gates(z[None], eye, eye, torch.zeros_like(z), 16.0), F.logsigmoid(exact) / 16),
            (parts.swiglu(z[None], torch.cat([eye, eye / 64])), F.silu(exact) * exact / 64),
            (parts.weigh(z[None], 0 * z[None], z[None], eye[0] + 1, eye[0] + 1, 1e-6, 1e-6, False), None),
        ):
            if expected is not None:
                torch.testing.assert_close(got.double()[0], expected, rtol=4 * UNIT[dtype] + 1e-6, atol=1e-7)
            assert got.isfinite().all()

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
    x, W = tensors(0, torch.float32, (1, 3, 8), (8, 8))
    (dx,) = torch.autograd.grad(parts.swiglu(x, W).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="chunked"):
        dx.sum().backward()


def test_the_dtype_of_products_is_autocasts():
    x = torch.zeros(1)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16


# --- in the model ----------------------------------------------------------------------------------------------------

NAMES = {"vig_ref::log_gates", "vig_ref::swiglu", "vig_ref::weigh"}


class Half(torch.nn.Module):
    """What of a block can be one kernel: a mixer, then an MLP."""

    def __init__(self, backend="auto"):
        super().__init__()
        torch.manual_seed(0)
        self.mixer, self.mlp = Mixer(32, 2, silu=True, backend=backend), SwiGLU(32, 32, backend=backend)
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
    assert [vig_ref.model.one_kernel(x, backend) for backend in BACKENDS] == [parts, None, None, parts]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("mixer.forget_proj", "log_gates"), ("mixer.forget_proj.0", "log_gates"), ("mixer.forget_proj.1", "log_gates"),
        ("mixer.norm_o", "weigh"), ("mixer.norm_local", "weigh"), ("mlp.gate_up_proj", "swiglu"),
    ],
)  # fmt: skip
def test_a_layer_with_a_hook_or_a_substitute_is_called(name, kernel):
    parent, _, child = name.rpartition(".")
    without = NAMES - {f"vig_ref::{kernel}"}
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        model = Half()
        handle = getattr(model.get_submodule(name), f"register_{register}")(lambda *_: None)
        assert taken(model) == without
        handle.remove()
        assert taken(model) == NAMES
    adapted = copy.deepcopy(model.get_submodule(name))
    adapted.__class__ = type("Adapter", (type(adapted),), {})  # as adapters and parametrisations do
    setattr(model.get_submodule(parent), child, adapted)
    assert taken(model) == without


@interpreted
def test_a_block_with_them_is_the_block_without(monkeypatch):
    """In float32: some hundred roundings one after another."""
    x = torch.randn(2, 5, 7, 32)
    results = []
    for choose in (lambda *_: None, lambda *_: parts):
        monkeypatch.setattr(vig_ref.model, "one_kernel", choose)
        model = Half("chunked")
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_they_are_closer_to_float32(dtype, monkeypatch):
    """They round less often than PyTorch's operations do, and parameters keep their gradients in float32."""
    x = torch.randn(4, 14, 14, 32, device="cuda")

    def results(model, autocast):
        with torch.autocast("cuda", dtype, enabled=autocast):
            y = model(x)
        y.float().square().sum().backward()
        return [y.detach().float(), *(p.grad for p in model.parameters())]

    exact = results(Half("fused").cuda(), autocast=False)
    errors = []
    for choose in (vig_ref.model.one_kernel, lambda *_: None):
        monkeypatch.setattr(vig_ref.model, "one_kernel", choose)
        got = results(Half("fused").cuda(), autocast=True)
        assert {g.dtype for g in got} == {torch.float32}
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)])
    assert errors[0][0] < errors[1][0]
    assert max(errors[0]) <= 1.1 * max(errors[1])
