"""From PyTorch to the kernels: what is allocated, what is launched, and how autograd and torch.compile see it.
"""

import math

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from vig_ref.fused import kernels

#: Tokens per chunk: the smallest tile that the tensor cores take, hence the fewest halvings.
CHUNK = 16
#: The tiles that hold a state in registers, (rows BK, columns BV): warps. The first that is large enough is taken; a V
#: larger than all is cut into blocks. The first two are the heads of ViG-H and ViG.
TILES = {(16, 32): 2, (32, 64): 4, (128, 64): 8}
MAX_K = max(BK for BK, _ in TILES)
PRECISIONS = ("ieee", "tf32")
#: Whether Triton was imported with TRITON_INTERPRET=1: a process interprets kernels or compiles them, never both.
INTERPRETED = isinstance(kernels.forward_kernel, InterpretedFunction)


def bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float, precision: str = "ieee"
) -> Tensor:
    """Eq. 6 in one launch. See `vig_ref.bidirectional_gla`.

    Args:
        precision: the products of float32 inputs, "ieee" or "tf32". float16 inputs always use tf32 operands (scores of
            large inputs do not fit in float16), bfloat16 inputs bfloat16 ones. The interpreter multiplies in float32.

    Raises:
        ValueError: a device, dtype, K or V that the kernel does not take, or an unknown precision.
    """
    return _checked(q, k, v, g_fwd, g_rev, scale / 2, precision)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool, scale: float, precision: str = "ieee"
) -> Tensor:
    """Eq. 5 in one launch. See `vig_ref.gla` and `bidirectional_gla` above."""
    return _checked(q, k, v, None if reverse else g, g if reverse else None, scale, precision)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, scale: float, precision: str
) -> Tensor:
    instead = "choose backend='chunked' or 'naive'"
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {PRECISIONS}")
    if INTERPRETED and precision != "ieee":
        raise ValueError(f"precision {precision!r} needs a GPU; Triton's interpreter multiplies as 'ieee' only")
    if not INTERPRETED and q.device.type != "cuda":
        raise ValueError(
            f"backend 'fused' needs CUDA tensors, got {q.device.type}; {instead}, or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernel in Triton's interpreter (slow, for learning and testing)"
        )
    if not INTERPRETED and q.dtype == torch.float64:
        raise ValueError(f"backend 'fused' takes float32, float16 and bfloat16, got float64; {instead}")
    if q.shape[3] > MAX_K:
        raise ValueError(f"backend 'fused' takes K up to {MAX_K}, got {q.shape[3]}; {instead}")
    return _forward(q, k, v, g_fwd, g_rev, scale, precision)


@torch.library.custom_op("vig_ref::gla_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, scale: float, precision: str
) -> Tensor:
    o = _empty(v)
    if o.numel():
        options = _options(q, v, g_fwd, g_rev, precision)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            kernels.forward_kernel[_grid(v, options)](
                *(_strided(x) for x in (q, k, v, g_fwd, g_rev, o)), _states(v, options), scale, *_sizes(q, v), **options
            )
    return o


@torch.library.custom_op("vig_ref::gla_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, do: Tensor, scale: float,
    precision: str,
) -> list[Tensor]:
    inputs = [x for x in (q, k, v, g_fwd, g_rev) if x is not None]
    grads = [_empty(x) for x in inputs]
    if not do.numel():
        return grads
    options = _options(q, v, g_fwd, g_rev, precision)
    blocks = _grid(v, options)[1]
    parts = grads if blocks == 1 else [grad if n == 2 else _parts(inputs[n], blocks) for n, grad in enumerate(grads)]
    dq, dk, dv, *dg = (_strided(x) for x in parts)
    with torch.cuda.device_of(q):
        kernels.backward_kernel[_grid(v, options)](
            *(_strided(x) for x in (q, k, v, g_fwd, g_rev, do)),
            dq, dk, dv, None if g_fwd is None else dg[0], None if g_rev is None else dg[-1],
            _states(v, options), _states(v, options), scale, *_sizes(q, v), **options,
        )  # fmt: skip
    for grad, part in zip(grads, parts, strict=True):
        if part is not grad:
            grad.copy_(part.unflatten(0, (blocks, -1)).sum(0))
    return grads


@_forward.register_fake
def _(q, k, v, g_fwd, g_rev, scale, precision):
    return _empty(v)


@_backward.register_fake
def _(q, k, v, g_fwd, g_rev, do, scale, precision):
    return [_empty(x) for x in (q, k, v, g_fwd, g_rev) if x is not None]


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, do):
    q, k, v, g_fwd, g_rev = ctx.saved_tensors
    dq, dk, dv, *dg = _backward(q, k, v, g_fwd, g_rev, do, ctx.scale, ctx.precision)
    dg_fwd = None if g_fwd is None else dg[0]
    dg_rev = None if g_rev is None else dg[-1]
    return dq, dk, dv, dg_fwd, dg_rev, None, None


def _refuse(ctx, *_):
    raise NotImplementedError("backend 'fused' has no second derivative; choose backend='chunked' or 'naive'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _empty(x: Tensor) -> Tensor:
    """Memory for a result like x, laid out token by token, as the projection behind the operator reads it."""
    B, H, T, D = x.shape
    return x.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))


def _parts(x: Tensor, blocks: int) -> Tensor:
    """Memory for what each block of V contributes to the gradient of x, stacked along B."""
    B, H, T, D = x.shape
    return x.new_empty(blocks * B, H, T, D, dtype=torch.promote_types(x.dtype, torch.float32))


def _states(v: Tensor, options: dict) -> Tensor:
    """Scratch memory for the state at the edge of every chunk."""
    blocks = math.prod(_grid(v, options))
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(blocks * triton.cdiv(v.shape[2], options["C"]), options["BK"], options["BV"], dtype=dtype)


def _strided(x: Tensor | None) -> tuple | None:
    return None if x is None else (x, *x.stride())


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[2], q.shape[3], v.shape[3]


def _grid(v: Tensor, options: dict) -> tuple[int, int]:
    """One program per (batch, head) and block of V."""
    return v.shape[0] * v.shape[1], triton.cdiv(v.shape[3], options["BV"])


def _options(q: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, precision: str) -> dict:
    """The compile-time constants of a launch."""
    if not INTERPRETED and torch.cuda.get_device_capability(q.device) < (8, 0):
        raise ValueError("backend 'fused' needs a GPU of compute capability 8.0 or newer; choose 'chunked' or 'naive'")
    K, V = q.shape[3], min(v.shape[3], max(BV for _, BV in TILES))
    tile = next((BK, BV) for BK, BV in TILES if BK >= K and BV >= V)
    dot = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(q.dtype, precision)
    if INTERPRETED:
        dot = "ieee"  # the interpreter multiplies the bit patterns of bfloat16
    return constants(tile, dot, g_fwd is not None, g_rev is not None, double=q.dtype == torch.float64)


def constants(tile: tuple[int, int], dot: str, fwd: bool, rev: bool, double: bool = False) -> dict:
    """The compile-time constants of a kernel for a tile of TILES, an arithmetic and the directions that there are."""
    return {
        "FWD": fwd, "REV": rev, "C": CHUNK, "LEVELS": CHUNK.bit_length() - 1, "BK": tile[0], "BV": tile[1],
        "ACC": kernels.tl.float64 if double else kernels.tl.float32, "DOT": dot, "LIMIT": 2000.0 if double else 300.0,
        "num_warps": TILES[tile], "num_stages": 1,
    }  # fmt: skip
