"""How many multiply-accumulates a model needs: PyTorch's FLOP counter, taught what the operator costs.

The operator is counted by its definition, not by how a layer computes it. Per token, head and direction,

    S = ... + k^T v        K V multiply-accumulates
    o = ... + q S          K V

and twice that in the backward pass (dk, dv; dq, dS), as for any matrix product. As usual, and as in the paper, matrix
products and convolutions are counted; the elementwise work is not: the decay exp(g) * S, norms, activations.

Importing this module registers the formula, for the fused layer's kernels and for the meta device. There, every layer
is one operation (vig_ref/shapes.py), so that they all cost the same, and an image of 2048x2048 costs no time.
"""

import contextlib
import copy
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vig_ref import shapes  # noqa: F401  (defines torch.ops.vig_ref.gla_shape)

with contextlib.suppress(ImportError):  # no Triton, no kernels to count
    from vig_ref import fused  # noqa: F401  (defines torch.ops.vig_ref.gla_forward)


def operator_flops(q_shape: torch.Size, v_shape: torch.Size, directions: int) -> int:
    """FLOPs of the operator, two for each multiply-accumulate: 4 K V per token, head and direction."""
    return 4 * directions * math.prod(q_shape) * v_shape[-1]


@register_flop_formula(torch.ops.vig_ref.gla_shape)
def _(q, k, v, gates, *args, out_shape=None, **kwargs) -> int:
    return operator_flops(q, v, len(gates))


@register_flop_formula(torch.ops.vig_ref.gla_shape_backward)
def _(q, k, v, gates, *args, out_shape=None, **kwargs) -> int:
    return 2 * operator_flops(q, v, len(gates))


if hasattr(torch.ops.vig_ref, "gla_forward"):

    @register_flop_formula(torch.ops.vig_ref.gla_forward)
    def _(q, k, v, g_fwd, g_rev, *args, out_shape=None, **kwargs) -> int:
        return operator_flops(q, v, (g_fwd is not None) + (g_rev is not None))

    @register_flop_formula(torch.ops.vig_ref.gla_backward)
    def _(q, k, v, g_fwd, g_rev, *args, out_shape=None, **kwargs) -> int:
        return 2 * operator_flops(q, v, (g_fwd is not None) + (g_rev is not None))


def count_macs(model: nn.Module, img_size: int | tuple[int, int] = 224, *, in_chans: int = 3) -> dict[str, int]:
    """Multiply-accumulates of one image through a model, by module: `""` is the whole, `"blocks.0.mixer"` a part.

    Any model of images, ours or not. A copy of it is counted on the meta device; the model itself is not touched.

    Example:
        >>> count_macs(create_model("vig_tiny"))[""] / 1e9
        1.167...
    """
    model = copy.deepcopy(model).to("meta").eval()
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, in_chans, height, width, device="meta"))
    total, root = counter.get_total_flops() // 2, f"{type(model).__name__}."
    parts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return {"": total} | {name.removeprefix(root): macs for name, macs in parts.items() if name.startswith(root)}
