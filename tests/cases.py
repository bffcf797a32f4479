"""What the property tests draw: a shape, a gate regime, memory layouts and a seed; arrays follow from these."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import event
from hypothesis import strategies as st
from torch import Tensor

from vig_ref import chunked, fused, naive
from vig_ref.fused import launch
from vig_ref.tolerance import REGIMES, Inputs, draw

DIMS = (1, 3, 5, 8, 16, 17, 32, 60, 100)
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 49, 63, 64, 65, 130)  # around the chunk edges; others are drawn too
SCALES = (None, 1, 1.0, 0.02, 2.0, -0.5)


def heads_last(x: Tensor) -> Tensor:
    """`[B, H, T, D]` seen through `[B, T, H * D]`, as a projection leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def one_of_three(x: Tensor) -> Tensor:
    """A slice of a wider tensor, as q, k, v of one projection are."""
    return torch.cat([x + 1, x, x - 1], dim=3)[..., x.shape[3] : 2 * x.shape[3]]


def every_second(x: Tensor) -> Tensor:
    """No stride is 1."""
    return x.repeat_interleave(2, dim=3)[..., ::2]


def features_first(x: Tensor) -> Tensor:
    """The token axis is the contiguous one, as in an image `[B, H * D, T]`."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def offset_by_one(x: Tensor) -> Tensor:
    """Not aligned to 16 bytes."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """Stride 0: one value for all tokens and heads."""
    return x[:, :1, :1].expand_as(x)


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        torch.Tensor.contiguous, heads_last, one_of_three, every_second, features_first, offset_by_one, expanded,
    )
}


def in_red_zone(x: Tensor) -> Tensor:
    """The same view of a copy of its memory, with NaN before and behind: what reads there shows."""
    if not x.numel():
        return x
    margin = 64
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    first = margin + x.storage_offset() % margin  # as aligned as x
    memory = x.new_full((first + span + margin,), torch.nan)
    memory[first : first + span] = x.as_strided((span,), (1,))
    return memory.as_strided(x.shape, x.stride(), first)


class Arithmetic(NamedTuple):
    """What a layer computes with: the dtype of q, k, v, the rounding of its matrix products, and how to ask for it."""

    dtype: torch.dtype
    dot: str  # a key of vig_ref.tolerance.DOT_UNIT
    options: dict

    def __str__(self) -> str:
        return f"{self.dtype}, {self.dot}".removeprefix("torch.")


FLOAT64 = Arithmetic(torch.float64, "ieee", {})
FLOAT32 = Arithmetic(torch.float32, "ieee", {})
#: Where the fused layer runs here, and in which arithmetic: interpreted without a GPU, compiled with one.
FUSED_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED_ARITHMETIC = (
    [FLOAT32, FLOAT64]
    if FUSED_DEVICE == "cpu"
    else [
        FLOAT32,
        Arithmetic(torch.float32, "tf32", {"precision": "tf32"}),
        Arithmetic(torch.float16, "float16", {}),
        Arithmetic(torch.bfloat16, "bfloat16", {}),
    ]
)
interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="needs a machine without a GPU")
#: Every layer in every arithmetic that it has on this machine.
LAYERS = {"naive": naive, "chunked": chunked, "fused": fused}
VARIANTS = [(layer, how) for layer in ("naive", "chunked") for how in (FLOAT32, FLOAT64)] + [
    ("fused", how) for how in FUSED_ARITHMETIC
]


def device_of(layer: str) -> str:
    return FUSED_DEVICE if layer == "fused" else "cpu"


#: Tokens in a chunk: see `vig_ref.tolerance.bounds`.
CHUNK = {"naive": 1, "chunked": 64, "fused": fused.CHUNK}


@dataclass(frozen=True)
class Case:
    """Inputs of the operator in a few words: Hypothesis shrinks and prints these instead of arrays."""

    B: int = 1
    H: int = 2
    T: int = 17
    K: int = 5
    V: int = 7
    regime: str = "vig"
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    scale: float | None = None
    seed: int = 0

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """The tensors, in memory surrounded by NaN; gates of half precision inputs are float32, as a ViG has them."""
        event(f"regime: {self.regime}")
        event(f"layout: {self.layout}, gradient: {self.gradient_layout}")
        gate_dtype = torch.promote_types(dtype, torch.float32)
        sizes = (self.B, self.H, self.T, self.K, self.V)
        x = draw(*sizes, regime=self.regime, seed=self.seed, dtype=dtype, gate_dtype=gate_dtype, device=device)
        *tensors, do = x
        x = Inputs(*map(LAYOUTS[self.layout], tensors), LAYOUTS[self.gradient_layout](do))
        return Inputs(*map(in_red_zone, x))

    @property
    def scale_value(self) -> float:
        return self.K**-0.5 if self.scale is None else float(self.scale)


cases = st.builds(
    Case,
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.sampled_from(LENGTHS) | st.integers(1, 130),
    K=st.sampled_from(DIMS),
    V=st.sampled_from(DIMS),
    regime=st.sampled_from(sorted(REGIMES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    gradient_layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 2**16),
)
