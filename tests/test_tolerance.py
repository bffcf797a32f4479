"""The bound itself: it lets rounding pass, and nothing else."""

import pytest
import torch

from vig_ref import naive
from vig_ref.tolerance import (
    DOT_UNIT,
    NAMES,
    REGIMES,
    RMS_LIMIT,
    Inputs,
    bounds,
    draw,
    evaluate,
    reference,
    rms_ratios,
    worst_ratios,
)  # fmt: skip

SHAPE = (1, 2, 40, 6, 5)


def ratios(got, x, dot="ieee"):
    return worst_ratios(got, x, scale=0.5, chunk=16, dot=dot)


@pytest.mark.parametrize("regime", ["vig", "moderate", "reset", "keep"])
@pytest.mark.parametrize("name", NAMES)
def test_one_percent_is_seen_elementwise(name, regime):
    """A result scaled by 0.99 exceeds the float32 bound a thousand times, and the float64 one a million times."""
    for dtype, least in ((torch.float32, 1e3), (torch.float64, 1e6)):
        x = draw(*SHAPE, regime=regime, dtype=dtype)
        got = evaluate(naive.bidirectional_gla, x, scale=0.5)
        got[name] = got[name] * 0.99
        assert ratios(got, x)[name] > least
        assert all(ratio <= 1 for other, ratio in ratios(got, x).items() if other != name)


@pytest.mark.parametrize("kind", RMS_LIMIT)
@pytest.mark.parametrize("name", NAMES)
def test_one_percent_is_seen_in_the_rms(name, kind):
    """Also with bfloat16, where one element alone may legitimately be off by more."""
    exact = reference(draw(*SHAPE, dtype=torch.float64), scale=0.5)
    got = exact | {name: exact[name] * 0.99}
    assert rms_ratios(got, exact, RMS_LIMIT[kind])[name] > 1
    assert rms_ratios(exact, exact, RMS_LIMIT[kind])[name] == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_never_pass(wrong):
    x = draw(*SHAPE)
    got = evaluate(naive.bidirectional_gla, x, scale=0.5)
    got["dk"][0, 1, 2, 3] = wrong
    assert ratios(got, x, "bfloat16")["dk"] == torch.inf
    assert rms_ratios(got, reference(x, scale=0.5), 1e-3)["dk"] == torch.inf


def test_few_tokens_are_left_to_the_elementwise_bound():
    """One token has one score. Where that cancels, rounding its operands exceeds the limit, but not the bound."""
    x = draw(1, 1, 1, 17, 3, regime="keep")
    rounded = x._replace(q=x.q.half().float(), k=x.k.half().float())  # as tf32 would: 11 bits
    got, exact = evaluate(naive.bidirectional_gla, rounded, scale=0.5), reference(x, scale=0.5)
    assert (got["o"] - exact["o"]).norm() > 2**-11 * exact["o"].norm()
    assert ratios(got, x, "tf32")["o"] <= 1
    assert rms_ratios(got, exact, 1e-9)["o"] == 0
    got["o"][..., 0] = torch.nan
    assert rms_ratios(got, exact, 1e-9)["o"] == torch.inf


def test_one_wrong_element_is_seen():
    x = draw(*SHAPE)
    got = evaluate(naive.bidirectional_gla, x, scale=0.5)
    got["o"][0, 0, 17, 2] += 1e-3
    assert ratios(got, x)["o"] > 1


def test_swapped_gates_are_seen():
    """The two directions differ by their gates alone, which are close to one another: a bound on averages misses it."""
    x = draw(*SHAPE)
    got = evaluate(naive.bidirectional_gla, x._replace(g_fwd=x.g_rev, g_rev=x.g_fwd), scale=0.5)
    assert ratios(got, x)["o"] > 1e3


def textbook_gate_gradients(x, scale):
    """dg[t] as the sum of q dq - k dk over all tokens that a scan meets from t on, which it is in exact arithmetic."""
    found = {}
    for name, g, reverse in (("dg_fwd", x.g_fwd, False), ("dg_rev", x.g_rev, True)):
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k)]
        o = naive.gla(*leaves, x.v, g, reverse=reverse, scale=scale / 2)
        dq, dk = torch.autograd.grad(o, leaves, x.do)
        terms = x.q * dq - x.k * dk
        found[name] = terms.cumsum(2) if reverse else terms.flip(2).cumsum(2).flip(2)
    return found


def test_the_textbook_gate_gradient_exceeds_the_bound():
    """Under strong gates it cancels what a chunk never adds up. With the gauge of the whole sequence it would pass."""
    x = draw(1, 2, 160, 6, 5, regime="strong")
    x64 = Inputs(*(t.double() for t in x))
    exact = reference(x, scale=0.5)
    for name, value in textbook_gate_gradients(x64, 0.5).items():
        torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-12)
    got = evaluate(naive.bidirectional_gla, x, scale=0.5)
    assert max(ratios(got, x).values()) <= 1
    wrong = got | textbook_gate_gradients(x, 0.5)
    by_chunk, by_sequence = ratios(wrong, x), worst_ratios(wrong, x, scale=0.5, chunk=160)
    for name in ("dg_fwd", "dg_rev"):
        assert by_chunk[name] > 5
        assert by_sequence[name] < 0.1


@pytest.mark.parametrize("regime", REGIMES)
def test_the_oracle_stands_within_its_own_bound(regime):
    x = draw(*SHAPE, regime=regime, dtype=torch.float64)
    assert max(ratios(reference(x, scale=0.5), x).values()) == 0


def test_bounds_grow_with_the_roundoff_of_the_products():
    x = draw(*SHAPE)
    exact = reference(x, scale=0.5)
    sizes = [bounds(x, exact, scale=0.5, chunk=16, dot=dot)["o"].sum() for dot in ("ieee", "tf32", "bfloat16")]
    assert sizes[0] * 100 < sizes[1] < sizes[2]
    assert list(DOT_UNIT) == ["ieee", "tf32", "float16", "bfloat16"]


def test_draws_are_a_function_of_the_seed():
    assert all(torch.equal(a, b) for a, b in zip(draw(*SHAPE, seed=3), draw(*SHAPE, seed=3), strict=True))
    assert not torch.equal(draw(*SHAPE, seed=3).q, draw(*SHAPE, seed=4).q)


@pytest.mark.parametrize("regime", REGIMES)
def test_gates_of_every_regime_keep_the_contract(regime):
    x = draw(*SHAPE, regime=regime)
    assert all((g <= 0).all() for g in (x.g_fwd, x.g_rev))
