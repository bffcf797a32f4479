"""The way from GLA to ViG, Table 3 of the paper, each row a model that runs; and GLA_Vim of Table 5.

A row is `ViG` with parts exchanged: the patch embedding, whether there are positions, and the mixer. The mixers go from
the last one backwards, each taking something away, so that nothing of ViG is written twice.

    ROADMAP["gla"]                    Causal           one scan
    ROADMAP["patch_embed"]            Causal           behind two overlapping convolutions
    ROADMAP["bidirectional"]          SharedGate       two scans, one gate
    ROADMAP["pos_embed"]              SharedGate       and positions
    ROADMAP["direction_wise"]         DirectionWise    two scans, two gates
    ROADMAP["gate_2d"]                Mixer            and the 3x3 branch behind its gate: this is ViG
    ROADMAP["fused"]                  Mixer            and computed by one kernel

The paper gives no code for these rows. What it leaves open is chosen as in GLA (the output gate, a SiLU behind a linear
layer with bias, which the 2D gate replaces) and as in ViG-T (norms, MLP, widths); the parameter counts agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vig_ref.model import FORGET_RANK, VIG_TINY, Mixer, PatchEmbed, ViG, ViGConfig
from vig_ref.ops import bidirectional_gla, gla


class DirectionWise(Mixer):
    """Two scans, each with its own gate; ViG's mixer without its local branch and 2D gate.

        q, k, v, g_fwd, g_rev = projections of x
        out = (norm_o(bidirectional_gla(q, k, v, g_fwd, g_rev)) * SiLU(x W_gate + b_gate)) W_out

    Arguments and shapes are those of `Mixer`.
    """

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto"):
        super().__init__(dim, num_heads, backend=backend)
        del self.dwconv, self.norm_local

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)  # [B, T, D]
        gate = self.split_heads(F.silu(self.gate_proj(tokens)))  # [B, T, H, V]
        y = gate * self.norm_o(self.scan(tokens).transpose(1, 2))
        return self.out_proj(y.flatten(2)).unflatten(1, x.shape[1:3])

    def scan(self, tokens: Tensor) -> Tensor:
        """`[B, T, D]` to o, `[B, H, T, V]`."""
        return bidirectional_gla(*self.project(tokens), backend=self.backend)


class SharedGate(DirectionWise):
    """Two scans with one gate: the "direct bidirectional modeling" of row 3, g_rev = g_fwd."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto"):
        super().__init__(dim, num_heads, backend=backend)
        self.forget_proj[1] = nn.Linear(FORGET_RANK, dim // 2)
        self.reset_parameters()

    def log_gates(self, local: Tensor) -> Tensor:
        g = super().log_gates(local)
        return torch.cat([g, g], dim=-1)


class Causal(SharedGate):
    """One scan, from the first token: GLA as it is used for text."""

    def scan(self, tokens: Tensor) -> Tensor:
        q, k, v, g, _ = self.project(tokens)
        return gla(q, k, v, g, backend=self.backend)


class Vim(Causal):
    """A second GLA layer reads from the last token, with projections of its own: how Vim makes a scan bidirectional."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto"):
        super().__init__(dim, num_heads, backend=backend)
        self.rev = Causal(dim, num_heads, backend=backend)
        del self.rev.gate_proj, self.rev.out_proj, self.rev.norm_o  # both layers share the way out

    def scan(self, tokens: Tensor) -> Tensor:
        q, k, v, g, _ = self.rev.project(tokens)
        return (super().scan(tokens) + gla(q, k, v, g, reverse=True, backend=self.backend)) / 2


class OneConvolution(nn.Module):
    """Image to tokens as in ViT and DeiT: one convolution whose patches do not overlap."""

    def __init__(self, dim: int, patch_size: int, in_chans: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


class Row(NamedTuple):
    """A row of Table 3 or 5: its parts, and the paper's name and number of parameters in millions."""

    patch_embed: Callable[[int, int, int], nn.Module]
    positions: bool
    mixer: Callable[..., Mixer]
    paper_name: str
    paper_params: float


ROADMAP = {
    "gla": Row(OneConvolution, False, Causal, "GLA", 5.72),
    "patch_embed": Row(PatchEmbed, False, Causal, "+ improved patch embedding layer", 5.75),
    "bidirectional": Row(PatchEmbed, False, SharedGate, "+ direct bidirectional modeling", 5.75),
    "pos_embed": Row(PatchEmbed, True, SharedGate, "+ absolute position embedding", 5.79),
    "direction_wise": Row(PatchEmbed, True, DirectionWise, "+ direction-wise α", 5.81),
    "gate_2d": Row(PatchEmbed, True, Mixer, "+ 2D gating locality injection", 5.83),
    "fused": Row(PatchEmbed, True, Mixer, "+ hardware-aware bidirection impl.", 5.83),
}
#: Table 5 compares ViG with GLA and with this.
GLA_VIM = Row(PatchEmbed, False, Vim, "GLA_Vim", 6.70)
ROWS = ROADMAP | {"gla_vim": GLA_VIM}


def create_row(name: str, *, config: ViGConfig = VIG_TINY, backend: str | None = None, **options: Any) -> ViG:
    """A row as a model: a `ViG` with the row's parts, and exactly a `ViG` in the last two.

    Args:
        name: one of `ROWS`.
        config: sizes; its `silu` concerns the last two rows alone.
        backend: None is "fused" in the row of that name and "auto" in the others.
        options: the other ones of `ViG`.

    Raises:
        ValueError: an unknown name, or what `ViG` refuses.

    Example:
        >>> model = create_row("direction_wise", num_classes=10)
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
    """
    if name not in ROWS:
        raise ValueError(f"unknown row {name!r}; choose one of {tuple(ROWS)}")
    row = ROWS[name]
    backend = backend or ("fused" if name == "fused" else "auto")
    model = ViG(config, backend=backend, **options)
    if row.patch_embed is not PatchEmbed:
        model.patch_embed = row.patch_embed(config.dim, config.patch_size, model.in_chans)
    if not row.positions:
        zeros = torch.zeros_like(model.pos_embed)
        del model.pos_embed
        model.register_buffer("pos_embed", zeros, persistent=False)
    if row.mixer is not Mixer:
        for block in model.all_blocks():
            block.mixer = row.mixer(config.dim, config.num_heads, backend=backend)
    return model
