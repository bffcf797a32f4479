"""Reading, writing and multiplying blocks of tokens: what all kernels are made of.

A tensor arrives as a tuple (pointer, stride_b, stride_h, stride_t, stride_d) and becomes a sequence, (pointer,
stride_t, stride_d), once the batch and the head are known. A state is held transposed, `[BV, BK]`: the decay then
scales columns, and the tensor cores' result is laid out as their next operand needs it.

A walk visits chunks in one order and each chunk's tokens in the same: step is 1 where it goes to the right, as the
forward scan does, or -1. A chunk is read in the order of the walk, `at` = (its first token on the way, step), so that
in a block left always means met before: the reverse scan is the forward scan of what is read from the other end.

Prefixes: `p_` pointer, `i_` index, `b_` block of one chunk (b alone is the cumulative log gate). qE is q * E, dqE the
gradient by that product; a last T means transposed. ACC: dtype of sums. REVERSE: whether a scan goes against the walk.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
#: Rows of the smallest matrix product. One thread has rows r and r + 8 of its result: `anchored._between` puts two sums
#: into rows 0 to 7 and 8 to 15, and to split them moves nothing.
ROWS = tl.constexpr(16)
#: Tokens per chunk: the smallest tile that the tensor cores take. Less is forgotten, so that the fast path serves more
#: gates, and a program needs fewer registers.
C = tl.constexpr(16)


# --- reading and writing ---------------------------------------------------------------------------------------------


@triton.jit
def sequence(x, i_b, i_h, i_d):
    """One sequence of a tensor, from feature i_d on. Indices have 64 bits: offsets may exceed 2^31."""
    pointer, stride_b, stride_h, stride_t, stride_d = x
    return pointer + i_b * stride_b + i_h * stride_h + i_d * stride_d, stride_t, stride_d


@triton.jit
def chunk(n, step):
    """`at` of the n-th chunk from the left."""
    return n * C + (C - 1) * (1 - step) // 2, step


@triton.jit
def tokens(at):
    """The tokens `[C]` of a chunk in the order of the walk; integers as wide as its first one's."""
    return at[0] + tl.arange(0, C) * at[1]


@triton.jit
def tile(x, at, T, D, BD: tl.constexpr):
    """Addresses `[C, BD]` of a chunk, and the mask of what exists. Offsets are as wide as its first token."""
    pointer, stride_t, stride_d = x
    rows = tokens(at)
    cols = tl.arange(0, BD)
    offsets = rows[:, None] * stride_t + cols.to(rows.dtype)[None, :] * stride_d
    return pointer + offsets, (rows < T)[:, None] & (cols < D)[None, :]


@triton.jit
def load(x, at, T, D, BD: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """A chunk in the dtype it has, zeros behind the end: `[C, BD]`, or `[BD, C]`."""
    pointers, mask = tile(x, at, T, D, BD)
    if TRANSPOSED:
        return tl.load(tl.trans(pointers), mask=tl.trans(mask), other=0.0)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_gate(g, at, T, K, BK: tl.constexpr, ACC: tl.constexpr):
    """Log gates in base 2, for exp2; 0 (keep all) behind the end. Gradients are by the natural ones,
    without ln 2: 2^(g log2 e) = e^g is its own derivative."""
    return load(g, at, T, K, BK).to(ACC) * LOG2E


@triton.jit
def load_any_gate(g, at, T, K, BK: tl.constexpr, ACC: tl.constexpr):
    """The same for gates that may be -inf. Clamped, as 0 * inf is NaN in a matrix product; 2^-LIMIT rounds to 0."""
    LIMIT: tl.constexpr = 2000.0 if tl.float64 == ACC else 300.0
    return tl.maximum(load_gate(g, at, T, K, BK, ACC), -LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store(x, value, at, T, D):
    pointers, mask = tile(x, at, T, D, value.shape[1])
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def scratch(p, i, BV: tl.constexpr, BK: tl.constexpr):
    """Addresses of the i-th state `[BV, BK]` in scratch memory."""
    return p + i.to(tl.int64) * BV * BK + tl.arange(0, BV)[:, None] * BK + tl.arange(0, BK)[None, :]


@triton.jit
def entering(p_enter, i, BV: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """The i-th state that enters; zeros where a scan begins."""
    if p_enter is None:
        return tl.zeros((BV, BK), ACC)
    else:
        return tl.load(scratch(p_enter, i, BV, BK))


@triton.jit
def other_share(share, at, T, V, BV: tl.constexpr, ACC: tl.constexpr):
    """What the other direction adds to o, if it has left anything.

    Every thread has read it before any writes o over it: between the two the chunk's products have their barriers.
    """
    if share is None:
        return tl.zeros((C, BV), ACC)
    else:
        return load(share, at, T, V, BV).to(ACC)


@triton.jit
def store_share(o, b_o, at, T, V):
    """The result, or the share that the scan which comes first leaves to the other.

    Stored as `[2, C / 2, BV]`: so Triton exchanges results between threads in one round rather than two.
    """
    pointer, stride_t, stride_d = o
    BV: tl.constexpr = b_o.shape[1]
    row = at[0] + (tl.arange(0, 2)[:, None, None] * (C // 2) + tl.arange(0, C // 2)[None, :, None]) * at[1]
    col = tl.arange(0, BV)[None, None, :]
    p = pointer + (row * stride_t + col.to(row.dtype) * stride_d)
    b_o = tl.reshape(b_o, (2, C // 2, BV)).to(p.dtype.element_ty)
    tl.store(p, b_o, mask=(row < T) & (col < V))


# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr):
    """acc + a b, with operands rounded as DOT says ("ieee", "tf32" or "bf16"), accumulated in the dtype of acc."""
    a, b = operand(a, acc.dtype, DOT), operand(b, acc.dtype, DOT)
    PRECISION: tl.constexpr = "tf32" if DOT == "tf32" else "ieee"
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def operand(x, ACC: tl.constexpr, DOT: tl.constexpr):
    """x as `dot` sees it.

    The tensor cores cut a float32 off after 10 bits; adding half of the last one first rounds it to nearest.
    """
    if DOT == "bf16":
        return x.to(tl.bfloat16)
    elif DOT == "tf32":
        x = x.to(tl.float32)
        rounded = (x.to(tl.int32, bitcast=True) + 0x1000 & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # a NaN of all ones would wrap around to -0
    else:
        return x.to(ACC)


@triton.jit
def sums(M, x, DOT: tl.constexpr):
    """M x for a matrix M of 0, 1 and -1, at high precision: the exponential multiplies an error in a sum of gates.

    For bfloat16 inputs x is cut into two bfloat16 halves, exact to 16 bits, and the tensor cores add each.
    """
    acc = tl.zeros((M.shape[0], x.shape[1]), x.dtype)
    if DOT == "bf16":
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        M = M.to(tl.bfloat16)
        return tl.dot(M, high.to(tl.bfloat16), tl.dot(M, (x - high).to(tl.bfloat16), acc))
    else:
        return tl.dot(M.to(x.dtype), x, acc, input_precision="ieee", out_dtype=x.dtype)


@triton.jit
def exp2(x, DOT: tl.constexpr):
    """2^x. With bfloat16 CUDA's own, which flushes what is below the normal numbers: one instruction, not three."""
    if DOT == "bf16":
        return libdevice.exp2(x)
    else:
        return tl.exp2(x)


@triton.jit
def negative(x):
    """-x. Triton makes -x a subtraction from 0; this becomes a sign of the instruction that takes it."""
    return x * -1.0


@triton.jit
def scale_columns(S, factor):
    """S * factor, column by column. factor has R equal rows, 8 or 16: each thread then has the columns it needs."""
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    R: tl.constexpr = factor.shape[0]
    return tl.reshape(tl.reshape(S, (BV // R, R, BK)) * factor[None, :, :], (BV, BK))


@triton.jit
def ahead(LEFT: tl.constexpr, INCLUSIVE: tl.constexpr):
    """`[C, C]`: 1 where token t lies between i and the left (or right) edge. INCLUSIVE: also where t is i.

    For a decay from the edge to a query its own gate counts, for one from a key to the edge it does not.
    """
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    if LEFT:
        return t <= i if INCLUSIVE else t < i
    else:
        return t >= i if INCLUSIVE else t > i


@triton.jit
def total(g, DOT: tl.constexpr):
    """The log decay across a chunk, `[ROWS, BK]`: equal rows, as `scale_columns` wants them."""
    return sums(tl.full((ROWS, C), 1.0, g.dtype), g, DOT)


@triton.jit
def carry(S, g, x, y, INCLUSIVE: tl.constexpr, DOT: tl.constexpr):
    """A state across a whole chunk, to the edge where the walk leaves it: exp(total) * S + y^T (x * decay to there).

    INCLUSIVE: whether a token's own gate counts. For a state x is k, and it does not; for its gradient x is q.
    """
    xE = x.to(S.dtype) * exp2(sums(ahead(False, INCLUSIVE), g, DOT), DOT)
    decayed = scale_columns(S, exp2(total(g, DOT), DOT))
    return dot(tl.trans(y), xE, decayed, DOT)


# --- states kept for the second walk of the backward pass ------------------------------------------------------------


@triton.jit
def _in_gradients(n, dg, x_0, x_1, T, BV: tl.constexpr, BK: tl.constexpr):
    """Addresses `[BV, BK]` of a bfloat16 state in the memory of the n-th chunk's gradients, written later, and a mask.

    With BV = 64, and with BV = 32 the first line alone:

        rows 0 to 31      dg, float32: two rows a token
        rows 32 to 63     x_0, if that is dv: two rows a token
                          x_0, x_1, if they are dq, dk: one row a token each, 32 to 47 and 48 to 63; equal strides

    Features are contiguous. Only the last chunk lacks tokens, where states from the right are 0.
    """
    row = tl.arange(0, BV)[:, None]
    col = tl.arange(0, BK)[None, :]
    i_t = n * C
    token = i_t + row % (2 * C) // 2
    p = dg[0].to(tl.pointer_type(tl.bfloat16)) + (token * (2 * dg[1]) + row % 2 * BK + col)
    if BV > 2 * C:
        if x_1 is None:
            p_x = x_0[0] + (token * x_0[1] + row % 2 * BK + col)
        else:
            token = tl.where(row < 2 * C, token, i_t + row % C)
            p_x = tl.where(row < 3 * C, x_0[0], x_1[0]) + (token * x_0[1] + col)
        p = tl.where(row < 2 * C, p, p_x)
    return p, (token < T) & (col < BK)  # as wide as the state; there is no other column


@triton.jit
def keep(S, p_states, n, dg, x_0, x_1, T):
    """Keep the n-th chunk's state for the second walk: in scratch memory, or else where its gradients will be."""
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    if p_states is None:
        p, there = _in_gradients(n, dg, x_0, x_1, T, BV, BK)
        tl.store(p, S.to(p.dtype.element_ty), mask=there)
    else:
        p = scratch(p_states, n, BV, BK)
        tl.store(p, S.to(p.dtype.element_ty))


@triton.jit
def kept(p_states, n, dg, x_0, x_1, T, BV: tl.constexpr, BK: tl.constexpr):
    """The state that was kept. As in `other_share`, all have read it before any writes a gradient over it."""
    if p_states is None:
        p, there = _in_gradients(n, dg, x_0, x_1, T, BV, BK)
        return tl.load(p, mask=there, other=0.0)
    else:
        return tl.load(scratch(p_states, n, BV, BK))
