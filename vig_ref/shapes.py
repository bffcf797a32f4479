"""The operator on the meta device: one operation that knows its result's shape, and no arithmetic.

Whatever the backend, a model of meta tensors runs through this, so that its cost can be counted (vig_ref/flops.py) and
its shapes tried at sizes that no memory holds.
"""

import torch
from torch import Tensor


def bidirectional_gla(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float) -> Tensor:
    """See `vig_ref.bidirectional_gla`."""
    return torch.ops.vig_ref.gla_shape(q, k, v, [g_fwd, g_rev])


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool, scale: float) -> Tensor:
    """See `vig_ref.gla`."""
    return torch.ops.vig_ref.gla_shape(q, k, v, [g])


LIB = torch.library.Library("vig_ref", "FRAGMENT")
LIB.define("gla_shape(Tensor q, Tensor k, Tensor v, Tensor[] gates) -> Tensor")
LIB.define("gla_shape_backward(Tensor q, Tensor k, Tensor v, Tensor[] gates) -> Tensor[]")


# A fake is all that they have: torch 2.11 takes no `custom_op` for the meta device.
@torch.library.register_fake("vig_ref::gla_shape", lib=LIB)
def _(q, k, v, gates):
    return torch.empty_like(v)


@torch.library.register_fake("vig_ref::gla_shape_backward", lib=LIB)
def _(q, k, v, gates):
    return [torch.empty_like(x) for x in (q, k, v, *gates)]


def _save(ctx, inputs, output):
    q, k, v, gates = inputs
    ctx.save_for_backward(q, k, v, *gates)


def _differentiate(ctx, do):
    q, k, v, *gates = ctx.saved_tensors
    dq, dk, dv, *dg = torch.ops.vig_ref.gla_shape_backward(q, k, v, gates)
    return dq, dk, dv, dg


torch.library.register_autograd("vig_ref::gla_shape", _differentiate, setup_context=_save, lib=LIB)
