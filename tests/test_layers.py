"""The three layers compute one function: results and gradients against the float64 oracle, under one tolerance."""

import functools
import inspect

import pytest
import torch
from hypothesis import currently_in_test_context, example, given, target
from hypothesis import strategies as st

from cases import CHUNK, FLOAT32, FLOAT64, LAYERS, VARIANTS, Case, Inputs, cases, device_of
from vig_ref import bidirectional_gla, chunked, gla, naive
from vig_ref.tolerance import (
    NAMES,
    REGIMES,
    RMS_LIMIT,
    bounds,
    draw,
    evaluate,
    reference,
    rms_kind,
    rms_ratios,
    worst_ratios,
)

#: Every regime at one token and at a ragged length, with K and V off any tile, and each layout once.
HARD = [Case(regime=regime, T=T, K=17, V=3, H=1) for regime in sorted(REGIMES) for T in (1, 49)] + [
    Case(T=33, layout=layout, gradient_layout=gradient_layout)
    for layout, gradient_layout in [
        ("heads_last", "expanded"), ("one_of_three", "heads_last"), ("every_second", "every_second"),
        ("features_first", "offset_by_one"), ("offset_by_one", "features_first"), ("expanded", "one_of_three"),
    ]
] + [Case(B=2, H=2, T=18, K=3, V=70, scale=-0.5)]  # fmt: skip


def check(function, x: Inputs, *, scale: float, chunk: int, dot: str = "ieee", **options):
    """Every element within the bound, and every tensor within its RMS limit."""
    before = [t.clone() for t in x]
    got = evaluate(function, x, scale=scale, **options)
    ratios = worst_ratios(got, x, scale=scale, chunk=chunk, dot=dot)
    if currently_in_test_context():
        target(max(ratios.values()), label="error / bound")
    assert max(ratios.values()) <= 1, ratios
    rms = rms_ratios(got, reference(x, scale=scale), RMS_LIMIT[rms_kind(x, dot)])
    assert max(rms.values()) <= 1, rms
    for name, tensor in zip(NAMES, (x.v, *x[:5]), strict=True):
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype)
    assert all(torch.equal(*pair) for pair in zip(before, x, strict=True)), "an input was written to"


def on_hard_cases(test):
    return functools.reduce(lambda test, case: example(case=case)(test), HARD, test)


@pytest.mark.parametrize(("layer", "how"), VARIANTS, ids=str)
@on_hard_cases
@given(case=cases)
def test_layer_equals_the_oracle(layer, how, case):
    x = case.inputs(how.dtype, device_of(layer))
    function, chunk = LAYERS[layer].bidirectional_gla, CHUNK[layer]
    check(function, x, scale=case.scale_value, chunk=chunk, dot=how.dot, **how.options)


@given(case=cases, how=st.sampled_from([FLOAT32, FLOAT64]), chunk_size=st.integers(1, 140))
def test_chunked_with_any_chunk_size(case, how, chunk_size):
    x = case.inputs(how.dtype)
    check(chunked.bidirectional_gla, x, scale=case.scale_value, chunk=chunk_size, chunk_size=chunk_size)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layer", ["chunked", "fused"])
@given(case=cases)
def test_one_direction_equals_the_oracle(layer, reverse, case):
    """Resetting the gates of one scan leaves of it the token itself: what remains of the mean is the other scan."""
    x = case.inputs(torch.float32, device_of(layer))
    none = torch.full_like(x.g_fwd, -torch.inf)
    x = x._replace(g_fwd=none) if reverse else x._replace(g_rev=none)

    def from_one_direction(q, k, v, g_fwd, g_rev, *, scale):
        g, unused = (g_rev, g_fwd) if reverse else (g_fwd, g_rev)
        itself = scale * (q * k).sum(-1, keepdim=True) * v
        o = gla(q, k, v, g, reverse=reverse, scale=scale, backend=layer)
        return (o + itself) / 2 + torch.exp(unused).sum()  # exp(-inf) = 0: connects the unused gate

    check(from_one_direction, x, scale=case.scale_value, chunk=CHUNK[layer])


@pytest.mark.parametrize("layer", LAYERS)
@given(wanted=st.sets(st.sampled_from(range(5)), min_size=1), seed=st.integers(0, 99))
def test_every_subset_of_requires_grad(layer, wanted, seed):
    x = draw(1, 2, 18, 3, 4, seed=seed, device=device_of(layer))
    expected = reference(x, scale=0.5)
    bound = bounds(x, expected, scale=0.5, chunk=CHUNK[layer])
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(x[:5])]
    o = bidirectional_gla(*leaves, scale=0.5, backend=layer)
    o.backward(x.do)
    for n, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (n in wanted)
        if n in wanted:
            name = NAMES[n + 1]
            assert ((leaf.grad - expected[name]).abs() <= bound[name]).all()


@pytest.mark.parametrize("layer", ["naive", "chunked"])
@pytest.mark.parametrize("T", [1, 5, 11])
def test_gradcheck(layer, T):
    """First and second derivatives against finite differences."""
    x = draw(1, 2, T, 2, 3, regime="moderate", dtype=torch.float64)
    leaves = [t.requires_grad_() for t in x[:5]]
    function = lambda *t: bidirectional_gla(*t, backend=layer)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("layer", LAYERS)
def test_first_gate_of_each_scan_has_no_gradient(layer):
    x = draw(2, 2, 37, 5, 3, regime="moderate", device=device_of(layer))
    got = evaluate(bidirectional_gla, x, backend=layer)
    assert (got["dg_fwd"][:, :, 0] == 0).all()
    assert (got["dg_rev"][:, :, -1] == 0).all()
    assert (got["dg_fwd"][:, :, 1] != 0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_token_sees_itself_with_weight_one(layer):
    """The two halves of the mean meet on the diagonal: a single token gives scale (q . k) v, not half of it."""
    values = (1.0, 2.0, 3.0, -1.0, -1.0, 0.0)
    x = Inputs(*(torch.full((1, 1, 1, 4), value, device=device_of(layer)) for value in values))
    o = bidirectional_gla(*x[:5], scale=0.5, backend=layer)
    assert (o == 0.5 * (4 * 1.0 * 2.0) * 3.0).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_first_token_reaches_the_last_and_back(layer):
    x = draw(1, 1, 130, 4, 4, regime="keep", device=device_of(layer))
    for here, there in ((0, 129), (129, 0)):
        do = torch.zeros_like(x.do)
        do[:, :, here] = 1
        assert (evaluate(bidirectional_gla, x._replace(do=do), backend=layer)["dk"][:, :, there] != 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)], ids=["B=0", "H=0", "T=0"])
@pytest.mark.parametrize("layer", LAYERS)
def test_empty(layer, shape):
    got = [torch.zeros(*shape, D, requires_grad=True, device=device_of(layer)) for D in (3, 3, 4, 3, 3)]
    o = bidirectional_gla(*got, backend=layer)
    assert o.shape == (*shape, 4)
    o.sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_gates_with_half_precision_inputs(layer):
    """Mixed precision gives back the dtypes that came: o as v, gradients as their tensors."""
    x = draw(1, 2, 20, 4, 4, dtype=torch.float16, gate_dtype=torch.float32, device=device_of(layer))
    got = evaluate(bidirectional_gla, x, backend=layer)
    assert [got[name].dtype for name in NAMES] == [torch.float16] * 4 + [torch.float32] * 2


def test_layers_export_the_same_functions():
    """One signature; what a layer adds is keyword-only, has a default, and comes last."""
    for name in ("bidirectional_gla", "gla"):
        common = list(inspect.signature(getattr(naive, name)).parameters.values())
        for layer in LAYERS.values():
            parameters = list(inspect.signature(getattr(layer, name)).parameters.values())
            assert parameters[: len(common)] == common
            for extra in parameters[len(common) :]:
                assert extra.kind is extra.KEYWORD_ONLY
                assert extra.default is not extra.empty
