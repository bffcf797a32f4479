"""Checkers of chapter 8, how to trust a kernel, and answers that look right and are not."""

import inspect
import random
import types
from fractions import Fraction

import torch

from exercises import NotYet, exercise, expect, wrong
from vig_ref import chunked, naive, tolerance
from vig_ref.chunked import chunks


def plant(*edits):
    """A copy of the chunked layer's source, as a module of its own, with edits (old, new) in it."""
    source = inspect.getsource(chunks)
    for old, new in edits:
        assert source.count(old) == 1, f"expected once in chunks.py, found {source.count(old)} times: {old}"
        source = source.replace(old, new)
    planted = types.ModuleType("planted")
    exec(compile(source, "planted", "exec"), planted.__dict__)
    return planted


def _draw(regime: str = "moderate", seed: int = 0, T: int = 20) -> tolerance.Inputs:
    return tolerance.draw(1, 2, T, 3, 4, regime=regime, seed=seed, dtype=torch.float64)


@exercise
def gauge(answer):
    for regime, scale in (("moderate", 0.5), ("keep", 0.5), ("reset", -0.5)):
        q, k, v, g_fwd, g_rev, _ = _draw(regime)
        want = naive.bidirectional_gla(q.abs(), k.abs(), v.abs(), g_fwd, g_rev, scale=abs(scale))
        what = f"gauge of o with {regime} gates and scale {scale}"
        signed = naive.bidirectional_gla(q.abs(), k.abs(), v.abs(), g_fwd, g_rev, scale=scale)
        gates = naive.bidirectional_gla(q.abs(), k.abs(), v.abs(), g_fwd.abs(), g_rev.abs(), scale=abs(scale))
        o = naive.bidirectional_gla(q, k, v, g_fwd, g_rev, scale=scale)
        expect(answer(q, k, v, g_fwd, g_rev, scale), want, what, likely={
            "that is |o|. The gauge adds magnitudes up *before* they cancel.": o.abs(),
            "that is o itself.": o,
            "v still has its signs.": naive.bidirectional_gla(q.abs(), k.abs(), v, g_fwd, g_rev, scale=abs(scale)),
            "a gate is not a term of the sum but a factor; |g| would be a log gate above 0.": gates,
            **({"negative. The scale has a sign too.": signed} if scale < 0 else {}),
        })  # fmt: skip


@wrong(gauge, "takes the magnitude of the result", says="before\\* they cancel")
def _(q, k, v, g_fwd, g_rev, scale):
    return naive.bidirectional_gla(q, k, v, g_fwd, g_rev, scale=scale).abs()


@wrong(gauge, "forgets v", says="v still has its signs")
def _(q, k, v, g_fwd, g_rev, scale):
    return naive.bidirectional_gla(q.abs(), k.abs(), v, g_fwd, g_rev, scale=abs(scale))


@wrong(gauge, "takes the magnitude of the gates as well", says="a gate is not a term")
def _(q, k, v, g_fwd, g_rev, scale):
    return naive.bidirectional_gla(*(t.abs() for t in (q, k, v, g_fwd, g_rev)), scale=abs(scale))


@wrong(gauge, "forgets the sign of the scale", says="scale has a sign")
def _(q, k, v, g_fwd, g_rev, scale):
    return naive.bidirectional_gla(q.abs(), k.abs(), v.abs(), g_fwd, g_rev, scale=scale)


@exercise
def o_by_pairs(answer):
    r = random.Random(0)
    for resets in (0, 3):
        q, k, v, alpha = ([Fraction(r.randint(1, 9), r.randint(1, 9)) for _ in range(7)] for _ in range(4))
        alpha[3:resets + 1] = [Fraction(0)] * max(0, resets - 2)
        S, want = Fraction(0), []
        for t in range(7):
            S = alpha[t] * S + k[t] * v[t]
            want.append(q[t] * S)
        where = "with a reset at token 3" if resets else "with open gates"
        try:
            got = answer(q, k, v, alpha)
        except ZeroDivisionError:
            message = f"{where}, it divides by 0. Multiply the gates between j and i; no quotient can do that."
            raise NotYet(message) from None
        if not isinstance(got, list) or len(got) != 7:
            raise NotYet(f"expected a list with 7 results, one a token, got {type(got).__name__}.")
        if any(isinstance(x, float) for x in got):
            raise NotYet("there is a float among the results. A Fraction stays one among Fractions and integers only.")
        _first_difference(got, want, q, k, v, where)


def _first_difference(got, want, q, k, v, where):
    for i, (mine, right) in enumerate(zip(got, want, strict=True)):
        if mine != right:
            own = q[i] * k[i] * v[i]
            hint = " Does a token read itself, with no gate at all?" if i == 0 or mine == right - own else (
                " Which gates does a pair pass: those after j, up to and with i.")
            raise NotYet(f"{where}, token {i}: expected {right}, got {mine}. Exactly equal is what is asked.{hint}")


def _pairs(q, k, v, weight):
    return [sum((q[i] * k[j] * v[j] * weight(i, j) for j in range(i + 1)), Fraction(0)) for i in range(len(q))]


def _product(numbers):
    p = Fraction(1)
    for n in numbers:
        p *= n
    return p


@wrong(o_by_pairs, "divides cumulative products", says="divides by 0")
def _(q, k, v, alpha):
    return _pairs(q, k, v, lambda i, j: _product(alpha[: i + 1]) / _product(alpha[: j + 1]))


@wrong(o_by_pairs, "fades a token's own pair", says="read itself")
def _(q, k, v, alpha):
    return _pairs(q, k, v, lambda i, j: _product(alpha[j : i + 1]))


@wrong(o_by_pairs, "leaves the reader's gate out", says="up to and with i")
def _(q, k, v, alpha):
    return _pairs(q, k, v, lambda i, j: _product(alpha[j + 1 : i]))


@wrong(o_by_pairs, "turns to floating point", says="float")
def _(q, k, v, alpha):
    return [float(x) for x in _pairs(q, k, v, lambda i, j: _product(alpha[j + 1 : i + 1]))]


_SWAP = ("q, k, v, g_fwd, g_rev = (x.to(wide)", "q, k, v, g_rev, g_fwd = (x.to(wide)")


@exercise
def directions_are_right(answer):
    right = {"naive": naive.bidirectional_gla, "chunked": chunked.bidirectional_gla}
    for seed in range(3):
        for regime in ("moderate", "vig"):
            x = _draw(regime, seed)
            for name, operator in right.items():
                if not answer(operator, *x[:5]):
                    raise NotYet(
                        f"the {name} layer is right, and your law says that it is not (gates: {regime}). Are the gates "
                        "of one scan closed, and are those tokens compared that the other cannot have met?"
                    )
            if answer(plant(_SWAP).bidirectional_gla, *x[:5]):
                raise NotYet(
                    f"your law lets an operator pass whose gates are swapped (gates: {regime}). What holds for both "
                    "orders of the gates cannot tell them apart: treat g_fwd and g_rev differently."
                )


@wrong(directions_are_right, "is the law of time reversal, which holds for swapped gates too", says="swapped")
def _(operator, q, k, v, g_fwd, g_rev):
    mirrored = operator(*(t.flip(2) for t in (q, k, v, g_rev, g_fwd)), scale=0.5).flip(2)
    return torch.allclose(operator(q, k, v, g_fwd, g_rev, scale=0.5), mirrored)


@wrong(directions_are_right, "believes everything", says="swapped")
def _(operator, q, k, v, g_fwd, g_rev):
    return True


@wrong(directions_are_right, "closes the gates of the wrong scan", says="layer is right")
def _(operator, q, k, v, g_fwd, g_rev):
    closed, later = torch.full_like(g_fwd, -torch.inf), k.clone()
    later[:, :, -1] += 1
    one, two = (operator(q, key, v, closed, g_rev, scale=0.5) for key in (k, later))
    return torch.equal(one[:, :, :-1], two[:, :, :-1])


#: The log decay over a chunk as a mean times a length. Right, unless the chunk was padded.
MEAN_TIMES_LENGTH = ("total = g.sum(-2)[..., None]", "total = C * g.mean(-2)[..., None]")


@exercise
def a_call_that_shows_it(answer):
    call = answer()
    if not isinstance(call, dict) or set(call) != {"T", "chunk_size"}:
        raise NotYet("expected a dictionary with the two keys T and chunk_size, as dict(T=..., chunk_size=...).")
    T, C = call["T"], call["chunk_size"]
    if not all(isinstance(n, int) and 1 <= n <= 500 for n in (T, C)):
        raise NotYet("expected whole numbers from 1 to 500 for T and chunk_size.")
    x = _draw("vig", T=T)
    got = plant(MEAN_TIMES_LENGTH).bidirectional_gla(*x[:5], scale=0.5, chunk_size=C)
    expected = naive.bidirectional_gla(*x[:5], scale=0.5)
    if torch.allclose(got, expected, rtol=1e-10, atol=1e-10):
        length, N = min(C, T), -(-T // C)
        raise NotYet(f"T = {T} and chunk_size = {C}: the result is right, since " + (
            f"chunks of {length} tokens are a power of two long, so that nothing is padded."
            if length & (length - 1) == 0
            else f"there {'are two chunks' if N == 2 else 'is one chunk'} only: no state that is read has crossed one."
        ))  # fmt: skip


@wrong(a_call_that_shows_it, "tries the default chunk at a length that it does not divide", says="power of two")
def _():
    return dict(T=100, chunk_size=64)


@wrong(a_call_that_shows_it, "has one chunk", says="one chunk only")
def _():
    return dict(T=24, chunk_size=64)


@wrong(a_call_that_shows_it, "has two chunks", says="two chunks only")
def _():
    return dict(T=48, chunk_size=24)


@wrong(a_call_that_shows_it, "gives a number", says="dictionary")
def _():
    return 48
