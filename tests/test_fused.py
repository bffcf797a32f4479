"""What only the Triton layer promises: its registration, its refusals, its memory discipline, its compilation."""

import os
import re
import subprocess
import sys

import pytest
import torch

from cases import FUSED_ARITHMETIC, FUSED_DEVICE, interpreted
from vig_ref import bidirectional_gla, fused, gla, resolve_backend
from vig_ref.fused import launch
from vig_ref.tolerance import NAMES, RMS_LIMIT, draw, evaluate

INTERPRETED = FUSED_DEVICE == "cpu"


def inputs(T=20, K=5, V=7, **options):
    return draw(1, 2, T, K, V, device=FUSED_DEVICE, **options)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch 2.15's own, which it only hides
@pytest.mark.parametrize(
    ("directions", "tokens", "many"),
    [("both", 256, 128), ("fwd", 256, 128), ("rev", 256, 128), ("both", 32, 128), ("both", 32, 1)],
)
def test_opcheck(monkeypatch, directions, tokens, many):
    """The registration with PyTorch: schema, autograd, fake tensors, and tracing by torch.compile; T is 40."""
    monkeypatch.setattr(launch, "SEGMENT", tokens)
    monkeypatch.setattr(launch, "MANY", many)
    q, k, v, g_fwd, g_rev = (t.requires_grad_() for t in inputs(T=40)[:5])
    gates = {"both": (g_fwd, g_rev), "fwd": (g_fwd, None), "rev": (None, g_rev)}[directions]
    torch.library.opcheck(launch._forward, (q, k, v, *gates, 0.5, "ieee"))


def test_compiled_model_has_no_graph_break():
    x = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(*tensors):
        return gla(*tensors[:4], backend="fused") + bidirectional_gla(*tensors, backend="fused")

    expected = gla(*x[:4], backend="fused") + bidirectional_gla(*x[:5], backend="fused")
    assert torch.equal(function(*x[:5]), expected)


@pytest.mark.parametrize("how", FUSED_ARITHMETIC, ids=str)
def test_runs_are_bitwise_equal(how):
    x = inputs(T=37, K=17, V=70, dtype=how.dtype)
    first = evaluate(fused.bidirectional_gla, x, scale=0.5, **how.options)
    for _ in range(2 if INTERPRETED else 200):
        again = evaluate(fused.bidirectional_gla, x, scale=0.5, **how.options)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_neighbours_in_a_batch_do_not_matter():
    """Bitwise the same result alone and in a batch."""
    x = draw(3, 2, 21, 5, 7, device=FUSED_DEVICE)
    whole = evaluate(bidirectional_gla, x, backend="fused")
    alone = evaluate(bidirectional_gla, type(x)(*(t[1:2] for t in x)), backend="fused")
    assert all(torch.equal(whole[name][1:2], alone[name]) for name in NAMES)


INSIDE = (slice(1, -1),) * 4


def framed(x, value):
    """A view of the values of x with one row of `value` on every side, and the whole memory."""
    memory = x.new_full([size + 2 for size in x.shape], value)
    return memory[INSIDE].copy_(x), memory


@pytest.mark.parametrize("V", [7, 70], ids=["one block of V", "two blocks of V"])
def test_memory_around_the_tensors_is_neither_read_nor_written(monkeypatch, V):
    """Inputs lie inside NaN. Results lie inside a canary and start as NaN, as all scratch memory does in any test."""
    x = inputs(T=21, V=V)
    expected = evaluate(bidirectional_gla, x, backend="fused")
    canary, results = 12345.0, []

    def empty(t):
        inside, memory = framed(torch.full_like(t, torch.nan), canary)
        results.append(memory)
        return inside

    monkeypatch.setattr(launch, "_empty", empty)
    got = evaluate(bidirectional_gla, type(x)(*(framed(t, torch.nan)[0] for t in x)), backend="fused")
    assert len(results) == 6
    for name, memory in zip(NAMES, results, strict=True):
        assert torch.equal(got[name], expected[name])
        memory[INSIDE] = canary
        assert (memory == canary).all()


def test_nothing_depends_on_the_result():
    """Autograd then has no gradient to hand on, and wants none back."""
    q, *others = (t.requires_grad_() for t in inputs()[:5])
    _, S_enter = launch._forward(q, *others, 0.5, "ieee")
    assert torch.autograd.grad(S_enter.sum(), q, allow_unused=True) == (None,)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
def test_forward_mode_is_refused():
    """PyTorch knows no tangent of a custom operator, and would go on with zeros."""
    q, *others = inputs()[:5]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; choose backend='chunked' or 'naive'"):
        torch.func.jvp(lambda q: bidirectional_gla(q, *others, backend="fused"), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        assert bidirectional_gla(q, *others, backend="fused").isfinite().all()  # none is asked for


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_of_the_backward_pass_is_refused():
    q, *others = inputs()[:5]
    o = bidirectional_gla(q.requires_grad_(), *others, backend="fused")
    with torch.autograd.forward_ad.dual_level():
        do = torch.autograd.forward_ad.make_dual(torch.ones_like(o), torch.ones_like(o))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; choose backend="):
            torch.autograd.grad(o, q, do)


def test_an_amd_gpu_is_refused(monkeypatch):
    """Where kernels are compiled; the interpreter runs anywhere."""
    monkeypatch.setattr(torch.version, "hip", "6.2")
    if launch.INTERPRETED:
        bidirectional_gla(*inputs()[:5], backend="fused")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: torch.device("cuda")))
    with pytest.raises(ValueError, match="backend 'fused' is written for NVIDIA GPUs, got an AMD one; choose"):
        bidirectional_gla(*inputs()[:5], backend="fused")
    assert resolve_backend("auto", "cuda") == "chunked"


def test_without_values_gradients_are_zero():
    """`vig_ref.gla` refuses V = 0; called directly, this layer must not give back memory as it found it."""
    q, k, _, g = (t.requires_grad_() for t in inputs()[:4])
    o = fused.gla(q, k, q.new_empty(*q.shape[:3], 0), g, reverse=False, scale=1.0)
    assert all((dx == 0).all() for dx in torch.autograd.grad(o.sum(), (q, k, g)))


def test_double_backward_is_refused():
    leaves = [t.requires_grad_() for t in inputs()[:5]]
    o = bidirectional_gla(*leaves, backend="fused")
    (dq,) = torch.autograd.grad(o.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; choose backend='chunked' or 'naive'"):
        dq.sum().backward()


@pytest.mark.parametrize("which", ["q, x, x", "x, x, x"])
def test_one_tensor_in_several_places(which):
    """k is v, or all three are: every gradient still has memory of its own, also with two blocks of V."""
    x = draw(2, 1, 5, 70, 70, regime="moderate", device=FUSED_DEVICE)
    grads = []
    for backend in ("naive", "fused"):
        q, same = x.q.clone().requires_grad_(), x.k.clone().requires_grad_()
        o = bidirectional_gla(same if which == "x, x, x" else q, same, same, x.g_fwd, x.g_rev, backend=backend)
        o.backward(x.do)
        grads.append(same.grad)
    assert (grads[0] - grads[1]).norm() <= RMS_LIMIT["ieee, strong gates"] * grads[0].norm()


def test_unknown_precision():
    with pytest.raises(ValueError, match=re.escape("unknown precision 'fast'; choose one of ('ieee', 'tf32')")):
        fused.bidirectional_gla(*inputs()[:5], scale=1.0, precision="fast")


@interpreted
def test_the_interpreter_has_one_precision():
    with pytest.raises(ValueError, match="'tf32' needs a GPU; Triton's interpreter multiplies as 'ieee' only"):
        fused.bidirectional_gla(*inputs()[:5], scale=1.0, precision="tf32")


def test_k_too_large():
    with pytest.raises(ValueError, match="takes K up to 128, got 129; choose backend='chunked' or 'naive'"):
        bidirectional_gla(*inputs(T=1, K=129)[:5], backend="fused")


@interpreted
def test_cpu_tensors_are_refused_without_the_interpreter():
    code = """if True:
        import torch, vig_ref
        x = torch.zeros(1, 1, 2, 3)
        vig_ref.gla(x, x, x, x, backend="fused")
    """
    got = run(code)
    assert "ValueError: backend 'fused' needs CUDA tensors, got cpu; choose backend='chunked' or 'naive'" in got.stderr


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, where Triton compiles instead of interpreting."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
