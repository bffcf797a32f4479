"""The path for every gate: the arithmetic of `vig_ref/chunked`, chunk by chunk.

Every decay is the exponential of a *sum of gates on one side of a boundary*, never of a difference of sums, so that no
gate in [-inf, 0] can overflow or cancel. Such a set of sums, one row per token, is a product of a 0/1 matrix with the
gates:

    E = exp(M g)          M[i, t] = 1 if the gate of token t lies between token i and the boundary

and so its gradient is plain chain rule:  dg += M^T (E * dE), where E * dE = qE * dqE for a factor qE = q E. All below
is this with three kinds of boundary: the edges where the scan enters and leaves the chunk, and the middles by halving.
"""

import triton
import triton.language as tl

from vig_ref.fused.blocks import (
    C,
    ahead,
    carry,
    chunk,
    dot,
    exp2,
    keep,
    kept,
    load,
    load_any_gate,
    other_share,
    store,
    store_share,
    sums,
)  # fmt: skip

#: Of halving a chunk: C = 2^LEVELS.
LEVELS = tl.constexpr(4)


@triton.jit
def _middles(half, REVERSE: tl.constexpr):
    """Cut tokens into blocks of 2 * half; the half that the scan meets later reads the earlier one across the middle.

    Returns M `[C, C]` (the gates between token i and its block's middle), late `[C, 1]`, same `[C, C]` (same block).
    """
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    block = i // (2 * half)
    middle = block * (2 * half) + half
    right = i >= middle
    if REVERSE:
        M = (right & (middle <= t) & (t < i)) | (~right & (i <= t) & (t < middle))
        late = ~right
    else:
        M = (right & (middle <= t) & (t <= i)) | (~right & (i < t) & (t < middle))
        late = right
    return M, late, block == t // (2 * half)


@triton.jit
def _scores(q, k, g, DOT: tl.constexpr):
    """A[i, j] = q_i . (k_j * decay from j to i) for the pairs j met before i, 0 for all others.  `[C, C]`"""
    A = tl.zeros((C, C), g.dtype)
    zero = tl.zeros((C, C), g.dtype)
    half = 1
    for _ in range(LEVELS):
        M, late, same = _middles(half, False)
        E = exp2(sums(M, g, DOT), DOT)
        A += tl.where(same, dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), zero, DOT), 0.0)
        half *= 2
    return A


@triton.jit
def _gradients(
    q, k, v, g, do, dA, S, dS, others,
    REVERSE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk, backward. S: the state that enters; dS: the gradient of the state that leaves.

    Returns dg, and `others` with what this direction adds: dq, dk, dv by the state, and the scores A. The pair of a
    token with itself is the caller's: it belongs to both directions and to no gate.
    """
    zero_k = tl.zeros_like(q)
    zero_c = tl.zeros((C, C), g.dtype)
    dq = zero_k
    dk = zero_k
    A = zero_c
    dg = zero_k + (tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 0))[None, :]  # S_out = exp(total) * S + ...
    half = 1
    for _ in range(LEVELS):  # A = (q E) (k E)^T across every middle
        M, late, same = _middles(half, REVERSE)
        E = exp2(sums(M, g, DOT), DOT)
        qE = tl.where(late, q * E, 0.0)
        kE = tl.where(late, 0.0, k * E)
        A += tl.where(same, dot(qE, tl.trans(kE), zero_c, DOT), 0.0)
        dA_level = tl.where(same, dA, 0.0)
        dqE = tl.where(late, dot(dA_level, kE, zero_k, DOT), 0.0)
        dkE = tl.where(late, 0.0, dot(tl.trans(dA_level), qE, zero_k, DOT))
        dq += dqE * E
        dk += dkE * E
        dg += sums(tl.trans(M), qE * dqE + kE * dkE, DOT)
        half *= 2
    M = ahead(not REVERSE, True)  # o = (q exp(b)) S
    E = exp2(sums(M, g, DOT), DOT)
    dqE = dot(do, S, zero_k, DOT)
    dq += dqE * E
    dg += sums(tl.trans(M), q * E * dqE, DOT)
    M = ahead(REVERSE, False)  # S_out = ... + (k * decay to the far edge)^T v: the gates not yet met at token j
    E = exp2(sums(M, g, DOT), DOT)
    kE = k * E
    dkE = dot(v, dS, zero_k, DOT)
    dk += dkE * E
    dg += sums(tl.trans(M), kE * dkE, DOT)
    dv = dot(kE, tl.trans(dS), tl.zeros_like(v), DOT)
    return dg, (others[0] + dq, others[1] + dk, others[2] + dv, others[3] + A)


@triton.jit
def forward_halving(
    q, k, v, g, o, share, S, scale, first, count, step, T, K, V,
    DOT: tl.constexpr,
):  # fmt: skip
    """One scan along a walk of `count` chunks from `first` on, plus share. Returns the state that leaves."""
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    for i in range(count):
        at = chunk(first + i * step, step)
        b_q = load(q, at, T, K, BK).to(ACC) * scale
        b_k = load(k, at, T, K, BK).to(ACC)
        b_v = load(v, at, T, V, BV).to(ACC)
        b_g = load_any_gate(g, at, T, K, BK, ACC)
        b_o = other_share(share, at, T, V, BV, ACC)
        b_o += tl.sum(b_q * b_k, 1)[:, None] * b_v  # token i reads itself
        b_qE = b_q * exp2(sums(ahead(True, True), b_g, DOT), DOT)  # step 4 of chunks.py
        b_o = dot(b_qE, tl.trans(S), b_o, DOT)
        b_o = dot(_scores(b_q, b_k, b_g, DOT), b_v, b_o, DOT)  # step 1
        S = carry(S, b_g, b_k, b_v, False, DOT)  # steps 2 and 3
        store_share(o, b_o, at, T, V)
    return S


@triton.jit
def states_halving(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr,
):  # fmt: skip
    """Keep S of the own scan, which goes along the walk, and dS of the opposite one, as they enter each of its chunks.

    first: the chunk that the walk meets first. Returns what leaves of both.
    """
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    for i in range(count):
        n = first + i * step
        at = chunk(n, step)
        if g_own is not None:
            keep(S, p_S, n, dg_own, dv, None, T)
            b_k = load(k, at, T, K, BK)
            b_v = load(v, at, T, V, BV)
            b_g = load_any_gate(g_own, at, T, K, BK, ACC)
            S = carry(S, b_g, b_k, b_v, False, DOT)
        if g_opp is not None:
            keep(dS, p_dS, n, dg_opp, dq, dk, T)
            b_q = load(q, at, T, K, BK).to(ACC) * scale
            b_do = load(do, at, T, V, BV)
            b_g = load_any_gate(g_opp, at, T, K, BK, ACC)
            dS = carry(dS, b_g, b_q, b_do, True, DOT)
    return S, dS


@triton.jit
def gradients_halving(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr,
):  # fmt: skip
    """All gradients of a walk's chunks. S of its scan and dS of the opposite one are carried, the others were kept."""
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    SCANS: tl.constexpr = (g_own is not None) + (g_opp is not None)
    for i in range(count):
        n = first + i * step
        at = chunk(n, step)
        b_q = load(q, at, T, K, BK).to(ACC) * scale
        b_k = load(k, at, T, K, BK).to(ACC)
        b_v = load(v, at, T, V, BV).to(ACC)
        b_do = load(do, at, T, V, BV).to(ACC)
        self_dA = SCANS * tl.sum(b_do * b_v, 1)[:, None]  # token i reads itself, once in each direction
        A = tl.zeros((C, C), ACC)
        both = (self_dA * b_k, self_dA * b_q, SCANS * tl.sum(b_q * b_k, 1)[:, None] * b_do, A)  # dq, dk, dv, A
        dA = dot(b_do, tl.trans(b_v), A, DOT)
        if g_opp is not None:
            b_g = load_any_gate(g_opp, at, T, K, BK, ACC)
            b_S = kept(p_S, n, dg_opp, dv, None, T, BV, BK).to(ACC)
            b_dg, both = _gradients(b_q, b_k, b_v, b_g, b_do, dA, b_S, dS, both, True, DOT)
            store(dg_opp, b_dg, at, T, K)
            dS = carry(dS, b_g, b_q, b_do, True, DOT)
        if g_own is not None:
            b_g = load_any_gate(g_own, at, T, K, BK, ACC)
            b_dS = kept(p_dS, n, dg_own, dq, dk, T, BV, BK).to(ACC)
            b_dg, both = _gradients(b_q, b_k, b_v, b_g, b_do, dA, S, b_dS, both, False, DOT)
            store(dg_own, b_dg, at, T, K)
            S = carry(S, b_g, b_k, b_v, False, DOT)
        b_dq, b_dk, b_dv, A = both
        b_dv = dot(tl.trans(A), b_do, b_dv, DOT)
        store(dq, b_dq * scale, at, T, K)
        store(dk, b_dk, at, T, K)
        store(dv, b_dv, at, T, V)
