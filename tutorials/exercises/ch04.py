"""Checkers of chapter 4, gradients by hand, and answers that look right and are not."""

import math

import torch
from torch import Tensor

import vig_ref
from exercises import NotYet, exercise, expect, wrong


def _draw(T: int = 6, K: int = 3, V: int = 2, seed: int = 0) -> list[Tensor]:
    """q, k, v, g, do of one head in float64, `[T, K or V]`."""
    r = torch.Generator().manual_seed(seed)
    q, k, v, g, do = (torch.randn(T, D, generator=r, dtype=torch.float64) for D in (K, K, V, K, V))
    return [q, k, v, -g.abs(), do]


def _grad(function, leaf: Tensor, do: Tensor) -> Tensor:
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, do)[0]


@exercise
def dv_by_gla(answer):
    q, k, v, g, do = (t[None, None].expand(1, 2, -1, -1) for t in _draw())
    got = answer(q, k, v, g, do, 0.5)
    right = _grad(lambda v: vig_ref.gla(q, k, v, g, scale=0.5, backend="naive"), v, do)
    next_gate = torch.cat([g[:, :, 1:], torch.zeros_like(g[:, :, :1])], 2)

    def adjoint(gate, first=k, second=q, reverse=True, scale=0.5):
        return vig_ref.gla(first, second, do, gate, reverse=reverse, scale=scale, backend="naive")

    expect(got, right, "dv", likely={
        "each token's own gate was used. In Figure 1, the arrow back into dS_t carries the gate of t + 1.": adjoint(g),
        "the gates are shifted the wrong way: dS_t fades by the gate of t + 1, which stands at t + 1.":
            adjoint(torch.cat([torch.zeros_like(g[:, :, :1]), g[:, :, :-1]], 2)),
        "q and k are exchanged. dv_t = k_t dS_t reads with k, and dS gathers q_t^T do_t.": adjoint(next_gate, q, k),
        "the scan runs from the first token to the last; the adjoint runs the other way.":
            adjoint(next_gate, reverse=False),
        "the scale is the default, K ** -0.5; pass on the one that is given.": adjoint(next_gate, scale=None),
    })  # fmt: skip


@wrong(dv_by_gla, "does not shift the gates", says="the gate of t \\+ 1")
def _(q, k, v, g, do, scale):
    return vig_ref.gla(k, q, do, g, reverse=True, scale=scale)


@wrong(dv_by_gla, "shifts the gates the wrong way, round the end", says="index|shifted")
def _(q, k, v, g, do, scale):
    return vig_ref.gla(k, q, do, g.roll(1, 2), reverse=True, scale=scale)


@wrong(dv_by_gla, "writes with k and reads with q", says="q and k are exchanged")
def _(q, k, v, g, do, scale):
    g = torch.cat([g[:, :, 1:], 0 * g[:, :, :1]], 2)
    return vig_ref.gla(q, k, do, g, reverse=True, scale=scale)


@wrong(dv_by_gla, "scans forwards", says="from the first token to the last")
def _(q, k, v, g, do, scale):
    g = torch.cat([g[:, :, 1:], 0 * g[:, :, :1]], 2)
    return vig_ref.gla(k, q, do, g, scale=scale)


@exercise
def d_initial_state(answer):
    q, _, _, g, do = _draw()
    b = g.cumsum(0)

    def result(S):  # what o gains from a state that was there before
        return torch.stack([0.5 * q[t] @ (torch.exp(b[t])[:, None] * S) for t in range(len(q))])

    right = _grad(result, torch.zeros(3, 2, dtype=torch.float64), do)
    expect(answer(q, g, do, 0.5), right, "dS_-1", likely={
        "the scale is missing.": 2 * right,
        "a token's own gate is missing: it fades the state before the token reads it.":
            0.5 * (q * torch.exp(b - g)).T @ do,
        "the gates of one token only. The initial state passes all gates from the first to t.":
            0.5 * (q * torch.exp(g)).T @ do,
        "nothing fades: the gates are missing.": 0.5 * q.T @ do,
    })  # fmt: skip
    reset = g.clone()
    reset[2] = -math.inf
    got = answer(q, reset, do, 0.5)
    expect(got, 0.5 * (q[:2] * torch.exp(b[:2])).T @ do[:2], "dS_-1 with a reset at token 2")


@wrong(d_initial_state, "leaves a token's own gate out", says="own gate")
def _(q, g, do, scale):
    return scale * (q * torch.exp(g.cumsum(0) - g)).T @ do


@wrong(d_initial_state, "forgets that gates multiply up", says="one token only")
def _(q, g, do, scale):
    return scale * (q * torch.exp(g)).T @ do


@wrong(d_initial_state, "forgets the scale", says="scale is missing")
def _(q, g, do, scale):
    return (q * torch.exp(g.cumsum(0))).T @ do


@wrong(d_initial_state, "divides by what comes after, which a reset turns into NaN", says="reset")
def _(q, g, do, scale):
    return scale * (q * torch.exp(g.sum(0)) / torch.exp(g.sum(0) - g.cumsum(0))).T @ do


@exercise
def peak_states(answer):
    for T, C in ((64, 16), (196, 16), (5, 16), (7, 1), (196, 14)):
        got, right = answer(T, C), math.ceil(T / C) + min(C, T)
        likely = {
            "the last chunk counts too, even if it is not full.": T // C + min(C, T),
            "no chunk is longer than the sequence.": math.ceil(T / C) + C,
            "that keeps the states of all tokens; only one chunk at a time is worked on.": math.ceil(T / C) + T,
            "the states inside the chunk that is worked on are missing.": math.ceil(T / C),
        }
        expect(got, right, f"peak_states({T}, {C})", likely={s: n for s, n in likely.items() if n != right})


@wrong(peak_states, "drops a chunk that is not full", says="last chunk")
def _(T, C):
    return T // C + min(C, T)


@wrong(peak_states, "has chunks longer than the sequence", says="longer than the sequence")
def _(T, C):
    return -(-T // C) + C


@wrong(peak_states, "counts the edges alone", says="inside the chunk")
def _(T, C):
    return -(-T // C)


@exercise
def dalpha(answer):
    q, k, v, g, do = _draw()
    closed = torch.exp(g).index_fill(0, torch.tensor(2), 0.0)
    for what, alpha in (("", torch.exp(g)), (" with alpha = 0 at token 2", closed)):

        def result(alpha):
            S, o = torch.zeros(3, 2, dtype=torch.float64), []
            for t in range(len(q)):
                S = alpha[t][:, None] * S + k[t][:, None] * v[t]
                o.append(0.5 * q[t] @ S)
            return torch.stack(o)

        got, right = answer(q, k, v, alpha, do, 0.5), _grad(result, alpha, do)
        if isinstance(got, Tensor) and got.isnan().any():
            raise NotYet(f"dalpha{what} has NaN. 0 / 0? A gate of 0 cannot be divided by; do not go through dg.")
        expect(got, right, f"dalpha{what}", likely={
            "that is dg; dalpha has one factor alpha less.": alpha * right,
            "the gradient is 0 where the gate is 0. It should be that of opening the gate a little.":
                torch.where(alpha == 0, 0, right),
        })  # fmt: skip


@wrong(dalpha, "divides dg by alpha", says="NaN")
def _(q, k, v, alpha, do, scale):
    return alpha * _right_dalpha(q, k, v, alpha, do, scale) / alpha


@wrong(dalpha, "returns dg", says="that is dg")
def _(q, k, v, alpha, do, scale):
    return alpha * _right_dalpha(q, k, v, alpha, do, scale)


@wrong(dalpha, "hides the division by a clamp", says="opening the gate")
def _(q, k, v, alpha, do, scale):
    return alpha * _right_dalpha(q, k, v, alpha, do, scale) / alpha.clamp(min=1e-12)


@wrong(dalpha, "takes the state after the token instead of the one before", says="index")
def _(q, k, v, alpha, do, scale):
    return _right_dalpha(q, k, v, alpha, do, scale, before=0)


def _right_dalpha(q, k, v, alpha, do, scale, before=1):
    states = [torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)]
    for t in range(len(q)):
        states.append(alpha[t][:, None] * states[-1] + k[t][:, None] * v[t])
    dS, rows = 0, []
    for t in reversed(range(len(q))):
        dS = dS + scale * q[t][:, None] * do[t]
        rows.append((states[t + 1 - before] * dS).sum(1))
        dS = alpha[t][:, None] * dS
    return torch.stack(rows[::-1])
