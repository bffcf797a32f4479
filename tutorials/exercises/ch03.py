"""Checkers of chapter 3. They need no Triton: other chapters, which run without it, import this module too."""

import os

import torch

import vig_ref
from exercises import NotYet, exercise, expect, wrong
from vig_ref import tolerance

# --- 1 ---------------------------------------------------------------------------------------------------------------


def _tensors(T, seed):
    """CPU tensors in the interpreter, CUDA tensors where kernels are compiled."""
    compiled = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    x = tolerance.draw(1, 2, T, 6, 10, regime="vig", seed=seed, device="cuda" if compiled else "cpu")
    return x.q, x.k, x.v, 8 * x.g_rev


def _gla(q, k, v, g, reverse):
    return vig_ref.gla(q, k, v, g, reverse=reverse, scale=1.0, backend="naive")


@exercise
def reverse_in_chunks(answer):
    for T in (16, 37):
        q, k, v, g = _tensors(T, seed=T)
        got = torch.as_tensor(answer(q, k, v, g))
        if got.isnan().all():
            raise NotYet(f"reverse_in_chunks, T = {T}: the result is NaN everywhere, as it was before: store into o.")
        if got.shape == v.shape and got.isnan().any():
            token = int(got.isnan().any(-1).any(0).any(0).nonzero()[0])
            raise NotYet(
                f"reverse_in_chunks, T = {T}: token {token} is NaN. Was it written, in every chunk and for every head? "
                "Is what lies behind the end masked?"
            )
        chunks = [slice(n, n + 16) for n in range(0, T, 16)]
        alone = [_gla(*(t[:, :, c] for t in (q, k, v, g)), True) for c in chunks]
        expect(
            got,
            _gla(q, k, v, g, True),
            f"reverse_in_chunks(q, k, v, g), T = {T}",
            rtol=1e-4,
            atol=1e-4,
            likely={
                "that is the scan from the first token.": _gla(q, k, v, g, False),
                "each chunk is right by itself; the state does not reach the next. Begin with the last chunk.": (
                    torch.cat(alone, 2)
                ),
                "a pair fades by the gate of the token that is read, written after that gate; the reader's counts.": (
                    _gla(q, k, v, g.roll(-1, 2), True)
                ),
                "a token reads itself twice, or its pair is in two places.": _gla(q, k, v, g, True)
                + (q * k).sum(-1, keepdim=True) * v,
                "a token does not read itself.": _gla(q, k, v, g, True) - (q * k).sum(-1, keepdim=True) * v,
            },
        )


@wrong(reverse_in_chunks, "scans forward", says="from the first token")
def _(q, k, v, g):
    return _gla(q, k, v, g, False)


@wrong(reverse_in_chunks, "walks its chunks from left to right", says="T = 37: each chunk is right by itself")
def _(q, k, v, g):
    return torch.cat([_gla(*(t[:, :, n : n + 16] for t in (q, k, v, g)), True) for n in range(0, q.shape[2], 16)], 2)


@wrong(reverse_in_chunks, "takes the gate of the token that is read", says="after that gate")
def _(q, k, v, g):
    return _gla(q, k, v, g.roll(-1, 2), True)


@wrong(reverse_in_chunks, "reads i < j only", says="does not read itself")
def _(q, k, v, g):
    return _gla(q, k, v, g, True) - (q * k).sum(-1, keepdim=True) * v


@wrong(reverse_in_chunks, "drops the last, shorter chunk", says="token 32 is NaN")
def _(q, k, v, g):
    o, whole = torch.full_like(v, torch.nan), q.shape[2] // 16 * 16
    o[:, :, :whole] = _gla(*(t[:, :, :whole] for t in (q, k, v, g)), True)
    return o


# --- 2 ---------------------------------------------------------------------------------------------------------------


def _middle(C, reverse, own=True, sign=-1.0):
    """M with b = M g, b counted from the middle; `own` and `sign` plant the usual mistakes."""
    i, t, middle = torch.arange(C)[:, None], torch.arange(C), C // 2
    if reverse:
        behind = (i <= t if own else i < t) & (t < middle)
        ahead = (middle <= t) & (t < i)
    else:
        behind = (middle <= t) & (t <= i if own else t < i)
        ahead = (i < t) & (t < middle)
    return behind.double() + sign * ahead.double()


@exercise
def middle_matrix(answer):
    for C, reverse in ((8, False), (8, True), (16, False)):
        expect(
            answer(C, reverse),
            _middle(C, reverse),
            f"middle_matrix({C}, reverse={reverse})",
            likely={
                "the gates on the side that the scan meets first count negative: b falls to 0 at the middle.": (
                    _middle(C, reverse, sign=1.0)
                ),
                "all signs are the wrong way round: what lies behind the middle has faded, b < 0 there.": (
                    -_middle(C, reverse)
                ),
                "behind the middle a token's own gate is in its b, as in decay_to.": _middle(C, reverse, own=False),
                "that is b from the chunk's edge, not from its middle.": (
                    torch.ones(C, C).tril() if not reverse else torch.ones(C, C).triu()
                ),
                "that is the matrix of the other direction.": _middle(C, not reverse),
                "rows and columns are exchanged: row i holds the gates of which token i's b is the sum.": (
                    _middle(C, reverse).T
                ),
            },
        )


@wrong(middle_matrix, "counts every gate positive", says="count negative")
def _(C, reverse):
    return _middle(C, reverse, sign=1.0)


@wrong(middle_matrix, "leaves the token's own gate out", says="own gate is in its b")
def _(C, reverse):
    return _middle(C, reverse, own=False)


@wrong(middle_matrix, "counts from the edge", says="from the chunk's edge")
def _(C, reverse):
    return torch.ones(C, C).triu() if reverse else torch.ones(C, C).tril()


@wrong(middle_matrix, "knows one direction only", says=r"reverse=True\): that is the matrix of the other")
def _(C, reverse):
    return _middle(C, False)


# --- 3 ---------------------------------------------------------------------------------------------------------------


@exercise
def then(answer):
    r = torch.Generator().manual_seed(3)
    total_1, total_2 = -torch.rand(2, 3, generator=r, dtype=torch.float64)
    S_1, S_2 = torch.randn(2, 3, 5, generator=r, dtype=torch.float64)
    got = answer(total_1, S_1, total_2, S_2)
    if not isinstance(got, tuple) or len(got) != 2:
        raise NotYet(f"then: expected the pair (total, S), got {type(got).__name__}.")
    name = "then(total_1, S_1, total_2, S_2)"
    expect(
        got[0],
        total_1 + total_2,
        f"{name}, total",
        likely={
            "these are logarithms: decays multiply, so their logarithms add.": total_1 * total_2,
            "total is the logarithm of the decay, not the decay.": (total_1 + total_2).exp(),
        },
    )
    expect(
        got[1],
        total_2.exp()[:, None] * S_1 + S_2,
        f"{name}, S",
        likely={
            "S_1 fades on its way through the second stretch: by total_2.": total_1.exp()[:, None] * S_1 + S_2,
            "the second stretch is not faded by the first, which came before it.": (
                total_2.exp()[:, None] * S_1 + total_1.exp()[:, None] * S_2
            ),
            "nothing fades; what entered before the second stretch must.": S_1 + S_2,
            "total_2 is a logarithm; the state fades by its exponential.": total_2[:, None] * S_1 + S_2,
        },
    )


@wrong(then, "fades by the first stretch", says="by total_2")
def _(total_1, S_1, total_2, S_2):
    return total_1 + total_2, total_1.exp()[:, None] * S_1 + S_2


@wrong(then, "multiplies logarithms", says="logarithms add")
def _(total_1, S_1, total_2, S_2):
    return total_1 * total_2, total_2.exp()[:, None] * S_1 + S_2


@wrong(then, "adds states that never fade", says="nothing fades")
def _(total_1, S_1, total_2, S_2):
    return total_1 + total_2, S_1 + S_2


@wrong(then, "returns the state alone", says="expected the pair")
def _(total_1, S_1, total_2, S_2):
    return total_2.exp()[:, None] * S_1 + S_2


# --- 4 ---------------------------------------------------------------------------------------------------------------


@exercise
def least_bytes(answer):
    for K, V, gate in ((32, 64, 2), (32, 64, 4), (16, 32, 4)):
        expect(
            float(answer(K, V, gate)),
            float(4 * K + 4 * V + 2 * gate * K),
            f"least_bytes(K={K}, V={V}, gate={gate})",
            rtol=0,
            likely={
                "there are two gates, one of each direction.": float(4 * K + 4 * V + gate * K),
                "o is written: V numbers of 2 bytes more.": float(4 * K + 2 * V + 2 * gate * K),
                "these are numbers; q, k, v and o have 2 bytes each, a gate has `gate`.": float(4 * K + 2 * V),
                "q, k and v are read once for both directions, and o is written once.": (
                    float(2 * (4 * K + 4 * V + gate * K))
                ),
                "gates have K channels, like the keys.": float(4 * K + 4 * V + 2 * gate * V),
            },
        )


@wrong(least_bytes, "counts one gate", says="two gates")
def _(K, V, gate):
    return 2 * (2 * K + 2 * V) + gate * K


@wrong(least_bytes, "forgets the result", says="o is written")
def _(K, V, gate):
    return 2 * (2 * K + V) + 2 * gate * K


@wrong(least_bytes, "reads everything once a direction", says="once for both directions")
def _(K, V, gate):
    return 2 * (2 * (2 * K + 2 * V) + gate * K)


@wrong(least_bytes, "counts numbers, not bytes", says="these are numbers")
def _(K, V, gate):
    return 4 * K + 2 * V
