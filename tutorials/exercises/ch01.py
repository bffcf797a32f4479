"""Checkers of chapter 1."""

import math

import torch
from torch import Tensor

from exercises import exercise, expect, wrong
from vig_ref import naive


def _inputs(T: int, K: int, V: int) -> tuple[Tensor, ...]:
    r = torch.Generator().manual_seed(1)
    q, k, g = (torch.randn(T, K, generator=r, dtype=torch.float64) for _ in range(3))
    return q, k, torch.randn(T, V, generator=r, dtype=torch.float64), -g.abs()


def _scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool) -> Tensor:
    return naive.gla(*(x[None, None] for x in (q, k, v, g)), reverse=reverse, scale=1.0)[0, 0]


# --- 1 ---------------------------------------------------------------------------------------------------------------


@exercise
def half_life(answer):
    for g in (-math.log(2), -math.log(2) / 16, -3.0):
        expect(
            answer(g),
            math.log(2) / -g,
            f"half_life({g:.4f})",
            likely={
                "it is negative. A gate's logarithm is, the number of tokens is not.": math.log(2) / g,
                "you took g for the gate itself; the gate is exp(g), and its logarithm is g.": (
                    math.log(0.5) / math.log(-g)
                ),
                "that is the time to fade to 1/e; the question is 1/2.": -1 / g,
                "that is how much is left after one token.": math.exp(g),
                "it must be a number of tokens that need not be whole.": math.ceil(math.log(2) / -g),
            },
        )


@wrong(half_life, "has the wrong sign", says="negative")
def _(g):
    return math.log(2) / g


@wrong(half_life, "fades to 1/e", says="1/e")
def _(g):
    return -1 / g


@wrong(half_life, "takes g for the gate", says="the gate is exp")
def _(g):
    return math.log(0.5) / math.log(-g)


@wrong(half_life, "rounds up", says="need not be whole")
def _(g):
    return math.ceil(math.log(2) / -g)


# --- 2 ---------------------------------------------------------------------------------------------------------------


@exercise
def weight(answer):
    T = 6
    q, k, _, g = _inputs(T, 3, 4)
    A = _scan(q, k, torch.eye(T, dtype=torch.float64), g, reverse=False)
    for i, j in ((4, 4), (4, 1), (5, 0), (1, 0)):
        qk = q[i] * k[j]
        expect(
            answer(q, k, g, i, j),
            A[i, j],
            f"weight(q, k, g, i={i}, j={j})",
            likely={
                "the gates are missing: what token j wrote fades at every token after it.": qk.sum(),
                "the gate of token j is in it, but that gate fades only what was there before j wrote.": (
                    (qk * g[j : i + 1].sum(0).exp()).sum()
                ),
                "the gate of token i is missing: at token i the state fades before it is read.": (
                    (qk * g[j + 1 : i].sum(0).exp()).sum()
                ),
                "g is a logarithm: the factor is its exponential.": (qk * g[j + 1 : i + 1].prod(0)).sum(),
                "each channel has its own decay: multiply by it before you sum over channels.": (
                    qk.sum() * g[j + 1 : i + 1].sum(0).exp().mean()
                ),
            },
        )
    expect(
        answer(q, k, g, 1, 3),
        0.0,
        "weight(q, k, g, i=1, j=3)",
        likely={"a forward scan has not met token 3 when it reads at token 1: 0.": (q[1] * k[3]).sum()},
    )


@wrong(weight, "leaves out the gates", says="gates are missing")
def _(q, k, g, i, j):
    return q[i] @ k[j] if j <= i else 0.0


@wrong(weight, "includes the gate of token j", says="the gate of token j is in it")
def _(q, k, g, i, j):
    return (q[i] * k[j] * g[j : i + 1].sum(0).exp()).sum() if j <= i else 0.0


@wrong(weight, "excludes the gate of token i", says="the gate of token i is missing")
def _(q, k, g, i, j):
    return (q[i] * k[j] * g[j + 1 : i].sum(0).exp()).sum() if j <= i else 0.0


@wrong(weight, "reads tokens that the scan has not met", says="has not met token 3")
def _(q, k, g, i, j):
    return (q[i] * k[j] * g[j + 1 : i + 1].sum(0).exp()).sum()


# --- 3 ---------------------------------------------------------------------------------------------------------------


@exercise
def reverse_scan(answer):
    q, k, v, g = _inputs(5, 3, 4)
    flipped = [x.flip(0) for x in (q, k, v)]
    shifted = torch.cat([g[1:], g[:1]])
    expect(
        answer(q, k, v, g),
        _scan(q, k, v, g, reverse=True),
        "reverse_scan(q, k, v, g)",
        likely={
            "that is the scan from the first token; begin at the last.": _scan(q, k, v, g, reverse=False),
            "q, k and v are turned round, the gate is not: each token must fade with its own gate.": (
                _scan(*flipped, g, reverse=False).flip(0)
            ),
            "the state fades by the gate of the next token; S_t = exp(g_t) S_t+1 uses the gate of token t.": (
                _scan(q, k, v, shifted, reverse=True)
            ),
            "the values are right, but in the order of the scan; o_t belongs at place t.": (
                _scan(q, k, v, g, reverse=True).flip(0)
            ),
        },
    )


def _loop(q, k, v, g):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), []
    for t in range(len(q)):
        S = g[t].exp()[:, None] * S + torch.outer(k[t], v[t])
        o.append(q[t] @ S)
    return torch.stack(o)


@wrong(reverse_scan, "scans forward", says="begin at the last")
def _(q, k, v, g):
    return _loop(q, k, v, g)


@wrong(reverse_scan, "does not turn the gate", says="the gate is not")
def _(q, k, v, g):
    return _loop(q.flip(0), k.flip(0), v.flip(0), g).flip(0)


@wrong(reverse_scan, "does not turn the result back", says="in the order of the scan")
def _(q, k, v, g):
    return _loop(*(x.flip(0) for x in (q, k, v, g)))


@wrong(reverse_scan, "reads the state before its own pair is written", says=r"at index \[")
def _(q, k, v, g):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), torch.empty_like(v)
    for t in reversed(range(len(q))):
        o[t] = q[t] @ (g[t].exp()[:, None] * S)
        S = g[t].exp()[:, None] * S + torch.outer(k[t], v[t])
    return o


@wrong(reverse_scan, "gates the columns", says="raised RuntimeError")
def _(q, k, v, g):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), torch.empty_like(v)
    for t in reversed(range(len(q))):
        S = g[t].exp()[None, :] * S + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o
