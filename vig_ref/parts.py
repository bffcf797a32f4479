"""Three parts of a block of the model, each in one kernel: products of matrices with what follows, and two norms.

    log_gates    logsigmoid(x W_1 W_2 + b) / tau                                    the operator's gates    (Eq. 6)
    swiglu       SiLU(x W_gate) * x W_up                                            the MLP's hidden channels
    weigh        gate * norm_far(far) + (1 - gate) * norm_near(near), then SiLU     the mixer's branches    (Eq. 7)

PyTorch, compiled or not, writes every product to memory and reads it again for what follows. Here that is done while
the product is in registers: docs/performance.md, "Models", has the times of both. Nothing but the inputs is kept for
the backward pass, which computes the products again. The operator itself needs none of this; with backend "fused" the
model takes it where it may, see `vig_ref.model.one_kernel`.

Matrices are contiguous, row by row; row, col: where a block begins. W_1, W_2, W_gate, W_up lie as `nn.Linear` has them,
`[out, in]`; that they are transposed is left out above. gate: in `weigh` a sigmoid, in `swiglu` x W_gate before its
SiLU; s: a sigmoid. far, near: the global branch o, the local one. DOT: the dtype of the operands of products; FAST:
whether CUDA's fast division and logarithm are at hand, as they are on a GPU.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from vig_ref.fused.blocks import LOG2E
from vig_ref.fused.launch import INTERPRETED, _cdiv, _device, _refuse
from vig_ref.ops import product_dtype

LN2 = tl.constexpr(0.6931471805599453)
#: Rows (tokens) and columns of a block of the result, columns of x at once; the fastest of ten or so for ViG-T on an
#: H200. Of `weigh`: rows, each the channels of a head.
GATES = dict(BM=32, BN=64, BD=64, num_warps=2, num_stages=3)
SWIGLU = dict(BM=128, BN=64, BD=32, num_warps=4, num_stages=3)
WEIGH = dict(BM=16, num_warps=2)


@triton.jit
def block(p, row, col, rows, cols, BR: tl.constexpr, BC: tl.constexpr):
    """Addresses `[BR, BC]` in a matrix of rows x cols, and the mask of what lies in it."""
    i = row + tl.arange(0, BR)[:, None]
    j = col + tl.arange(0, BC)[None, :]
    return p + (i.to(tl.int64) * cols + j), (i < rows) & (j < cols)


@triton.jit
def load(p, row, col, rows, cols, BR: tl.constexpr, BC: tl.constexpr, DTYPE: tl.constexpr):
    """A block, zeros where the matrix ends."""
    p, there = block(p, row, col, rows, cols, BR, BC)
    return tl.load(p, mask=there, other=0.0).to(DTYPE)


@triton.jit
def store(p, x, row, col, rows, cols):
    p, there = block(p, row, col, rows, cols, x.shape[0], x.shape[1])
    tl.store(p, x.to(p.dtype.element_ty), mask=there)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """To a few ulp; 0 for x below -87, where it would be less than 2^-126."""
    return divided(1.0, 1 + tl.exp2(x * -LOG2E), FAST)


@triton.jit
def divided(x, y, FAST: tl.constexpr):
    """x / y; fast, to 2 ulp, and 0 for y from 2^126 on."""
    if FAST:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def log2(x, FAST: tl.constexpr):
    """For x from 1 to 2; fast, to 2^-22, and not below 0, since no gate is above."""
    if FAST:
        return tl.maximum(libdevice.fast_log2f(x), 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.log2(x)


@triton.jit
def log_gates_kernel(
    x, W_1, W_2, b, g, M, D, R, N, TAU: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All N gates of BM tokens. x W_1, `[BM, BR]`, stays in registers, rounded as an operand."""
    row = tl.program_id(0) * BM
    low = tl.zeros((BM, BR), tl.float32)
    for d in range(0, D, BD):
        b_W = load(W_1, 0, d, R, D, BR, BD, DOT)
        low = tl.dot(load(x, row, d, M, D, BM, BD, DOT), b_W.T, low, input_precision="ieee")
    low = low.to(DOT)
    for col in range(0, N, BN):
        z = tl.dot(low, load(W_2, col, 0, N, R, BN, BR, DOT).T, input_precision="ieee")
        z = (z + load(b, 0, col, 1, N, 1, BN, tl.float32)) * LOG2E
        # log2 sigmoid(z) for z in base 2, without an overflow
        store(g, (tl.minimum(z, 0) - log2(1 + tl.exp2(-tl.abs(z)), FAST)) * (LN2 / TAU), row, col, M, N)


@triton.jit
def gate_and_up(
    x, W, row, col, M, D, N, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """x W_gate and x W_up, `[BM, BN]`. W has the N rows of W_gate, then those of W_up."""
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for d in range(0, D, BD):
        b_x = load(x, row, d, M, D, BM, BD, DOT)
        gate = tl.dot(b_x, load(W, col, d, N, D, BN, BD, DOT).T, gate, input_precision="ieee")
        up = tl.dot(b_x, load(W + N * D, col, d, N, D, BN, BD, DOT).T, up, input_precision="ieee")
    return gate, up


@triton.jit
def swiglu_kernel(
    x, W, h, M, D, N, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr
):
    """BN of N hidden channels of BM tokens."""
    row = tl.program_id(0) // tl.cdiv(N, BN) * BM
    col = tl.program_id(0) % tl.cdiv(N, BN) * BN
    gate, up = gate_and_up(x, W, row, col, M, D, N, BM, BN, BD, DOT)
    store(h, divided(gate * up, 1 + tl.exp2(gate * -LOG2E), FAST), row, col, M, N)


@triton.jit
def swiglu_backward_kernel(
    x, W, dh, dz, M, D, N, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr
):
    """The gradient dz `[M, 2 N]` by both products: of gate, then of up."""
    row = tl.program_id(0) // tl.cdiv(N, BN) * BM
    col = tl.program_id(0) % tl.cdiv(N, BN) * BN
    gate, up = gate_and_up(x, W, row, col, M, D, N, BM, BN, BD, DOT)
    b_dh = load(dh, row, col, M, N, BM, BN, tl.float32)
    s = sigmoid(gate, FAST)
    p, there = block(dz, row, col, M, 2 * N, BM, BN)
    there = there & (col + tl.arange(0, BN) < N)[None, :]
    tl.store(p, (b_dh * up * s * (1 + gate * (1 - s))).to(p.dtype.element_ty), mask=there)
    tl.store(p + N, (b_dh * gate * s).to(p.dtype.element_ty), mask=there)


@triton.jit
def normed(x, V, eps):
    """x / sqrt(mean(x^2) + eps) row by row, and what x was multiplied by."""
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / V + eps)
    return x * r, r


@triton.jit
def through_norm(dy, y, r, V):
    """The gradient by x, where y = x r is `normed`."""
    return r * (dy - y * (tl.sum(dy * y, 1, keep_dims=True) / V))


@triton.jit
def weigh_kernel(
    z, far, near, w_far, w_near, y, M, V, eps_far, eps_near, SILU: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """BM of M rows, each the V channels of one head of one token."""
    row = tl.program_id(0) * BM
    gate = sigmoid(load(z, row, 0, M, V, BM, BV, tl.float32), FAST)
    b_far, _ = normed(load(far, row, 0, M, V, BM, BV, tl.float32), V, eps_far)
    b_near, _ = normed(load(near, row, 0, M, V, BM, BV, tl.float32), V, eps_near)
    b_far *= load(w_far, 0, 0, 1, V, 1, BV, tl.float32)
    b_near *= load(w_near, 0, 0, 1, V, 1, BV, tl.float32)
    b_y = gate * b_far + (1 - gate) * b_near
    if SILU:
        b_y *= sigmoid(b_y, FAST)
    store(y, b_y, row, 0, M, V)


@triton.jit
def weigh_backward_kernel(
    z, far, near, w_far, w_near, dy, dz, dfar, dnear, dw, M, V, eps_far, eps_near, SILU: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The same rows; dw `[programs, 2, V]`: what they add to the gradients by w_far and by w_near."""
    row = tl.program_id(0) * BM
    gate = sigmoid(load(z, row, 0, M, V, BM, BV, tl.float32), FAST)
    b_far, r_far = normed(load(far, row, 0, M, V, BM, BV, tl.float32), V, eps_far)
    b_near, r_near = normed(load(near, row, 0, M, V, BM, BV, tl.float32), V, eps_near)
    b_w_far = load(w_far, 0, 0, 1, V, 1, BV, tl.float32)
    b_w_near = load(w_near, 0, 0, 1, V, 1, BV, tl.float32)
    difference = b_far * b_w_far - b_near * b_w_near
    b_dy = load(dy, row, 0, M, V, BM, BV, tl.float32)
    if SILU:
        b_y = gate * difference + b_near * b_w_near
        s = sigmoid(b_y, FAST)
        b_dy *= s * (1 + b_y * (1 - s))
    store(dz, b_dy * difference * gate * (1 - gate), row, 0, M, V)
    b_dfar = b_dy * gate
    b_dnear = b_dy * (1 - gate)
    store(dw, tl.sum(b_dfar * b_far, 0, keep_dims=True), 2 * tl.program_id(0), 0, 2 * tl.num_programs(0), V)
    store(dw, tl.sum(b_dnear * b_near, 0, keep_dims=True), 2 * tl.program_id(0) + 1, 0, 2 * tl.num_programs(0), V)
    store(dfar, through_norm(b_dfar * b_w_far, b_far, r_far, V), row, 0, M, V)
    store(dnear, through_norm(b_dnear * b_w_near, b_near, r_near, V), row, 0, M, V)


# --- from PyTorch ----------------------------------------------------------------------------------------------------


def log_gates(x: Tensor, W_1: Tensor, W_2: Tensor, b: Tensor, tau: float) -> Tensor:
    """logsigmoid(x W_1^T W_2^T + b) / tau in float32: `[..., D]` to `[..., N]`, with W_1 `[R, D]`, W_2 `[N, R]`.

    Raises:
        ValueError: a device or dtype that the kernels do not take, shapes that do not fit together, or, without
            autocast, several dtypes.

    Source: ViG, Eq. 6.
    """
    (R, N), D = (len(W_1), len(W_2)), x.shape[-1]
    _check(x, W_1=(W_1, (R, D)), W_2=(W_2, (N, R)), b=(b, (N,)))
    return _log_gates(*_operands(x, W_1=W_1, W_2=W_2, b=b), tau)


def swiglu(x: Tensor, W: Tensor) -> Tensor:
    """SiLU(x W_gate^T) * x W_up^T: `[..., D]` to `[..., N]`, with W_gate above W_up in W `[2 N, D]`.

    Raises: see `log_gates`.
    """
    _check(x, W=(W, (len(W) // 2 * 2, x.shape[-1])))
    return _swiglu(*_operands(x, W=W))


def weigh(
    z: Tensor, far: Tensor, near: Tensor, w_far: Tensor, w_near: Tensor, eps_far: float, eps_near: float, silu: bool
) -> Tensor:
    """gate * RMSNorm(far) + (1 - gate) * RMSNorm(near), with gate = sigmoid(z), then SiLU if `silu`.

    z, far, near and the result: `[..., H V]`, of one dtype, with norms over V channels; w_far, w_near: their weights
    `[V]`. (Heads are no dimension of their own: near a convolution torch.compile may copy what has four dimensions into
    another layout.)

    Raises: see `log_gates`; ValueError also for an eps that is not positive.

    Source: ViG, Eq. 7; the norms are the released code's.
    """
    shape, weight = tuple(z.shape), (len(w_far),)
    _check(z, far=(far, shape), near=(near, shape), w_far=(w_far, weight), w_near=(w_near, weight))
    if not z.dtype == far.dtype == near.dtype:
        raise ValueError(f"expected one dtype of z, far and near, got {z.dtype}, {far.dtype}, {near.dtype}")
    if not min(eps_far, eps_near) > 0:
        raise ValueError(f"eps_far, eps_near: expected positive numbers, got {eps_far}, {eps_near}")
    if z.shape[-1] % len(w_far):
        raise ValueError(f"z: expected heads of {len(w_far)} channels, as w_far has, got {z.shape[-1]} channels")
    return _weigh(z, far, near, w_far, w_near, eps_far, eps_near, silu)


def _check(x: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> None:
    """Of x the dtype and the device, of the others the shape and the device."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected float32, float16 or bfloat16, got {x.dtype}; write it with PyTorch, or convert it")
    if not INTERPRETED and not x.is_cuda:
        raise ValueError(f"expected CUDA tensors, got {x.device.type}; write it with PyTorch, or move them")
    for name, (each, shape) in others.items():
        if tuple(each.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(each.shape)}")
        if each.device != x.device:
            raise ValueError(f"{name}: expected the first tensor's device, {x.device}, got {each.device}")


def _operands(x: Tensor, **weights: Tensor) -> list[Tensor]:
    """In autocast's dtype where it is on, as `F.linear` has them; else of one dtype."""
    dtype, autocast = product_dtype(x), torch.is_autocast_enabled(x.device.type)
    for name, each in weights.items():
        if each.dtype != x.dtype and not autocast:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {each.dtype}; convert one of them")
    return [each.to(dtype) for each in (x, *weights.values())]


@torch.library.custom_op("vig_ref::log_gates", mutates_args=())
def _log_gates(x: Tensor, W_1: Tensor, W_2: Tensor, b: Tensor, tau: float) -> Tensor:
    g = _empty(x, (*x.shape[:-1], len(W_2)), torch.float32)
    if g.numel():
        (N, R), D = W_2.shape, x.shape[-1]
        M = g.numel() // N
        with _device(x):
            log_gates_kernel[(_cdiv(M, GATES["BM"]),)](
                *(each.contiguous() for each in (x, W_1, W_2, b)), g, M, D, R, N, tau,
                BR=max(16, triton.next_power_of_2(R)), **_arithmetic(x), **GATES,
            )  # fmt: skip
    return g


@torch.library.custom_op("vig_ref::swiglu", mutates_args=())
def _swiglu(x: Tensor, W: Tensor) -> Tensor:
    h = _empty(x, (*x.shape[:-1], len(W) // 2), x.dtype)
    if h.numel():
        D, N = x.shape[-1], h.shape[-1]
        M = h.numel() // N
        with _device(x):
            swiglu_kernel[(_cdiv(M, SWIGLU["BM"]) * _cdiv(N, SWIGLU["BN"]),)](
                x.contiguous(), W.contiguous(), h, M, D, N, **_arithmetic(x), **SWIGLU
            )
    return h


@torch.library.custom_op("vig_ref::swiglu_backward", mutates_args=())
def _swiglu_backward(x: Tensor, W: Tensor, dh: Tensor) -> Tensor:
    dz = _empty(x, (*x.shape[:-1], len(W)), x.dtype)
    if dz.numel():
        D, N = x.shape[-1], dh.shape[-1]
        M = dh.numel() // N
        with _device(x):
            swiglu_backward_kernel[(_cdiv(M, SWIGLU["BM"]) * _cdiv(N, SWIGLU["BN"]),)](
                x.contiguous(), W.contiguous(), dh.contiguous(), dz, M, D, N, **_arithmetic(x), **SWIGLU
            )
    return dz


@torch.library.custom_op("vig_ref::weigh", mutates_args=())
def _weigh(
    z: Tensor, far: Tensor, near: Tensor, w_far: Tensor, w_near: Tensor, eps_far: float, eps_near: float, silu: bool
) -> Tensor:
    y = _empty(z, z.shape, z.dtype)
    if y.numel():
        V = len(w_far)
        M = y.numel() // V
        with _device(z):
            weigh_kernel[(_cdiv(M, WEIGH["BM"]),)](
                *(each.contiguous() for each in (z, far, near, w_far, w_near)), y, M, V, eps_far, eps_near, silu,
                BV=triton.next_power_of_2(V), FAST=not INTERPRETED, **WEIGH,
            )  # fmt: skip
    return y


@torch.library.custom_op("vig_ref::weigh_backward", mutates_args=())
def _weigh_backward(
    z: Tensor, far: Tensor, near: Tensor, w_far: Tensor, w_near: Tensor, dy: Tensor, eps_far: float, eps_near: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dz, dfar, dnear, dw = _weigh_gradients(z, w_far)
    if dz.numel():
        V = len(w_far)
        with _device(z):
            weigh_backward_kernel[(len(dw),)](
                *(each.contiguous() for each in (z, far, near, w_far, w_near, dy)), dz, dfar, dnear, dw,
                dz.numel() // V, V, eps_far, eps_near, silu, BV=triton.next_power_of_2(V),
                FAST=not INTERPRETED, **WEIGH,
            )  # fmt: skip
    return dz, dfar, dnear, dw


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a result of x."""
    return x.new_empty(shape, dtype=dtype)


def _weigh_gradients(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for dz, dfar, dnear, and what each program adds to the gradients by the weights w."""
    dz, dfar, dnear = (_empty(z, z.shape, z.dtype) for _ in range(3))
    programs = _cdiv(z.numel() // len(w), WEIGH["BM"])
    return dz, dfar, dnear, _empty(z, (programs, 2, len(w)), torch.float32)


def _arithmetic(x: Tensor) -> dict:
    """Operands have the dtype of x. (The interpreter would multiply the bit patterns of bfloat16.)"""
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
    return {"DOT": tl.float32 if INTERPRETED else dot, "FAST": not INTERPRETED}


@_log_gates.register_fake
def _(x, W_1, W_2, b, tau):
    return _empty(x, (*x.shape[:-1], len(W_2)), torch.float32)


@_swiglu.register_fake
def _(x, W):
    return _empty(x, (*x.shape[:-1], len(W) // 2), x.dtype)


@_swiglu_backward.register_fake
def _(x, W, dh):
    return _empty(x, (*x.shape[:-1], len(W)), x.dtype)


@_weigh.register_fake
def _(z, *_):
    return _empty(z, z.shape, z.dtype)


@_weigh_backward.register_fake
def _(z, far, near, w_far, *_):
    return _weigh_gradients(z, w_far)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.numbers = [x for x in inputs if not isinstance(x, Tensor)]


def _rows(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


def _differentiate_log_gates(ctx, dg):
    x, W_1, W_2, b = ctx.saved_tensors
    (tau,) = ctx.numbers
    low = F.linear(x, W_1)
    z = F.linear(low, W_2, b).float()
    dz = (dg * torch.sigmoid(-z) / tau).to(x.dtype)
    dlow = dz @ W_2
    for_x, for_W_1, for_W_2, for_b, _ = ctx.needs_input_grad
    return (
        dlow @ W_1 if for_x else None,
        _rows(dlow).T @ _rows(x) if for_W_1 else None,
        _rows(dz).T @ _rows(low) if for_W_2 else None,
        _rows(dz).sum(0) if for_b else None,
        None,
    )


def _differentiate_swiglu(ctx, dh):
    x, W = ctx.saved_tensors
    dz = _swiglu_backward(x, W, dh)
    for_x, for_W = ctx.needs_input_grad
    return dz @ W if for_x else None, _rows(dz).T @ _rows(x) if for_W else None


def _differentiate_weigh(ctx, dy):
    z, far, near, w_far, w_near = ctx.saved_tensors
    dz, dfar, dnear, dw = _weigh_backward(z, far, near, w_far, w_near, dy, *ctx.numbers)
    dw_far, dw_near = dw.sum(0)
    return dz, dfar, dnear, dw_far.to(w_far.dtype), dw_near.to(w_near.dtype), None, None, None


_log_gates.register_autograd(_differentiate_log_gates, setup_context=_save)
_swiglu.register_autograd(_differentiate_swiglu, setup_context=_save)
_weigh.register_autograd(_differentiate_weigh, setup_context=_save)
_swiglu_backward.register_autograd(_refuse)
_weigh_backward.register_autograd(_refuse)
