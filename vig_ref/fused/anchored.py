"""The fast path: the boundary of every chunk is its middle.

With b_i the sum of gates from the middle to token i, counted negative on the side that the scan meets first,

    weight of token j in token i  =  exp(b_i) * exp(-b_j)          for every j met before i, or i itself

so that one product of matrices gives all scores of a direction. Exponents of both signs occur, bounded by what half a
chunk forgets; `vig_ref/fused/launch.py` says how much that may be, and a program that finds more computes its tokens
again by `vig_ref/fused/halving.py`. States are carried from middle to middle (q comes with the operator's scale):

    S       the state at a chunk's middle, before the chunk's own tokens
    A       = (q exp(b)) (k exp(-b))^T, and 0 for every j not yet met at i
    o       = (q exp(b)) S + A v
    S next  = exp(gates between the two middles) * (S + (k exp(-b))^T v)      (when the next chunk begins)

Backward, dS goes the other way: the gradient by S + (k exp(-b))^T v. The gate of t acts on all that passes it: with
before and behind in the order of the scan, and <S, dS> summed over V alone,

    dg_t = <S, dS> + reads of S at t and behind + pairs with j before t, i at t or behind + writes into dS before t

The pairs are all with i at t or behind, less those with j there too: what cancels has the same rounded operands.
"""

import triton
import triton.language as tl

from vig_ref.fused.blocks import (
    ROWS,
    C,
    ahead,
    chunk,
    dot,
    exp2,
    keep,
    kept,
    load,
    load_gate,
    negative,
    operand,
    other_share,
    scale_columns,
    store,
    store_share,
    sums,
    tokens,
)  # fmt: skip


@triton.jit
def _middle(REVERSE: tl.constexpr):
    """M `[C, C]` with b = M g: 1 for the gates from the middle to token i, -1 where the scan meets i first."""
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    middle = C // 2
    if REVERSE:
        return tl.where((i <= t) & (t < middle), 1.0, tl.where((middle <= t) & (t < i), -1.0, 0.0))
    else:
        return tl.where((middle <= t) & (t <= i), 1.0, tl.where((i < t) & (t < middle), -1.0, 0.0))


@triton.jit
def _first_and_last_half():
    """`[ROWS, C]`: 1 for the half of the tokens that the walk meets first; in rows 8 to 15, for the other half."""
    row = tl.arange(0, ROWS)[:, None]
    t = tl.arange(0, C)[None, :]
    return (t < C // 2) != (row >= ROWS // 2)


@triton.jit
def _between(before, g, DOT: tl.constexpr):
    """The sum of all gates between the previous chunk's middle and this one's, and the sum behind this one.

    before `[ROWS / 2, BK]`, equal rows: the sum of the gates behind the previous middle.

    One product sums both halves of the chunk: the first in rows 0 to 7, the last in rows 8 to 15. See `ROWS`.
    """
    halves = sums(_first_and_last_half(), g, DOT)
    first, last = tl.split(tl.permute(tl.reshape(halves, (2, ROWS // 2, g.shape[1])), (1, 2, 0)))
    return before + first, last


@triton.jit
def _advance(S, before, g, DOT: tl.constexpr):
    """A state from the previous chunk's middle to this one's; and what `_between` returns."""
    between, last = _between(before, g, DOT)
    return scale_columns(S, exp2(between, DOT)), between, last


@triton.jit
def least(a, b):
    """The smaller one, or NaN if either is: a gate of -inf makes a sum of gates -inf, or NaN (0 * inf)."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reads(REVERSE: tl.constexpr):
    """`[C, C]`: 1 where token i reads token j. A token reads itself in each direction."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return i <= j if REVERSE else i >= j


@triton.jit
def _prepare(q, k, g, at, before, scale, T, K, DOT: tl.constexpr):
    """All of a chunk that needs neither state nor v: q exp(b), k exp(-b), A, rounded; and what `_between` returns."""
    BK: tl.constexpr = before.shape[1]
    ACC: tl.constexpr = before.dtype
    b_q = load(q, at, T, K, BK)
    b_k = load(k, at, T, K, BK)
    b_g = load_gate(g, at, T, K, BK, ACC)
    between, behind = _between(before, b_g, DOT)
    b = sums(_middle(False), b_g, DOT)
    b_qE = operand(b_q.to(ACC) * (exp2(b, DOT) * scale), ACC, DOT)
    b_kE = operand(b_k.to(ACC) * exp2(negative(b), DOT), ACC, DOT)
    A = dot(b_qE, tl.trans(b_kE), tl.zeros((C, C), ACC), DOT)
    return b_qE, b_kE, operand(tl.where(_reads(False), A, 0.0), ACC, DOT), between, behind


@triton.jit
def forward_anchored(
    q, k, v, g, o, share, S, scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One scan along a walk of `count` chunks from `first` on, plus share. S: the state that enters.

    EARLY: a chunk is prepared beside the products of the one before, which do not wait for it: faster where a warp has
    its scheduler to itself. The last one is prepared again at the end, for nothing.
    Returns the state that leaves, and the smallest exponents met.
    """
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    before = tl.zeros((ROWS // 2, BK), ACC)
    lowest = before  # of the sums of gates between two middles
    if EARLY:
        b_qE, b_kE, A, between, before = _prepare(q, k, g, chunk(first, step), before, scale, T, K, DOT)
    for i in tl.range(count, num_stages=STAGES):
        at = chunk(first + i * step, step)
        b_v = load(v, at, T, V, BV)
        b_vT = load(v, at, T, V, BV, TRANSPOSED=True)  # one load in two layouts could not be fetched ahead
        if not EARLY:
            b_qE, b_kE, A, between, before = _prepare(q, k, g, at, before, scale, T, K, DOT)
        lowest = least(lowest, between)
        S = scale_columns(S, exp2(between, DOT))
        # Rounded here, as A was: both go to other threads before the next products, and together wait at one barrier.
        b_ST = operand(tl.trans(S), ACC, DOT)
        b_o = dot(b_qE, b_ST, other_share(share, at, T, V, BV, ACC), DOT)
        S = dot(b_vT, b_kE, S, DOT)
        b_o = dot(A, b_v, b_o, DOT)
        if EARLY:
            there = chunk(first + tl.minimum(i + 1, count - 1) * step, step)
            b_qE, b_kE, A, between, before = _prepare(q, k, g, there, before, scale, T, K, DOT)
        store_share(o, b_o, at, T, V)
    return scale_columns(S, exp2(before, DOT)), least(lowest, before)


@triton.jit
def _gradients(
    q, k, v, do, dv, dA, g, S, dS, S_dS, scale,
    REVERSE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk, backward. S: the state at its middle; dS: its gradient after the chunk's tokens.

    One of them was kept, rounded; the other is carried. S_dS `[BV, BK]` is their product, taken before the carried one
    was rounded for this call.

    Returns dq, dk, dg, dv with what dS adds to it, the scores A, and what the carried state wants of the chunk: for S
    (the walk's own scan) k exp(-b), for dS (the opposite, reverse one) q exp(b).
    """
    ACC: tl.constexpr = g.dtype
    zero_k = tl.zeros_like(g)
    zero_c = tl.zeros((C, C), ACC)
    b = sums(_middle(REVERSE), g, DOT)
    E = exp2(b, DOT)
    E_inverse = exp2(negative(b), DOT)
    qE = operand(q.to(ACC) * (E * scale), ACC, DOT)
    kE = operand(k.to(ACC) * E_inverse, ACC, DOT)
    dA = operand(tl.where(_reads(REVERSE), dA, 0.0), ACC, DOT)
    dST = operand(tl.trans(dS), ACC, DOT)
    S_dS = operand(S_dS, ACC, DOT)
    A = tl.where(_reads(REVERSE), dot(qE, tl.trans(kE), zero_c, DOT), 0.0)
    dv = dot(kE, dST, dv, DOT)
    dqE = dot(dA, kE, zero_k, DOT)
    dkE = dot(tl.trans(dA), qE, zero_k, DOT)
    dqE = dot(do, S, dqE, DOT)
    writes = dot(v, dS, zero_k, DOT)
    dq = dqE * (E * scale)
    dk = (dkE + writes) * E_inverse
    # The terms of dg_t at the top of this file, in that order. dqE has reads of S and pairs: one sum does both.
    dg = dot(tl.full((C, S_dS.shape[0]), 1.0, ACC), S_dS, zero_k, DOT)  # <S, dS>, the same for all gates of the chunk
    dg += sums(ahead(REVERSE, True), qE.to(ACC) * dqE - kE.to(ACC) * dkE, DOT)  # over all tokens at t or behind
    dg += sums(ahead(not REVERSE, False), kE.to(ACC) * writes, DOT)  # over all tokens before t
    return dq, dk, dg, dv, A, qE if REVERSE else kE


@triton.jit
def states_anchored(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `states_halving`; the states kept are those at the middle of a chunk, before its own tokens.

    Returns what leaves of both, and the smallest exponents met.
    """
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    S_before = tl.zeros((ROWS // 2, BK), ACC)  # the sum of gates behind the middle where S is
    dS_before = S_before
    lowest = S_before
    for i in tl.range(count, num_stages=STAGES):
        n = first + i * step
        at = chunk(n, step)
        if g_own is not None:
            b_g = load_gate(g_own, at, T, K, BK, ACC)
            S, between, S_before = _advance(S, S_before, b_g, DOT)
            lowest = least(lowest, between)
            b_kE = load(k, at, T, K, BK).to(ACC) * exp2(negative(sums(_middle(False), b_g, DOT)), DOT)
            b_kE = operand(b_kE, ACC, DOT)
        if g_opp is not None:
            b_g = load_gate(g_opp, at, T, K, BK, ACC)
            dS, between, dS_before = _advance(dS, dS_before, b_g, DOT)
            lowest = least(lowest, between)
            b_qE = load(q, at, T, K, BK).to(ACC) * (exp2(sums(_middle(True), b_g, DOT), DOT) * scale)
            b_qE = operand(b_qE, ACC, DOT)
        if g_own is not None:
            keep(S, p_S, n, dg_own, dv, None, T)
            S = dot(load(v, at, T, V, BV, TRANSPOSED=True), b_kE, S, DOT)
        if g_opp is not None:
            keep(dS, p_dS, n, dg_opp, dq, dk, T)
            dS = dot(load(do, at, T, V, BV, TRANSPOSED=True), b_qE, dS, DOT)
    S = scale_columns(S, exp2(S_before, DOT))
    dS = scale_columns(dS, exp2(dS_before, DOT))
    return S, dS, least(lowest, least(S_before, dS_before))


@triton.jit
def gradients_anchored(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `gradients_halving`."""
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    S_before = tl.zeros((ROWS // 2, BK), ACC)  # the sum of gates behind the middle where S is
    dS_before = S_before
    for i in tl.range(count, num_stages=STAGES):
        n = first + i * step
        at = chunk(n, step)
        token = tokens(at)[:, None]
        b_q = load(q, at, T, K, BK)
        b_k = load(k, at, T, K, BK)
        b_v = load(v, at, T, V, BV)
        b_do = load(do, at, T, V, BV)
        # Twice, as in forward_anchored, to be fetched ahead; products of 64 rows on a Hopper GPU read either layout
        b_vT = load(v, at, T, V, BV, TRANSPOSED=True) if BV < 64 else tl.trans(b_v)
        b_doT = load(do, at, T, V, BV, TRANSPOSED=True) if BV < 64 else tl.trans(b_do)
        dA = dot(b_do, b_vT, tl.zeros((C, C), ACC), DOT)
        b_dq = tl.zeros((C, BK), ACC)
        b_dk = tl.zeros((C, BK), ACC)
        b_dv = tl.zeros((C, BV), ACC)
        A = tl.zeros((C, C), ACC)
        if g_opp is not None:
            b_g = load_gate(g_opp, at, T, K, BK, ACC)
            b_S = kept(p_S, n, dg_opp, dv, None, T, BV, BK)
            dS, _, dS_before = _advance(dS, dS_before, b_g, DOT)
            part_dq, part_dk, b_dg, b_dv, part_A, b_qE = _gradients(
                b_q, b_k, b_v, b_do, b_dv, dA, b_g, b_S, dS.to(b_S.dtype), b_S.to(ACC) * dS, scale,
                True, DOT,
            )  # fmt: skip
            dS = dot(b_doT, b_qE, dS, DOT)
            b_dq += part_dq
            b_dk += part_dk
            A += part_A
            store(dg_opp, tl.where(token == (T - 1 if step > 0 else 0), 0.0, b_dg), at, T, K)  # the scan's first
        if g_own is not None:
            b_g = load_gate(g_own, at, T, K, BK, ACC)
            b_dS = kept(p_dS, n, dg_own, dq, dk, T, BV, BK)
            S, _, S_before = _advance(S, S_before, b_g, DOT)
            part_dq, part_dk, b_dg, b_dv, part_A, b_kE = _gradients(
                b_q, b_k, b_v, b_do, b_dv, dA, b_g, S.to(b_dS.dtype), b_dS, S * b_dS.to(ACC), scale,
                False, DOT,
            )  # fmt: skip
            S = dot(b_vT, b_kE, S, DOT)
            b_dq += part_dq
            b_dk += part_dk
            A += part_A
            store(dg_own, tl.where(token == (0 if step > 0 else T - 1), 0.0, b_dg), at, T, K)
        b_AT = operand(tl.trans(A), ACC, DOT)
        store(dq, b_dq, at, T, K)
        store(dk, b_dk, at, T, K)
        b_dv = dot(b_AT, b_do, b_dv, DOT)
        store(dv, b_dv, at, T, V)
