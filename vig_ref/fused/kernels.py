"""The kernels: a program takes one (batch, head), walks its chunks twice and computes both directions.

The arithmetic of a chunk is that of `vig_ref/chunked`: every decay is the exponential of a *sum of gates on one side of
a boundary*, never of a difference of sums, so that no gate in [-inf, 0] can overflow or cancel. Such a set of sums, one
row per token, is a product of a 0/1 matrix with the gates:

    E = exp(M g)          M[i, t] = 1 if the gate of token t lies between token i and the boundary

and so its gradient is plain chain rule:  dg += M^T (E * dE).  Everything below is this line with three kinds of
boundary: the edge where the scan enters the chunk, the edge where it leaves, and the middles found by halving.

    first sweep, right to left     carries S_rev, and in the backward pass dS_fwd; writes them at every chunk's edge
    second sweep, left to right    carries S_fwd, and in the backward pass dS_rev; reads those; writes all results

A program holds the states `[K, V]` in registers; a V above BV is cut into blocks, which are independent: o, dv and the
columns of S belong to one block each, while dq, dk and dg are sums over the blocks, left to the caller to add.

Gates are clamped to -LIMIT in base 2, far below the underflow of exp2, because 0 * inf is NaN in a matrix product.
Prefixes: `p_` pointer, `i_` index. A tensor arrives as a tuple (pointer, stride_b, stride_h, stride_t, stride_d).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# --- reading and writing ---------------------------------------------------------------------------------------------


@triton.jit
def _sequence(x, i_b, i_h, i_d):
    """One sequence of a tensor, from feature i_d on: (pointer, stride_t, stride_d). int64: offsets may exceed 2^31."""
    pointer, stride_b, stride_h, stride_t, stride_d = x
    return pointer + i_b * stride_b + i_h * stride_h + i_d * stride_d, stride_t, stride_d


@triton.jit
def _tile(x, i_t, T, D, C: tl.constexpr, BD: tl.constexpr):
    """Addresses `[C, BD]` of the tokens from i_t on, and the mask of those that exist."""
    pointer, stride_t, stride_d = x
    rows = i_t + tl.arange(0, C).to(tl.int64)
    cols = tl.arange(0, BD).to(tl.int64)
    return pointer + rows[:, None] * stride_t + cols[None, :] * stride_d, (rows < T)[:, None] & (cols < D)[None, :]


@triton.jit
def _load(x, i_t, T, D, C: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """Tokens i_t .. i_t + C, zeros behind the end."""
    pointers, mask = _tile(x, i_t, T, D, C, BD)
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
def _load_gate(g, i_t, T, K, C: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, LIMIT: tl.constexpr):
    """Log gates in base 2; 0 (keep all) behind the end."""
    return tl.maximum(_load(g, i_t, T, K, C, BK, ACC) * LOG2E, -LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store(x, value, i_t, T, D, C: tl.constexpr, BD: tl.constexpr):
    pointers, mask = _tile(x, i_t, T, D, C, BD)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _edge(p_states, i, BK: tl.constexpr, BV: tl.constexpr):
    """Addresses of the i-th `[BK, BV]` state in the scratch memory."""
    return p_states + i * BK * BV + tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]


# --- the arithmetic of a chunk ---------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, ACC: tl.constexpr, DOT: tl.constexpr):
    """Matrix product with operands rounded as DOT says ("ieee", "tf32" or "bf16"), accumulated in ACC."""
    if DOT == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), out_dtype=ACC)
    elif DOT == "tf32":
        return tl.dot(_round_to_tf32(a), _round_to_tf32(b), input_precision="tf32", out_dtype=ACC)
    else:
        return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _round_to_tf32(x):
    """The tensor cores cut a float32 off after 10 bits; adding half of the last one first rounds it to nearest."""
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN of all ones would wrap around to -0


@triton.jit
def _sums(M, g, ACC: tl.constexpr):
    """M g for a 0/1 matrix M, at full precision: an error here would be multiplied by the exponential."""
    return tl.dot(M.to(ACC), g, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _met(C: tl.constexpr, REVERSE: tl.constexpr):
    """`[C, C]`: 1 where the scan has met token t once it is at token i: b = M g is the inclusive cumulative sum."""
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    return t >= i if REVERSE else t <= i


@triton.jit
def _halves(half, C: tl.constexpr, REVERSE: tl.constexpr):
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
def _carry(S, g, x, y, ACC: tl.constexpr, DOT: tl.constexpr):
    """A state across a chunk: exp(total) * S + x^T y."""
    return tl.exp2(tl.sum(g, 0))[:, None] * S + _dot(tl.trans(x), y, ACC, DOT)


@triton.jit
def _next_state(S, k, v, g, REVERSE: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr):
    """S_out = exp(total) * S + (k exp(total - b))^T v, where total - b sums the gates not yet met at token j."""
    return _carry(S, g, k * tl.exp2(_sums(~_met(C, REVERSE), g, ACC)), v, ACC, DOT)


@triton.jit
def _scores(
    q, k, g, REVERSE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """A[i, j] = q_i . (k_j * decay from j to i) for the pairs j met before i, 0 for all others.  `[C, C]`"""
    A = tl.zeros((C, C), ACC)
    half = 1
    for _ in range(LEVELS):
        M, late, same = _halves(half, C, REVERSE)
        E = tl.exp2(_sums(M, g, ACC))
        A += tl.where(same, _dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), ACC, DOT), 0.0)
        half *= 2
    return A


@triton.jit
def _gradients(
    q, k, v, g, do, dA, S, dS,
    REVERSE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One direction of one chunk, backward. S: the state that enters; dS: the gradient of the state that leaves.

    Returns dq, dk, dg, the scores A, dv of the state, and the factors q exp(b) and k exp(total - b) of the two carries.
    The pair of a token with itself is the caller's: it belongs to both directions and to no gate.
    """
    dq = tl.zeros_like(q)
    dk = tl.zeros_like(k)
    A = tl.zeros((C, C), ACC)
    dg = tl.zeros_like(g) + (tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 1))[None, :]  # S_out = exp(total) * S + ...
    half = 1
    for _ in range(LEVELS):  # A = (q E) (k E)^T across every middle
        M, late, same = _halves(half, C, REVERSE)
        E = tl.exp2(_sums(M, g, ACC))
        qE = tl.where(late, q * E, 0.0)
        kE = tl.where(late, 0.0, k * E)
        A += tl.where(same, _dot(qE, tl.trans(kE), ACC, DOT), 0.0)
        dA_level = tl.where(same, dA, 0.0)
        dqE = tl.where(late, _dot(dA_level, kE, ACC, DOT), 0.0)
        dkE = tl.where(late, 0.0, _dot(tl.trans(dA_level), qE, ACC, DOT))
        dq += dqE * E
        dk += dkE * E
        dg += _sums(tl.trans(M), qE * dqE + kE * dkE, ACC)
        half *= 2
    M = _met(C, REVERSE)  # o = (q exp(b)) S
    E = tl.exp2(_sums(M, g, ACC))
    qE = q * E
    dqE = _dot(do, tl.trans(S), ACC, DOT)
    dq += dqE * E
    dg += _sums(tl.trans(M), qE * dqE, ACC)
    M = ~M  # S_out = ... + (k exp(total - b))^T v: the gates not yet met at token j
    E = tl.exp2(_sums(M, g, ACC))
    kE = k * E
    dkE = _dot(v, tl.trans(dS), ACC, DOT)
    dk += dkE * E
    dg += _sums(tl.trans(M), kE * dkE, ACC)
    return dq, dk, dg, A, _dot(kE, dS, ACC, DOT), qE, kE


# --- the two kernels -------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q, k, v, g_fwd, g_rev, o, p_S_rev, scale, H, T, K, V,
    FWD: tl.constexpr, REV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """o = scale * (sum over the directions of q S).  FWD, REV: which directions there are."""
    i_bh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_state = (i_bh * tl.num_programs(1) + i_v) * tl.cdiv(T, C)
    q, k = _sequence(q, i_b, i_h, 0), _sequence(k, i_b, i_h, 0)
    v, o = _sequence(v, i_b, i_h, i_v * BV), _sequence(o, i_b, i_h, i_v * BV)
    V -= i_v * BV
    N = tl.cdiv(T, C)
    if FWD:
        g_fwd = _sequence(g_fwd, i_b, i_h, 0)
    if REV:
        g_rev = _sequence(g_rev, i_b, i_h, 0)
        S_rev = tl.zeros((BK, BV), ACC)
        for n in range(N - 1, -1, -1):
            tl.store(_edge(p_S_rev, i_state + n, BK, BV), S_rev)
            b_k = _load(k, n * C, T, K, C, BK, ACC)
            b_v = _load(v, n * C, T, V, C, BV, ACC)
            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)
            S_rev = _next_state(S_rev, b_k, b_v, b_g, True, C, ACC, DOT)
        tl.debug_barrier()  # what some threads of the program wrote, others read below
    S_fwd = tl.zeros((BK, BV), ACC)
    for n in range(N):
        b_q = _load(q, n * C, T, K, C, BK, ACC)
        b_k = _load(k, n * C, T, K, C, BK, ACC)
        b_v = _load(v, n * C, T, V, C, BV, ACC)
        b_o = (FWD + REV) * tl.sum(b_q * b_k, 1)[:, None] * b_v  # token i reads itself, once in each direction
        A = tl.zeros((C, C), ACC)
        if REV:
            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)
            S_rev = tl.load(_edge(p_S_rev, i_state + n, BK, BV))
            b_o += _dot(b_q * tl.exp2(_sums(_met(C, True), b_g, ACC)), S_rev, ACC, DOT)
            A += _scores(b_q, b_k, b_g, True, C, LEVELS, ACC, DOT)
        if FWD:
            b_g = _load_gate(g_fwd, n * C, T, K, C, BK, ACC, LIMIT)
            b_o += _dot(b_q * tl.exp2(_sums(_met(C, False), b_g, ACC)), S_fwd, ACC, DOT)
            A += _scores(b_q, b_k, b_g, False, C, LEVELS, ACC, DOT)
            S_fwd = _next_state(S_fwd, b_k, b_v, b_g, False, C, ACC, DOT)
        b_o += _dot(A, b_v, ACC, DOT)
        _store(o, b_o * scale, n * C, T, V, C, BV)


@triton.jit
def backward_kernel(
    q, k, v, g_fwd, g_rev, do, dq, dk, dv, dg_fwd, dg_rev, p_S_rev, p_dS_fwd, scale, H, T, K, V,
    FWD: tl.constexpr, REV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """All gradients of `forward_kernel` in one launch; the states are computed again rather than kept."""
    i_bh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_state = (i_bh * tl.num_programs(1) + i_v) * tl.cdiv(T, C)
    q, k = _sequence(q, i_b, i_h, 0), _sequence(k, i_b, i_h, 0)
    v, do = _sequence(v, i_b, i_h, i_v * BV), _sequence(do, i_b, i_h, i_v * BV)
    i_part = i_v * (tl.num_programs(0) // H) + i_b  # every block of V has its own dq, dk and dg: stacked along B
    dq, dk = _sequence(dq, i_part, i_h, 0), _sequence(dk, i_part, i_h, 0)
    dv = _sequence(dv, i_b, i_h, i_v * BV)
    V -= i_v * BV
    N = tl.cdiv(T, C)
    if FWD:
        g_fwd, dg_fwd = _sequence(g_fwd, i_b, i_h, 0), _sequence(dg_fwd, i_part, i_h, 0)
    if REV:
        g_rev, dg_rev = _sequence(g_rev, i_b, i_h, 0), _sequence(dg_rev, i_part, i_h, 0)
    S_rev = tl.zeros((BK, BV), ACC)
    dS_fwd = tl.zeros((BK, BV), ACC)
    for n in range(N - 1, -1, -1):
        if REV:
            tl.store(_edge(p_S_rev, i_state + n, BK, BV), S_rev)
            b_k = _load(k, n * C, T, K, C, BK, ACC)
            b_v = _load(v, n * C, T, V, C, BV, ACC)
            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)
            S_rev = _next_state(S_rev, b_k, b_v, b_g, True, C, ACC, DOT)
        if FWD:
            tl.store(_edge(p_dS_fwd, i_state + n, BK, BV), dS_fwd)
            b_q = _load(q, n * C, T, K, C, BK, ACC)
            b_do = _load(do, n * C, T, V, C, BV, ACC) * scale
            b_g = _load_gate(g_fwd, n * C, T, K, C, BK, ACC, LIMIT)
            dS_fwd = _carry(dS_fwd, b_g, b_q * tl.exp2(_sums(_met(C, False), b_g, ACC)), b_do, ACC, DOT)
    tl.debug_barrier()  # what some threads of the program wrote, others read below
    S_fwd = tl.zeros((BK, BV), ACC)
    dS_rev = tl.zeros((BK, BV), ACC)
    for n in range(N):
        b_q = _load(q, n * C, T, K, C, BK, ACC)
        b_k = _load(k, n * C, T, K, C, BK, ACC)
        b_v = _load(v, n * C, T, V, C, BV, ACC)
        b_do = _load(do, n * C, T, V, C, BV, ACC) * scale
        self_dA = (FWD + REV) * tl.sum(b_do * b_v, 1)[:, None]  # token i reads itself, once in each direction
        b_dq = self_dA * b_k
        b_dk = self_dA * b_q
        b_dv = (FWD + REV) * tl.sum(b_q * b_k, 1)[:, None] * b_do
        dA = _dot(b_do, tl.trans(b_v), ACC, DOT)
        A = tl.zeros((C, C), ACC)
        if REV:
            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)
            S_rev = tl.load(_edge(p_S_rev, i_state + n, BK, BV))
            part = _gradients(b_q, b_k, b_v, b_g, b_do, dA, S_rev, dS_rev, True, C, LEVELS, ACC, DOT)
            part_dq, part_dk, b_dg, part_A, part_dv, from_edge, to_edge = part
            b_dq += part_dq
            b_dk += part_dk
            b_dv += part_dv
            A += part_A
            _store(dg_rev, b_dg, n * C, T, K, C, BK)
            dS_rev = _carry(dS_rev, b_g, from_edge, b_do, ACC, DOT)
        if FWD:
            b_g = _load_gate(g_fwd, n * C, T, K, C, BK, ACC, LIMIT)
            dS_fwd = tl.load(_edge(p_dS_fwd, i_state + n, BK, BV))
            part = _gradients(b_q, b_k, b_v, b_g, b_do, dA, S_fwd, dS_fwd, False, C, LEVELS, ACC, DOT)
            part_dq, part_dk, b_dg, part_A, part_dv, from_edge, to_edge = part
            b_dq += part_dq
            b_dk += part_dk
            b_dv += part_dv
            A += part_A
            _store(dg_fwd, b_dg, n * C, T, K, C, BK)
            S_fwd = _carry(S_fwd, b_g, to_edge, b_v, ACC, DOT)
        b_dv += _dot(tl.trans(A), b_do, ACC, DOT)
        _store(dq, b_dq, n * C, T, K, C, BK)
        _store(dk, b_dk, n * C, T, K, C, BK)
        _store(dv, b_dv, n * C, T, V, C, BV)
