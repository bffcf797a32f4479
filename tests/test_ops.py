"""The contract: what is refused, with which words, and how a layer is chosen."""

import re

import pytest
import torch

from cases import LAYERS, device_of
from vig_ref import BACKENDS, bidirectional_gla, gla, resolve_backend
from vig_ref.tolerance import NAMES, draw, evaluate

GOOD = dict(q=(2, 3, 5, 4), k=(2, 3, 5, 4), v=(2, 3, 5, 6), g_fwd=(2, 3, 5, 4), g_rev=(2, 3, 5, 4))


def call(backend="naive", scale=None, **changed):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | changed
    return bidirectional_gla(**arguments, scale=scale, backend=backend)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": [1.0]}, TypeError, "k: expected a torch.Tensor, got list"),
        ({"q": torch.zeros(2, 3, 5, 4).long()}, TypeError, "q: expected float64, float32, float16 or bfloat16, got torch.int64"),
        ({"v": torch.zeros(2, 3, 5)}, ValueError, "v: expected 4 dimensions [B, H, T, V], got [2, 3, 5]"),
        ({"k": torch.zeros(2, 3, 5, 3)}, ValueError, "k: expected the shape of q [B, H, T, K] = [2, 3, 5, 4], got [2, 3, 5, 3]"),
        ({"g_rev": torch.zeros(2, 3, 6, 4)}, ValueError, "g_rev: expected the shape of q [B, H, T, K] = [2, 3, 5, 4]"),
        ({"v": torch.zeros(2, 3, 4, 6)}, ValueError, "v: expected [B, H, T] = [2, 3, 5] as in q, then V; got [2, 3, 4, 6]"),
        ({"v": torch.zeros(2, 3, 5, 0)}, ValueError, "expected K and V of at least 1, got K=4 and V=0"),
        ({"v": torch.zeros(2, 3, 5, 6).double()}, ValueError, "v: expected the dtype of q, torch.float32, got torch.float64"),
        ({"g_fwd": torch.zeros(2, 3, 5, 4).half()}, ValueError, "g_fwd: expected torch.float32 or the dtype of q, torch.float32"),
        ({"g_fwd": torch.zeros(2, 3, 5, 4).double()}, ValueError, "g_fwd: expected torch.float32 or the dtype of q"),
        ({"g_fwd": torch.zeros(2, 3, 5, 4, device="meta")}, ValueError, "g_fwd: expected the device of q, cpu, got meta"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale: expected a number or None, got a Tensor; multiply q by it instead"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number or None (K ** -0.5), got nan"),
        ({"scale": "1"}, TypeError, "scale: expected a real number or None (K ** -0.5), got '1'"),
        ({"k": torch.zeros(2, 3, 5, 4).to_sparse()}, TypeError, "k: expected a dense tensor, got torch.sparse_coo; convert it"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'; choose one of ('auto', 'naive', 'chunked', 'fused')"),
    ],
)  # fmt: skip
def test_refused(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(**changed)


def test_float64_needs_float64_gates():
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in GOOD.items()}
    with pytest.raises(ValueError, match=re.escape("g_rev: expected torch.float64, got torch.float32")):
        call(**(tensors | {"g_rev": torch.zeros(GOOD["g_rev"])}))


def test_gla_checks_its_gate():
    q, v = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=re.escape("g: expected the shape of q")):
        gla(q, q, v, v, backend="naive")


def test_auto_says_what_it_takes():
    assert resolve_backend("auto", "cpu") == "chunked"
    assert resolve_backend("auto", "cuda") == "fused"
    assert [resolve_backend(name, "cuda") for name in BACKENDS[1:]] == list(BACKENDS[1:])


@pytest.mark.parametrize("scale", [None, 1, 1.0, 0.02, 2.0])
def test_scale_means_what_it_says(scale):
    """`None` is K ** -0.5 and an integer 1 is a number like any other."""
    tensors = {name: torch.ones(shape) for name, shape in GOOD.items() if name[0] != "g"}
    expected = call(scale=1.0, **tensors) * (4**-0.5 if scale is None else scale)
    torch.testing.assert_close(call(scale=scale, **tensors), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_tokens_have_empty_gradients(layer, gate_dtype):
    """All five, each in the shape and dtype of its input."""
    x = draw(1, 2, 0, 3, 4, dtype=torch.float16, gate_dtype=gate_dtype, device=device_of(layer))
    got = evaluate(bidirectional_gla, x, backend=layer)
    expected = dict(zip(NAMES, (x.v, *x[:5]), strict=True))
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}


def test_chunk_size_of_zero():
    from vig_ref import chunked

    x = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1 token, got 0"):
        chunked.gla(x, x, x, x, reverse=False, scale=1.0, chunk_size=0)
