"""The kernels: a program takes one (batch, head), or a segment of a long one, and walks its chunks.

A walk to the right meets tokens in the order of the forward scan; the reverse scan is the forward scan of what a walk
to the left meets. Forward, one scan after the other: two states and what belongs to them would not fit in registers.

    to the left       carries S_rev; leaves its share of o, as a rule where o will be
    to the right      carries S_fwd; adds the other share, and writes o

Backward, the gradients of a chunk need S from one side and dS from the other, so that states are written out:

    to the left       carries S_rev and dS_fwd; writes both for every chunk: where its gradients will be, if they fit
    to the right      carries S_fwd and dS_rev; reads those; writes all gradients

The scan that goes along a walk is its own; the gradient of the opposite scan's state goes the same way. Each of the two
walks is a launch: the first needs few registers, so that more programs share a multiprocessor.

The arithmetic of a chunk has two forms. `anchored.py` is fast, and exact for gates that do not forget too much within
half a chunk; `halving.py` is exact for all. A program takes the first and looks at the smallest exponents that it met;
if one is below BOUND, or NaN, it takes the second and writes all its results again. Backward, the first walk meets all
exponents that the second will, and decides for it.

A program holds the states `[BV, BK]` in registers; a V above BV is cut into blocks, which are independent: o, dv and
rows of the states belong to one block each, while dq, dk and dg are sums over the blocks, left to the caller to add.

A sequence longer than `launch.SEGMENT` is cut. If there are enough of them to fill a GPU, and both gates are there and
of one dtype, into two halves, each met by a program from its outer end, and then by the other: `half_kernel`, and
`backward_kernel` with HALVES. (The halves of `halving.py` are others: those of a chunk.)

    first launch      half 0: S_fwd ->        half 1:        <- S_rev        shares of o (backward: states) are left
    second launch     half 0:        <- S_rev half 1: S_fwd ->               and found, and o (the gradients) written

The states go from one launch to the next through memory; no program waits for another, or meets a token twice.
Otherwise into as many segments as it takes, and two small kernels come first: `segment_kernel` finds what each segment
adds to the states, `combine_kernel` what enters each segment.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vig_ref.fused.anchored import forward_anchored, gradients_anchored, least, states_anchored
from vig_ref.fused.blocks import (
    ROWS,
    C,
    ahead,
    carry,
    chunk,
    dot,
    entering,
    exp2,
    load,
    load_any_gate,
    scratch,
    sequence,
    sums,
    total,
)  # fmt: skip
from vig_ref.fused.halving import forward_halving, gradients_halving, states_halving

#: Arguments whose values Triton need not know: otherwise it compiles anew where one is 1, or a multiple of 16.
SIZES = ["H", "T", "SEGMENT", "SEGMENTS"]
#: Numbers of a state that a program of `combine_kernel` does.
CELLS = tl.constexpr(128)


@triton.jit
def _wait(DEPENDENT: tl.constexpr):
    """Until the kernel before has ended. DEPENDENT: this one may be launched earlier, which hides what that takes
    (CUDA's programmatic dependent launch; `launch_pdl` asks for it).

    The kernel before may be another library's. If it was launched early, too, it has to wait in turn, as all such do.
    """
    if DEPENDENT:
        gdc_wait()


@triton.jit
def _exact(lowest, BOUND: tl.constexpr):
    """Whether the fast path was exact: no exponent is NaN or below BOUND."""
    return tl.min((lowest >= BOUND).to(tl.int32)) == 1


@triton.jit
def _program(H, INDEX: tl.constexpr, BACK: tl.constexpr = False):
    """Of a program: its batch, head, block of V, segment (of halves: its own direction), and the first three as one.

    BACK: sequences and segments from the last on. What the kernel before, in the other order, read or wrote last may
    still be in the L2 cache.
    """
    i_bh, i_v, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(INDEX)
    if BACK:
        i_bh, i_s = tl.num_programs(0) - 1 - i_bh, tl.num_programs(2) - 1 - i_s
    return i_bh // H, i_bh % H, i_v, i_s, i_bh * tl.num_programs(1) + i_v


@triton.jit
def _chunks(i_s, T, SEGMENT):
    """A segment's leftmost chunk, and how many there are."""
    start = i_s * (SEGMENT // C)
    return start, tl.minimum(SEGMENT // C, tl.cdiv(T, C) - start)


@triton.jit
def _first(start, count, step):
    """The chunk of a segment that a walk meets first."""
    return start if step > 0 else start + count - 1


@triton.jit
def _places(i_block, i_s):
    """Where a segment has its state of the forward scan, and of the reverse scan: see p_S_enter in `forward_kernel`."""
    i_fwd = i_block * 2 * tl.num_programs(2) + i_s
    return i_fwd, i_fwd + tl.num_programs(2)


@triton.jit
def _own(fwd, rev, step, DENSE: tl.constexpr):
    """The sequences of the own and of the opposite scan. DENSE: features of both are contiguous."""
    right = step > 0
    own, opp = tl.where(right, fwd[0], rev[0]), tl.where(right, rev[0], fwd[0])
    own_t, opp_t = tl.where(right, fwd[1], rev[1]), tl.where(right, rev[1], fwd[1])
    if DENSE:
        return (own, own_t, 1), (opp, opp_t, 1)
    else:
        return (own, own_t, tl.where(right, fwd[2], rev[2])), (opp, opp_t, tl.where(right, rev[2], fwd[2]))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, g_fwd, g_rev, o, share, p_S_enter, scale, H, T, K, V, SEGMENT,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, BOUND: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """o = scale * (sum over the directions of q S), of those that have a gate.

    share: where the reverse scan leaves its share of o, which is o itself if it is the only scan.
    p_S_enter: for each (batch, head) and block of V, the S_fwd that enters each segment, and then the S_rev.
    SEGMENT: tokens of a segment of this call. INDEX: the integers of tokens, and of all offsets inside a sequence.
    """
    _wait(DEPENDENT)
    i_b, i_h, i_v, i_s, i_block = _program(H, INDEX, True)
    q, k = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0)
    v, o = sequence(v, i_b, i_h, i_v * BV), sequence(o, i_b, i_h, i_v * BV)
    share = sequence(share, i_b, i_h, i_v * BV)
    V -= i_v * BV
    start, count = _chunks(i_s, T, SEGMENT)
    end = start + count - 1
    i_fwd, i_rev = _places(i_block, i_s)
    lowest = tl.zeros((ROWS // 2, BK), ACC)
    if g_rev is not None:
        g_rev = sequence(g_rev, i_b, i_h, 0)
        S = entering(p_S_enter, i_rev, BV, BK, ACC)
        _, lowest = forward_anchored(q, k, v, g_rev, share, None, S, scale, end, count, -1, T, K, V, DOT, STAGES, False)
    tl.debug_barrier()  # what some threads of the program wrote, others read below
    if g_fwd is not None:
        g_fwd = sequence(g_fwd, i_b, i_h, 0)
        S = entering(p_S_enter, i_fwd, BV, BK, ACC)
        _, lowest_fwd = forward_anchored(
            q, k, v, g_fwd, o, share if g_rev is not None else None, S, scale, start, count, 1, T, K, V,
            DOT, STAGES, False,
        )  # fmt: skip
        lowest = least(lowest, lowest_fwd)
    if not _exact(lowest, BOUND):
        tl.debug_barrier()  # the fast path's last reads come before what is written over them
        if g_rev is not None:
            S = entering(p_S_enter, i_rev, BV, BK, ACC)
            forward_halving(q, k, v, g_rev, share, None, S, scale, end, count, -1, T, K, V, DOT)
        tl.debug_barrier()
        if g_fwd is not None:
            S = entering(p_S_enter, i_fwd, BV, BK, ACC)
            forward_halving(
                q, k, v, g_fwd, o, share if g_rev is not None else None, S, scale, start, count, 1, T, K, V, DOT
            )


@triton.jit(do_not_specialize=SIZES)
def half_kernel(
    q, k, v, g_fwd, g_rev, o, share, p_S_meet, scale, H, T, K, V, SEGMENT,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, BOUND: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, DEPENDENT: tl.constexpr, DENSE: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for two halves, of SEGMENT tokens and of the rest, in two launches.

    A program has one scan, and carries its state through one half, then with SECOND through the other. The first time
    it leaves its share of o; the second time it finds the other scan's.  p_S_meet: the state of each in between.
    """
    _wait(DEPENDENT)
    i_b, i_h, i_v, i_direction, i_block = _program(H, INDEX, SECOND)
    step = 1 - 2 * i_direction.to(tl.int32)  # 0 is the forward scan, which begins in half 0
    q, k = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0)
    v, o = sequence(v, i_b, i_h, i_v * BV), sequence(o, i_b, i_h, i_v * BV)
    share = sequence(share, i_b, i_h, i_v * BV)
    g, g_opp = _own(sequence(g_fwd, i_b, i_h, 0), sequence(g_rev, i_b, i_h, 0), step, DENSE)
    V -= i_v * BV
    start, count = _chunks(1 - i_direction if SECOND else i_direction, T, SEGMENT)
    first = _first(start, count, step)
    p_S = scratch(p_S_meet, i_block * 2 + i_direction, BV, BK)
    S = tl.zeros((BV, BK), ACC)
    if SECOND:
        _, lowest = forward_anchored(
            q, k, v, g, o, share, tl.load(p_S), scale, first, count, step, T, K, V, DOT, STAGES, EARLY
        )
        if not _exact(lowest, BOUND):
            # The other share may be overwritten. That scan begins in this half.
            tl.debug_barrier()
            opposite = _first(start, count, -step)
            forward_halving(q, k, v, g_opp, share, None, S, scale, opposite, count, -step, T, K, V, DOT)
            tl.debug_barrier()
            forward_halving(q, k, v, g, o, share, tl.load(p_S), scale, first, count, step, T, K, V, DOT)
    else:
        S_end, lowest = forward_anchored(
            q, k, v, g, share, None, S, scale, first, count, step, T, K, V, DOT, STAGES, EARLY
        )
        if not _exact(lowest, BOUND):
            tl.debug_barrier()
            S_end = forward_halving(q, k, v, g, share, None, S, scale, first, count, step, T, K, V, DOT)
        tl.store(p_S, S_end)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    q, k, v, g_fwd, g_rev, do, dq, dk, dv, dg_fwd, dg_rev, p_S, p_dS, p_S_enter, p_dS_enter, p_exact,
    scale, H, T, K, V, SEGMENT,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, DOT: tl.constexpr, BOUND: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr, DENSE: tl.constexpr, HALVES: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """All gradients of `forward_kernel` in two launches, a walk each; SECOND: the one that writes them.

    A direction's S is kept in the memory of its dg and of dv, its dS in that of its dg and of dq and dk. The scan that
    was the first walk's own is the second's opposite one: what was kept with dg_own is found with dg_opp.

    p_S, p_dS: memory for the states of all chunks, if they do not go where gradients will be.
    p_S_enter, p_dS_enter: as in `forward_kernel`; with HALVES where the first walk leaves, for the second, the state of
    a program's own scan and the gradient of the opposite one's, as p_S_meet in `half_kernel`: S_fwd and dS_rev come
    first, and then S_rev and dS_fwd.
    p_exact: for each program of the first walk, whether that found the fast path exact. Both walks meet the same sums
    of gates.
    """
    _wait(DEPENDENT)
    i_b, i_h, i_v, i_s, i_block = _program(H, INDEX, SECOND if HALVES else not SECOND)  # half 0, the longer one, first
    q, k = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0)
    v, do = sequence(v, i_b, i_h, i_v * BV), sequence(do, i_b, i_h, i_v * BV)
    i_part = i_v * (tl.num_programs(0) // H) + i_b  # every block of V has its own dq, dk and dg: stacked along B
    dq, dk = sequence(dq, i_part, i_h, 0), sequence(dk, i_part, i_h, 0)
    dv = sequence(dv, i_b, i_h, i_v * BV)
    if g_fwd is not None:
        g_fwd, dg_fwd = sequence(g_fwd, i_b, i_h, 0), sequence(dg_fwd, i_part, i_h, 0)
    if g_rev is not None:
        g_rev, dg_rev = sequence(g_rev, i_b, i_h, 0), sequence(dg_rev, i_part, i_h, 0)
    V -= i_v * BV
    if HALVES:
        i_own = i_block * 2 + i_s  # i_s is the own direction; 0 is forward, and begins in half 0
        i_opp = i_own
        step = 1 - 2 * i_s.to(tl.int32)
        i_s = 1 - i_s if SECOND else i_s
        g_own, g_opp = _own(g_fwd, g_rev, step, DENSE)
        dg_own, dg_opp = _own(dg_fwd, dg_rev, step, True)
    elif SECOND:
        i_own, i_opp = _places(i_block, i_s)
        step: tl.constexpr = 1
        g_own, g_opp, dg_own, dg_opp = g_fwd, g_rev, dg_fwd, dg_rev
    else:
        i_opp, i_own = _places(i_block, i_s)
        step: tl.constexpr = -1
        g_own, g_opp, dg_own, dg_opp = g_rev, g_fwd, dg_rev, dg_fwd
    start, count = _chunks(i_s, T, SEGMENT)
    if p_S is None:  # states go to the gradients' memory, and tiles are full: masks need not look at features
        K = BK
        V = BV
    else:
        i_state = i_block * tl.cdiv(T, C) * BV * BK
        p_S += i_state
        p_dS += i_state
    first = _first(start, count, step)
    S = entering(None if HALVES and not SECOND else p_S_enter, i_own, BV, BK, ACC)
    dS = entering(None if HALVES and not SECOND else p_dS_enter, i_opp, BV, BK, ACC)
    p_exact += i_block * tl.num_programs(2) + i_s
    tensors = (q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS)
    if not SECOND:
        S_end, dS_end, lowest = states_anchored(*tensors, scale, first, count, step, T, K, V, DOT, STAGES)
        exact = _exact(lowest, BOUND)
        tl.store(p_exact, exact.to(tl.int32))
        if not exact:
            tl.debug_barrier()  # the fast path's last stores come before what is written over them
            S_end, dS_end = states_halving(*tensors, scale, first, count, step, T, K, V, DOT)
        if HALVES:
            tl.store(scratch(p_S_enter, i_own, BV, BK), S_end)
            tl.store(scratch(p_dS_enter, i_opp, BV, BK), dS_end)
    elif tl.load(p_exact) != 0:
        gradients_anchored(*tensors, scale, first, count, step, T, K, V, DOT, STAGES)
    else:
        gradients_halving(*tensors, scale, first, count, step, T, K, V, DOT)


@triton.jit(do_not_specialize=SIZES)
def segment_kernel(
    x, y, g_fwd, g_rev, p_state, p_total, scale, H, T, K, V, SEGMENT,
    GRADIENT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """What one segment alone adds to the states of both directions, and the log decays across it.

    The states are S, with x = k and y = v, or, with GRADIENT, their gradients dS, with x = q and y = do, which go the
    other way and are decayed by the token's own gate too. scale: the factor of x, 1 for S and the operator's for dS.

    One walk to the right, in which no exponent is positive. S_fwd or dS_rev goes along. To the one that goes against it
    each chunk adds its share, decayed by all gates to the left of it.
    """
    _wait(DEPENDENT)
    i_b, i_h, i_v, i_s, i_block = _program(H, INDEX)
    start, count = _chunks(i_s, T, SEGMENT)
    x, y = sequence(x, i_b, i_h, 0), sequence(y, i_b, i_h, i_v * BV)
    V -= i_v * BV
    if g_fwd is not None:
        g_fwd = sequence(g_fwd, i_b, i_h, 0)
    if g_rev is not None:
        g_rev = sequence(g_rev, i_b, i_h, 0)
    g_along, g_against = (g_rev, g_fwd) if GRADIENT else (g_fwd, g_rev)
    S_along = tl.zeros((BV, BK), ACC)
    S_against = S_along
    decay_along = tl.zeros((ROWS, BK), ACC)
    decay_against = decay_along
    for i in tl.range(count, num_stages=STAGES):
        at = chunk(start + i, 1)
        b_x = load(x, at, T, K, BK).to(ACC)
        b_yT = load(y, at, T, V, BV, TRANSPOSED=True)
        if g_along is not None:
            b_g = load_any_gate(g_along, at, T, K, BK, ACC)
            S_along = carry(S_along, b_g, b_x, tl.trans(b_yT), GRADIENT, DOT)
            decay_along += total(b_g, DOT)
        if g_against is not None:
            b_g = load_any_gate(g_against, at, T, K, BK, ACC)
            b_xE = b_x * exp2(sums(ahead(True, GRADIENT), b_g, DOT) + decay_against, DOT)  # C is ROWS
            S_against = dot(b_yT, b_xE, S_against, DOT)
            decay_against += total(b_g, DOT)
    i_fwd, i_rev = _places(i_block, i_s)
    i_along, i_against = (i_rev, i_fwd) if GRADIENT else (i_fwd, i_rev)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, BK)[None, :]  # rows are equal
    if g_along is not None:
        tl.store(scratch(p_state, i_along, BV, BK), S_along * scale)
        tl.store(p_total + i_along * BK + col + 0 * row, decay_along, mask=row == 0)
    if g_against is not None:
        tl.store(scratch(p_state, i_against, BV, BK), S_against * scale)
        tl.store(p_total + i_against * BK + col + 0 * row, decay_against, mask=row == 0)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    p_state, p_total, SEGMENTS,
    FWD: tl.constexpr, GRADIENT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """From what each segment adds to a state to what enters each, in place. A program does some cells of one state.

    What is fetched ahead lies in segments to come: no program writes there, or anywhere in another's cells.
    """
    _wait(DEPENDENT)
    i_block, i_direction = tl.program_id(0).to(tl.int64), tl.program_id(1) + (0 if FWD else 1)  # REV alone is 1, too
    cell = tl.program_id(2) * CELLS + tl.arange(0, CELLS)
    step = 1 if i_direction == (1 if GRADIENT else 0) else -1  # the scan's: S_fwd and dS_rev go to the right
    first = (i_block * 2 + i_direction) * SEGMENTS + _first(0, SEGMENTS, step)
    p_enter = p_state + first * BV * BK  # apart from what is loaded, and so not fetched ahead
    S = tl.zeros((CELLS,), p_state.dtype.element_ty)
    for i in tl.range(SEGMENTS, num_stages=4, loop_unroll_factor=4):
        i_segment = first + i * step
        decay = tl.load(p_total + i_segment * BK + cell % BK)
        added = tl.load(p_state + i_segment * BV * BK + cell)
        tl.store(p_enter + cell, S)
        S = tl.exp2(decay) * S + added
        p_enter += step * BV * BK
