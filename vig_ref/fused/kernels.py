"""The kernels: a program takes one (batch, head), or a segment of a long one, and walks its chunks.

Forward, one direction after the other: two states and all that belongs to them would not fit in registers.

    right to left     carries S_rev; leaves its share of o, as a rule where o will be
    left to right     carries S_fwd; adds the other share, and writes o

Backward, the gradients of a chunk need S from one side and dS from the other, so that states are written out:

    right to left     carries S_rev and dS_fwd; writes both for every chunk: where its gradients will be, if they fit
    left to right     carries S_fwd and dS_rev; reads those; writes all gradients

The arithmetic of a chunk has two forms. `anchored.py` is fast, and exact for gates that do not forget too much within
half a chunk; `halving.py` is exact for all. A program takes the first and looks at the smallest exponents that it met;
if one is below BOUND, or NaN, it takes the second and writes all its results again.

A program holds the states `[BV, BK]` in registers; a V above BV is cut into blocks, which are independent: o, dv and
rows of the states belong to one block each, while dq, dk and dg are sums over the blocks, left to the caller to add.

A sequence longer than `launch.SEGMENT` is cut, so that few long ones fill a GPU too. Two small kernels come first then:
`segment_kernel` finds what each segment but the last adds to a state, `combine_kernel` the states that enter each
segment. The main kernels take the segments in reverse: what was read last may still be in the L2 cache.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vig_ref.fused.anchored import backward_anchored, forward_anchored, least
from vig_ref.fused.blocks import ROWS, ahead, dot, exp2, load, load_any_gate, scratch, sequence, sums, total
from vig_ref.fused.halving import backward_halving, forward_halving

#: Arguments whose values Triton need not know: otherwise it compiles anew where one is 1, or a multiple of 16.
SIZES = ["H", "T", "SEGMENT", "SEGMENTS"]


@triton.jit
def _wait(DEPENDENT: tl.constexpr):
    """Until the kernel before has ended. DEPENDENT: this one may begin earlier, which hides what a launch takes."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def _exact(lowest, BOUND: tl.constexpr):
    """Whether the fast path was exact: no exponent is NaN or below BOUND."""
    return tl.min((lowest >= BOUND).to(tl.int32)) == 1


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, g_fwd, g_rev, o, share, p_S_enter, scale, H, T, K, V, SEGMENT,
    FWD: tl.constexpr, REV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr, BOUND: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """o = scale * (sum over the directions of q S).  FWD, REV: which directions there are.

    share: where the reverse scan leaves its share of o, which is o itself if it is the only scan.
    p_S_enter: for each (batch, head) and block of V, SEGMENTS states that enter, of S_fwd, then as many of S_rev.
    SEGMENT: tokens of a segment of this call. INDEX: the integers of tokens, and of all offsets inside a sequence.
    """
    _wait(DEPENDENT)
    SEGMENTS = tl.num_programs(2)
    i_bh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_s = (SEGMENTS - 1 - tl.program_id(2)).to(INDEX)
    i_b, i_h = i_bh // H, i_bh % H
    i_block = i_bh * tl.num_programs(1) + i_v
    q, k = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0)
    v, o = sequence(v, i_b, i_h, i_v * BV), sequence(o, i_b, i_h, i_v * BV)
    share = sequence(share, i_b, i_h, i_v * BV)
    V -= i_v * BV
    start = i_s * (SEGMENT // C)
    end = tl.minimum(start + SEGMENT // C, tl.cdiv(T, C))
    i_enter = i_block * 2 * SEGMENTS + i_s
    lowest = tl.zeros((ROWS // 2, BK), ACC)
    if REV:
        g_rev = sequence(g_rev, i_b, i_h, 0)
        lowest = forward_anchored(
            q, k, v, g_rev, share, None, p_S_enter, i_enter + SEGMENTS, scale, start, end, T, K, V,
            True, C, BK, BV, ACC, DOT, STAGES,
        )  # fmt: skip
    tl.debug_barrier()  # what some threads of the program wrote, others read below
    if FWD:
        g_fwd = sequence(g_fwd, i_b, i_h, 0)
        lowest_fwd = forward_anchored(
            q, k, v, g_fwd, o, share if REV else None, p_S_enter, i_enter, scale, start, end, T, K, V,
            False, C, BK, BV, ACC, DOT, STAGES,
        )  # fmt: skip
        lowest = least(lowest, lowest_fwd)
    if not _exact(lowest, BOUND):
        tl.debug_barrier()  # the fast path's last reads come before what is written over them
        if REV:
            forward_halving(
                q, k, v, g_rev, share, None, p_S_enter, i_enter + SEGMENTS, scale, start, end, T, K, V,
                True, C, LEVELS, BK, BV, ACC, DOT, LIMIT,
            )  # fmt: skip
        tl.debug_barrier()
        if FWD:
            forward_halving(
                q, k, v, g_fwd, o, share if REV else None, p_S_enter, i_enter, scale, start, end, T, K, V,
                False, C, LEVELS, BK, BV, ACC, DOT, LIMIT,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    q, k, v, g_fwd, g_rev, do, dq, dk, dv, dg_fwd, dg_rev, p_S_rev, p_dS_fwd, p_S_enter, p_dS_enter,
    scale, H, T, K, V, SEGMENT,
    FWD: tl.constexpr, REV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr, BOUND: tl.constexpr,
    STAGES: tl.constexpr, STATES_STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """All gradients of `forward_kernel` in one launch; the forward pass saves no chunk's states."""
    _wait(DEPENDENT)
    SEGMENTS = tl.num_programs(2)
    i_bh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_s = (SEGMENTS - 1 - tl.program_id(2)).to(INDEX)
    i_b, i_h = i_bh // H, i_bh % H
    i_block = i_bh * tl.num_programs(1) + i_v
    q, k = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0)
    v, do = sequence(v, i_b, i_h, i_v * BV), sequence(do, i_b, i_h, i_v * BV)
    i_part = i_v * (tl.num_programs(0) // H) + i_b  # every block of V has its own dq, dk and dg: stacked along B
    dq, dk = sequence(dq, i_part, i_h, 0), sequence(dk, i_part, i_h, 0)
    dv = sequence(dv, i_b, i_h, i_v * BV)
    if FWD:
        g_fwd, dg_fwd = sequence(g_fwd, i_b, i_h, 0), sequence(dg_fwd, i_part, i_h, 0)
    if REV:
        g_rev, dg_rev = sequence(g_rev, i_b, i_h, 0), sequence(dg_rev, i_part, i_h, 0)
    V -= i_v * BV
    start = i_s * (SEGMENT // C)
    end = tl.minimum(start + SEGMENT // C, tl.cdiv(T, C))
    if p_S_rev is None:  # states go to the gradients' memory, and tiles are full: masks need not look at features
        K = BK
        V = BV
    else:
        i_state = (i_block * SEGMENTS + i_s) * (SEGMENT // C) * BV * BK
        p_S_rev += i_state
        p_dS_fwd += i_state
    i_enter = i_block * 2 * SEGMENTS + i_s
    lowest = backward_anchored(
        q, k, v, g_fwd, g_rev, do, dq, dk, dv, dg_fwd, dg_rev, p_S_rev, p_dS_fwd, p_S_enter, p_dS_enter, i_enter,
        scale, start, end, T, K, V, SEGMENTS, FWD, REV, C, BK, BV, ACC, DOT, STAGES, STATES_STAGES,
    )  # fmt: skip
    if not _exact(lowest, BOUND):
        tl.debug_barrier()  # the fast path's last reads come before what is written over them
        backward_halving(
            q, k, v, g_fwd, g_rev, do, dq, dk, dv, dg_fwd, dg_rev, p_S_rev, p_dS_fwd, p_S_enter, p_dS_enter,
            i_enter, scale, start, end, T, K, V, SEGMENTS, FWD, REV, C, LEVELS, BK, BV, ACC, DOT, LIMIT,
        )  # fmt: skip


@triton.jit
def _add_up(
    x, y, g, start, end, T, K, V,
    LEFT: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the chunks `start .. end` alone add to a state that goes to the left (or right), and the log decay there.

    y^T (x * decay to the far end): a plain sum, no exponent positive. The chunk at that end comes first, so that decay,
    from the chunk at hand to the end, is known. x, y, OWN: see `segment_kernel`.
    """
    S = tl.zeros((BV, BK), ACC)
    decay = tl.zeros((ROWS, BK), ACC)
    for i in tl.range(end - start, num_stages=STAGES):
        n = start + i if LEFT else end - 1 - i
        b_g = load_any_gate(g, n * C, T, K, C, BK, ACC, LIMIT)
        b = tl.reshape(sums(ahead(LEFT, OWN, C), b_g, DOT), (C // ROWS, ROWS, BK)) + decay[None, :, :]
        b_xE = load(x, n * C, T, K, C, BK).to(ACC) * exp2(tl.reshape(b, (C, BK)), DOT)
        S = dot(load(y, n * C, T, V, C, BV, TRANSPOSED=True), b_xE, S, DOT)
        decay += total(b_g, DOT)
    return S, decay


@triton.jit(do_not_specialize=SIZES)
def segment_kernel(
    x, y, g_fwd, g_rev, p_state, p_total, scale, H, T, K, V, SEGMENT,
    FWD: tl.constexpr, REV: tl.constexpr, OWN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one segment alone adds to the state of one direction, and the log decay across it.

    The states are S, with x = k and y = v, or with OWN their gradients dS, with x = q and y = do, which go the other
    way and are decayed by the token's own gate too. scale: the factor of x, 1 for S and the operator's for dS.
    There is no program for the segment that a state comes to last: what leaves it enters no other.
    """
    i_row, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_bh, i_direction = i_row // 2, i_row % 2
    i_b, i_h = i_bh // H, i_bh % H
    # A state that goes to the left comes to the first one last.
    i_s = (tl.program_id(2) + (i_direction == (0 if OWN else 1))).to(INDEX)
    i_own = ((i_bh * tl.num_programs(1) + i_v) * 2 + i_direction) * (tl.num_programs(2) + 1) + i_s
    start = i_s * (SEGMENT // C)
    end = tl.minimum(start + SEGMENT // C, tl.cdiv(T, C))
    S = tl.zeros((BV, BK), ACC)
    decay = tl.zeros((ROWS, BK), ACC)
    x, y = sequence(x, i_b, i_h, 0), sequence(y, i_b, i_h, i_v * BV)
    V -= i_v * BV
    if FWD:
        g_fwd = sequence(g_fwd, i_b, i_h, 0)
        if i_direction == 0:
            S, decay = _add_up(x, y, g_fwd, start, end, T, K, V, OWN, OWN, C, BK, BV, ACC, DOT, LIMIT, STAGES)
    if REV:
        g_rev = sequence(g_rev, i_b, i_h, 0)
        if i_direction == 1:
            S, decay = _add_up(x, y, g_rev, start, end, T, K, V, not OWN, OWN, C, BK, BV, ACC, DOT, LIMIT, STAGES)
    tl.store(scratch(p_state, i_own, BV, BK), S * scale)
    row = tl.arange(0, ROWS)[:, None]
    tl.store(p_total + i_own * BK + tl.arange(0, BK)[None, :] + 0 * row, decay, mask=row == 0)  # rows are equal


@triton.jit
def _then(decay_1, S_1, decay_2, S_2):
    """One stretch of tokens, then another: decays multiply, and the first one's state is decayed by the second."""
    return decay_1 + decay_2, tl.exp2(decay_2) * S_1 + S_2


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    p_state, p_total, SEGMENTS,
    OWN: tl.constexpr, N: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """From what each segment adds to the states that enter each, in place: a scan over N >= SEGMENTS of them.

    A program does some rows of one state, in all segments.
    """
    _wait(DEPENDENT)
    i_block, i_direction, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_own = (i_block * 2 + i_direction) * SEGMENTS
    position = tl.arange(0, N)
    # In the order of the scan: S_fwd and dS_rev go to the right. What enters a segment left its predecessor: `last`.
    to_right = i_direction == (1 if OWN else 0)
    segment = tl.where(to_right, position, SEGMENTS - 1 - position)
    last = (i_own + tl.where(to_right, segment - 1, segment + 1))[:, None]
    there = ((position > 0) & (position < SEGMENTS))[:, None]
    cells = tl.arange(0, ROWS_AT_ONCE * BK)[None, :]
    cell = i_row * ROWS_AT_ONCE * BK + cells
    decay = tl.load(p_total + last * BK + cells % BK, mask=there, other=0.0)
    S = tl.load(p_state + last * BV * BK + cell, mask=there, other=0.0)
    _, S = tl.associative_scan((decay, S), 0, _then)
    tl.debug_barrier()  # all have read before any writes
    tl.store(p_state + (i_own + segment)[:, None] * BV * BK + cell, S, mask=(position < SEGMENTS)[:, None])
