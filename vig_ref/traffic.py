"""`vig-ref bench traffic`: how many bytes each layer reads and writes for a token and head, before anything is timed.

q, k, v, o in bfloat16 and log gates in float32, as a ViG under autocast has them. What is counted are requests of
kernels; a cache may serve some of them, memory never has to serve more. `vig_ref/bench.py` measures the time.

naive and chunked are made of PyTorch's operations, each of which reads its arguments and writes its results: they are
run without numbers, on the meta device, and counted. The fused layer's requests stand in its source, and are summed
here by hand.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vig_ref import chunked, naive

PASSES = ("forward", "forward+backward")
BF16, FP32 = 2, 4  # bytes
FACTORY = re.compile(r"aten::(new_\w+|\w+_like)$")  # operations that take a tensor for its shape, and read none of it


def floor(K: int, V: int) -> dict[str, int]:
    """Bytes a token and head that no implementation can do without: every input once, every result once, by pass."""
    inputs = _forward_inputs(K, V)
    backward = inputs + V * BF16 + inputs  # do; the gradients are as large as what they belong to
    return _passes(inputs + V * BF16, backward)


def fused(K: int, V: int, T: int, sequences: int = 1) -> dict[str, int]:
    """Bytes a token and head that the kernels of `vig_ref/fused` ask for, by pass.

    sequences: batches times heads, times blocks of V; where they are many, long ones are halved.
    """
    from vig_ref.fused import launch  # imported when it is used, as by vig_ref.ops

    share = 2 * V * BF16  # a share of o: written in the first walk, read in the second
    state = 2 * K * V * BF16 // launch.CHUNK  # a state of every chunk: likewise
    scan = (K + V) * BF16 + K * FP32  # what moves a state: k and v (or q and do), and the gate of the direction
    forward = floor(K, V)["forward"] + (2 * K + V) * BF16 + share  # q, k and v by both scans
    backward = floor(K, V)["forward+backward"] - floor(K, V)["forward"] + 2 * scan + 2 * state
    whole = K * V * FP32  # a state in full
    segments = launch._segments(T)
    if segments > 1 and sequences >= launch.MANY:  # where two programs meet, each leaves its state, and takes it up
        forward += 2 * 2 * whole // T
        backward += 2 * 2 * 2 * whole // T
    elif segments > 1:  # what each segment adds to both states, and what enters each, are written and read
        enter = scan + K * FP32 + 2 * 4 * segments * whole // T  # in one walk: both gates
        forward += enter
        backward += enter + 2 * segments * whole // T  # S was kept: it is but read
    return _passes(forward, backward)


def eager(function: Callable[..., Tensor], K: int, V: int, T: int) -> dict[str, int]:
    """Bytes a token and head that PyTorch's operations ask for when they run one after the other, by pass."""
    sizes = [(K, torch.bfloat16)] * 2 + [(V, torch.bfloat16)] + [(K, torch.float32)] * 2
    leaves = [torch.empty(1, 1, T, D, dtype=dtype, device="meta", requires_grad=True) for D, dtype in sizes]
    do = torch.empty(1, 1, T, V, dtype=torch.bfloat16, device="meta")
    with Requests() as requests:
        o = function(*leaves, scale=1.0)
        forward = requests.bytes
        torch.autograd.grad(o, leaves, do)
    return _passes(forward // T, (requests.bytes - forward) // T)


class Requests(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        memory = {_memory(x) for x in given}
        if func._schema.is_mutable or not all(_memory(x) in memory for x in made):  # else it is a view
            read = [] if FACTORY.match(func._schema.name) else given
            self.bytes += sum(_bytes(x) for x in read + made)
        return result


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """An expanded axis is one element in memory."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def _forward_inputs(K: int, V: int) -> int:
    return (2 * K + V) * BF16 + 2 * K * FP32


def _passes(forward: int, backward: int) -> dict[str, int]:
    return dict(zip(PASSES, (forward, forward + backward), strict=True))


def table(K: int = 32, V: int = 64, T: int = 196, long: int = 1024) -> str:
    """The count as a Markdown table, with the factor over the floor; without Triton, with a line that says so."""
    rows = {"naive": eager(naive.bidirectional_gla, K, V, T), "chunked": eager(chunked.bidirectional_gla, K, V, T)}
    left_out = []
    try:
        rows |= {
            f"fused, cut into segments (T = {long})": fused(K, V, long),
            f"fused, cut into halves (T = {long})": fused(K, V, long, sequences=10**9),
            f"fused, in one piece (T = {T})": fused(K, V, T),
        }
    except ImportError:
        left_out = ["", "The fused layer is not counted: that needs Triton, which is published for Linux only."]
    rows["floor"] = floor(K, V)
    lines = ["| bytes a token and head | " + " | ".join(PASSES) + " |", "|---|" + "---|" * len(PASSES)]
    for name, count in rows.items():
        cells = (f"{count[p]:,} ({count[p] / floor(K, V)[p]:.3g}x)" for p in PASSES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines + left_out)
