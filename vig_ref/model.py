"""ViG, read from top to bottom: patches, blocks of a mixer and an MLP, an average, a linear head.

First the parts, then the two families made of them: `ViG`, plain, and `HierarchicalViG` (the paper's ViG-H). What both
owe to the world around them, feature maps or another head, is in backbone.py.

Images and tokens stay on their grid, channels last: `[B, h, w, D]`, with T = h w tokens in row-major order. Only inside
a block they are a row. Letters: docs/notation.md. The architecture is the released one (github.com/hustvl/ViG, commit
dfb9d32); where the paper says otherwise, the docstring of the class says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from vig_ref.backbone import Backbone, new_head
from vig_ref.ops import bidirectional_gla, load_backend, product_dtype, resolve_backend

FORGET_RANK = 16  # W_alpha1: [D, 16], W_alpha2: [16, 2 H K]   (Eq. 6)
FORGET_TEMPERATURE = 16  # tau of Eq. 6: alpha = sigmoid(...) ** (1 / tau), a slow forgetting


@dataclass(frozen=True)
class ViGConfig:
    """What varies between plain ViGs. Each head has K = dim / (2 num_heads) and V = dim / num_heads."""

    dim: int
    """Width D of a token."""
    num_heads: int
    """Heads H of the operator; 2 num_heads divides dim."""
    drop_path: float = 0.0
    """Probability of skipping a branch of the last block in training; it grows linearly from 0 at the first block."""
    silu: bool = False
    """Whether a SiLU follows the depthwise convolution and another one precedes the mixer's output projection."""
    depth: int = 12
    """Number of blocks."""
    patch_size: int = 16
    """Pixels from one token to the next, an even number; see `PatchEmbed`."""

    def __post_init__(self):
        check_sizes(self.dim, self.num_heads, self.depth, self.drop_path)
        if self.patch_size < 2 or self.patch_size % 2:
            raise ValueError(f"patch_size: expected an even number of pixels, got {self.patch_size}")


@dataclass(frozen=True)
class HierarchicalConfig:
    """What varies between hierarchical ViGs, one entry a stage. Stages have a token every 4, 8, 16, ... pixels."""

    dims: tuple[int, ...]
    """Width D of a token."""
    num_heads: tuple[int, ...]
    """Heads H of the operator; 2 num_heads divides dims."""
    depths: tuple[int, ...]
    """Number of blocks."""
    drop_path: float = 0.0
    """Probability of skipping a branch of the last block in training; it grows linearly from 0 at the first block."""

    def __post_init__(self):
        if not len(self.dims) == len(self.num_heads) == len(self.depths) > 0:
            raise ValueError(
                f"dims, num_heads, depths: expected one entry a stage in each, got {self.dims}, {self.num_heads}, "
                f"{self.depths}"
            )
        for dim, num_heads, depth in zip(self.dims, self.num_heads, self.depths, strict=True):
            check_sizes(dim, num_heads, depth, self.drop_path)


def check_sizes(dim: int, num_heads: int, depth: int, drop_path: float) -> None:
    """What a row of blocks demands, in either family."""
    if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
        raise ValueError(f"dim: expected a multiple of 2 num_heads, got dim={dim}, num_heads={num_heads}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
    if depth < 1:
        raise ValueError(f"depth: expected at least 1 block, got {depth}")


VIG_TINY = ViGConfig(dim=192, num_heads=3, drop_path=0.0, silu=True)
PRESETS: dict[str, ViGConfig | HierarchicalConfig] = {
    "vig_tiny":
        VIG_TINY,
    "vig_small":
        ViGConfig(dim=384, num_heads=6, drop_path=0.2, silu=False),
    "vig_base":
        ViGConfig(dim=768, num_heads=12, drop_path=0.5, silu=False),
    "vig_h_tiny":
        HierarchicalConfig(dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 5, 2), drop_path=0.2),
    "vig_h_small":
        HierarchicalConfig(dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 17, 2), drop_path=0.3),
    "vig_h_base":
        HierarchicalConfig(dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 17, 2), drop_path=0.6),
}  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of the weight: float32 under autocast."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def one_kernel(x: Tensor, backend: str, modules: list[nn.Module], made: list[tuple]) -> Any:
    """`vig_ref.parts`, where a kernel of its may stand in for these modules and what follows them; else None.

    That is with backend "fused", on CUDA, where matrices are multiplied in 16 bits, and if all modules are `as_made`.
    Others are called as ever: one with a hook, or an adapter in its place. Forward-mode derivatives are PyTorch's, too:
    it would take that of a custom operator for 0. made: of each module its class and the names of its parameters.
    """
    if not x.is_cuda or resolve_backend(backend, x.device) != "fused":
        return None
    if product_dtype(x) not in (torch.bfloat16, torch.float16) or forward_ad._current_level >= 0:
        return None
    if _has_any_global_hook() or len(modules) != len(made):
        return None
    if not all(as_made(module, *how) for module, how in zip(modules, made, strict=True)):
        return None
    load_backend(backend, x.device)  # where Triton is missing, this says so
    from vig_ref import parts

    return parts


def as_made(module: nn.Module, kind: type, *parameters: str) -> bool:
    """Whether a module is of this very class with these parameters, plain tensors, and nobody listens or interferes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        type(module) is kind and not any(hooks) and "forward" not in vars(module) and tuple(own) == parameters
        and all(p.layout == torch.strided and not is_traceable_wrapper_subclass(p) for p in own.values())
    )  # fmt: skip


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a sample's branch with probability p and divide the kept ones by 1 - p."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class PatchConv(nn.Conv2d):
    """A square convolution with a padding of 1, for images: `[B, in_chans, H, W]` to `[B, out_chans, h, w]`.

    On CUDA, with fewer than 8 channels, it is one product of matrices: patches of the image times filters. cuDNN would
    fill the channels up to 8 with zeros; docs/performance.md, "Models", has the times of both. The product follows
    `torch.backends.cuda.matmul.allow_tf32` rather than `cudnn.allow_tf32`, and no attribute of a convolution that is
    set later, such as `padding_mode`.
    """

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int):
        super().__init__(in_chans, out_chans, kernel_size, stride, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return self.as_product(input) if input.is_cuda and self.in_channels < 8 else super().forward(input)

    def as_product(self, x: Tensor) -> Tensor:
        """The same function, on any device."""
        n, stride, filters = self.kernel_size[0], self.stride[0], self.weight.flatten(1)
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, n, stride).unfold(3, n, stride)  # [B, C, h, w, n, n]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [B, h, w, C n n]
        more = -filters.shape[1] % 8  # tensor cores want rows that begin at multiples of 16 bytes
        patches, filters = F.pad(patches, (0, more)), F.pad(filters, (0, more))  # frees the narrower copy
        return F.linear(patches, filters, self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Image to tokens: two overlapping convolutions, each with a LayerNorm over channels, an activation in between.

    With s = patch_size / 2, the first convolution has stride s and kernel s + 1, but at least 3; the second is 3x3
    with stride 2; both pad by 1. Patch 16 gives the released 9x9/8 and 3x3/2, patch 4 the 3x3/2 twice of ViG-H, and
    every even patch size p turns an image of p h x p w pixels into exactly h x w tokens.
    """

    def __init__(
        self, dim: int, patch_size: int, in_chans: int, activation: Callable[[Tensor], Tensor] = F.silu
    ):
        super().__init__()
        self.activation = activation
        stride = patch_size // 2
        self.conv1 = PatchConv(in_chans, dim // 2, max(stride + 1, 3), stride)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, padding=1)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).permute(0, 2, 3, 1)  # [B, C, height, width] -> [B, 2h, 2w, D/2]
        x = self.activation(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))  # [B, h, w, D]


class Mixer(nn.Module):
    """Mixes tokens: a local 3x3 branch, a global bidirectional one computed from it, and a gate that weighs the two.

        local      = dwconv3x3(x)                                     then SiLU if `silu`               (Eq. 7)
        q, k, v    = local W_q, local W_k, local W_v                                                    (Eq. 1)
        g_fwd, g_rev = logsigmoid(local W_alpha1 W_alpha2 + b_alpha) / 16                               (Eq. 6)
        o          = bidirectional_gla(q, k, v, g_fwd, g_rev)                                           (Eq. 6)
        gate       = sigmoid(local W_gate + b_gate)                                                     (Eq. 7)
        y          = gate * norm_o(o) + (1 - gate) * norm_local(local)          then SiLU if `silu`     (Eq. 7)
        out        = y W_out

    Against the paper: Eq. 7 has the gate on the local branch, the released code on the global one (the same function,
    with the gate projection negated); the two RMSNorms, over each head's V channels, are the code's.

    Args:
        dim: D, the width of a token.
        num_heads: H, with K = D / (2 H) and V = D / H.
        silu: whether the two SiLUs are there.

    Shapes: `[B, h, w, D]` to `[B, h, w, D]`. `backend` is a plain attribute, read at each call.
    """

    def __init__(self, dim: int, num_heads: int, *, silu: bool = False, backend: str = "auto"):
        super().__init__()
        self.dim, self.num_heads, self.silu, self.backend = dim, num_heads, silu, backend
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.qkv_proj = nn.Linear(dim, 2 * dim, bias=False)  # D/2 each for q and k, D for v
        self.forget_proj = nn.Sequential(nn.Linear(dim, FORGET_RANK, bias=False), nn.Linear(FORGET_RANK, dim))
        self.gate_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm_o = RMSNorm(dim // num_heads)
        self.norm_local = RMSNorm(dim // num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released initialisation of a plain ViG."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.startswith("norm"):
                nn.init.xavier_uniform_(parameter, gain=2**-2.5)

    def forward(self, x: Tensor) -> Tensor:
        # 1. Local branch: each token and its 8 neighbours.
        local = self.local(x)  # [B, T, D]
        # 2. Global branch: every token, in both directions.
        q, k, v, g_fwd, g_rev = self.project(local)  # [B, H, T, K or V]
        o = bidirectional_gla(q, k, v, g_fwd, g_rev, backend=self.backend).transpose(1, 2)  # [B, T, H, V]
        # 3. The gate decides, channel by channel, how much of each is taken.
        y = self.weigh(self.gate_proj(local), o, local)  # [B, T, D]
        return self.out_proj(y).unflatten(1, x.shape[1:3])

    def local(self, x: Tensor) -> Tensor:
        """The local branch: `[B, h, w, D]` to `[B, T, D]`."""
        local = self.dwconv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return F.silu(local) if self.silu else local

    def project(self, local: Tensor) -> tuple[Tensor, ...]:
        """The operator's inputs q, k, v, g_fwd, g_rev, `[B, H, T, K or V]`: views of two projections of `local`."""
        D = self.dim
        q, k, v = self.qkv_proj(local).split((D // 2, D // 2, D), dim=-1)
        g_fwd, g_rev = self.log_gates(local).chunk(2, dim=-1)
        return tuple(self.split_heads(t).transpose(1, 2) for t in (q, k, v, g_fwd, g_rev))

    def log_gates(self, local: Tensor) -> Tensor:
        """Log forget gates of both directions, `[B, T, 2 H K]`, in float32 at least: their sums over tokens need it."""
        layers = [self.forget_proj, *self.forget_proj.children()]
        made = [(nn.Sequential,), (nn.Linear, "weight"), (nn.Linear, "weight", "bias")]
        if parts := one_kernel(local, self.backend, layers, made):
            _, first, second = layers
            return parts.log_gates(local, first.weight, second.weight, second.bias, FORGET_TEMPERATURE)
        x = self.forget_proj(local)
        return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / FORGET_TEMPERATURE

    def weigh(self, z: Tensor, o: Tensor, local: Tensor) -> Tensor:
        """gate * norm_o(o) + (1 - gate) * norm_local(local) with gate = sigmoid(z).

        z, local and the result: `[B, T, D]`; o: `[B, T, H, V]`.
        """
        far, near = self.norm_o, self.norm_local
        parts = one_kernel(z, self.backend, [far, near], [(RMSNorm, "weight")] * 2)
        if parts and z.dtype == o.dtype == local.dtype and far.eps and near.eps:
            return parts.weigh(z, o.flatten(2), local, far.weight, near.weight, far.eps, near.eps, self.silu)
        gate = self.split_heads(torch.sigmoid(z))
        y = (gate * far(o) + (1 - gate) * near(self.split_heads(local))).flatten(2)
        return F.silu(y) if self.silu else y

    def split_heads(self, x: Tensor) -> Tensor:
        """`[B, T, H * n]` to `[B, T, H, n]`, without a copy."""
        return x.unflatten(-1, (self.num_heads, -1))


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x), with 8/3 dim hidden channels, rounded up to a multiple of `multiple_of`.

    `backend` is read at each call: with "fused", what is in brackets may be one kernel, see `one_kernel`.
    """

    def __init__(self, dim: int, multiple_of: int = 256, *, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        hidden = -(-8 * dim // (3 * multiple_of)) * multiple_of
        self.gate_up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if parts := one_kernel(x, self.backend, [self.gate_up_proj], [(nn.Linear, "weight")]):
            return self.down_proj(parts.swiglu(x, self.gate_up_proj.weight))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Mixes tokens, then channels, each as a residual branch behind a norm. Figure 2. `[B, h, w, D]`.

    Args:
        dim, num_heads, silu: see `Mixer`.
        drop_path: probability of skipping a branch in training.
        backend: the layer that computes the operator.
        norm: makes a norm over channels from `dim`; RMSNorm in a plain ViG, LayerNorm in a hierarchical one.
        multiple_of: see `SwiGLU`; 256 in a plain ViG, 32 in a hierarchical one.
    """

    def __init__(
        self, dim: int, num_heads: int, *, drop_path: float, backend: str, silu: bool = False,
        norm: Callable[[int], nn.Module] = RMSNorm, multiple_of: int = 256,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.mixer = Mixer(dim, num_heads, silu=silu, backend=backend)
        self.norm2 = norm(dim)
        self.mlp = SwiGLU(dim, multiple_of, backend=backend)
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.branches, x, use_reentrant=False)
        return self.branches(x)

    def branches(self, x: Tensor) -> Tensor:
        # As `[B, T, D]`: near a convolution torch.compile (find_nodes_prefer_channels_last in torch/_inductor/graph.py)
        # takes whatever has four dimensions for `[B, D, h, w]`, and would lay out sums with h side by side, not D.
        grid, x = x.shape[1:3], x.flatten(1, 2)
        x = x + self.drop_path(self.mixer(self.norm1(x).unflatten(1, grid)).flatten(1, 2))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.unflatten(1, grid)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """From 0 in the first block to `last` in the last one."""
    return [last * n / max(depth - 1, 1) for n in range(depth)]


class ViG(Backbone):
    """The plain ViG: tokens of one width through `depth` equal blocks.

        x      = patch_embed(images) + pos_embed
        x      = x + mixer(norm1(x));   x = x + mlp(norm2(x))          in every block
        logits = head(mean over tokens of norm(x))

    **Initialisation** is the released one: Xavier-uniform with gain 2^-2.5 in every weight of a mixer (also in the
    depthwise convolution, whose fan-out PyTorch counts as 9 D), normal(0, 0.02) in the MLPs and the head,
    truncated normal(0, 0.02) in pos_embed, 0 in biases of linear layers, PyTorch's default in the stem. Consequence:
    the global branch starts switched off: in ViG-T, norm_o sees a mean square of 5e-17, against an eps of 1e-6. `wake`
    is an initialisation that does not do this.

    Args:
        config: sizes; None means those of ViG-T.
        backend: one of `vig_ref.BACKENDS`, the layer that computes the operator; with "fused" also more of a block,
            where it may: see `one_kernel`. It is no part of the state dict, and `model.backend = "naive"` changes it on
            a living model.
        num_classes: width of the head; 0 for none, and the model returns pooled features.
        img_size: pixels, `n` or `(height, width)`, that pos_embed is laid out for. Images of another size are welcome:
            pos_embed is then resized to their grid (bicubic).
        in_chans: channels of the images.

    Returns (of a call on images `[B, in_chans, height, width]`, sides divisible by the patch size):
        logits `[B, num_classes]`, or features `[B, D]` if `num_classes` is 0.

    Raises:
        ValueError: an unknown backend, a size that the patch size does not divide, images of another shape.

    Source: ViG, sections 4.1 to 4.3, Figure 2. The final norm and the LayerNorms and SiLU of the stem are the code's.

    Example:
        >>> model = ViG(backend="chunked", num_classes=10)
        >>> model(torch.randn(2, 3, 224, 160)).shape
        torch.Size([2, 10])
    """

    patch_embed: nn.Module
    blocks: nn.Sequential

    def __init__(
        self, config: ViGConfig | None = None, *, backend: str = "auto", num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224, in_chans: int = 3,
    ):
        config = VIG_TINY if config is None else config
        super().__init__(
            config, num_features=config.dim, num_classes=num_classes, img_size=img_size, in_chans=in_chans
        )
        self.grid = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))
        self.patch_embed = PatchEmbed(config.dim, config.patch_size, in_chans)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.dim))
        self.blocks = nn.Sequential(*(
            Block(config.dim, config.num_heads, drop_path=rate, backend=backend, silu=config.silu)
            for rate in drop_path_rates(config.drop_path, config.depth)
        ))
        self.norm = RMSNorm(config.dim)
        self.head = new_head(config.dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.backend = backend

    @property
    def levels(self) -> list[nn.Module]:
        return list(self.blocks)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        D, p = self.config.dim, self.config.patch_size
        return [{"num_chs": D, "reduction": p, "module": f"blocks.{n}"} for n in range(len(self.blocks))]

    def embed(self, images: Tensor) -> Tensor:
        pos_embed = self.resized_pos_embed(self.grid_of(*images.shape[2:]))
        return self.patch_embed(images) + pos_embed

    def keep_levels(self, n: int) -> None:
        self.blocks = nn.Sequential(*self.levels[:n])

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in an image of `height` x `width` pixels."""
        p = self.config.patch_size
        if min(height, width) < p or height % p or width % p:
            raise ValueError(
                f"image size: expected multiples of the patch size {p}, got {height}x{width}; resize or pad the images"
            )
        return height // p, width // p

    def resized_pos_embed(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding on a grid `(h, w)`, `[1, h, w, D]`; interpolated in float32 at least."""
        pos_embed = self.pos_embed.unflatten(1, self.grid)
        if grid == self.grid:
            return pos_embed
        x = pos_embed.permute(0, 3, 1, 2).to(torch.promote_types(pos_embed.dtype, torch.float32))
        x = F.interpolate(x, size=grid, mode="bicubic", align_corners=False)
        return x.permute(0, 2, 3, 1).to(pos_embed.dtype)


class Stage(nn.Module):
    """Some blocks of one width, behind a convolution that halves the grid of the stage before (ViG-H)."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2 and padding 1, then a LayerNorm.

    `[B, h, w, dim]` to `[B, ceil(h / 2), ceil(w / 2), out_dim]`.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class HierarchicalViG(Backbone):
    """The paper's ViG-H: the same blocks in stages, each with wider tokens on a grid of half the size.

        x      = patch_embed(images)                                   a token every 4 pixels
        x      = downsample(x)                                         before every stage but the first
        x      = x + mixer(norm1(x));   x = x + mlp(norm2(x))          in every block
        logits = head(mean over tokens of norm(x))

    Against `ViG`: LayerNorm instead of RMSNorm around the blocks, no SiLUs in the mixer, GELU in the stem, MLPs rounded
    up to 32 channels instead of 256, no position embedding.

    **Any image size.** Every strided convolution pads one ring of zeros, so that a side of n becomes ceil(n / 2), and
    stage s (from 0) has ceil(n / 2^(s+2)) tokens along it. The image itself is neither padded nor cut. One of 230
    pixels has 58, 29, 15 and 8 tokens a side: the grids of 232 pixels, but not the values that 2 rows of zeros would
    give, since norms and biases turn such rows into tokens of their own.

    **Initialisation** is the released one: as in `ViG`, but truncated normal(0, 0.02) in every linear layer, so that
    only the depthwise convolutions keep their small Xavier weights.

    Args:
        config: sizes, a stage an entry.
        backend, num_classes, in_chans: see `ViG`.
        img_size: what `model.img_size` answers; nothing is laid out for a size.

    Returns and raises: see `ViG`.

    Source: ViG, section 4.3 and Table 4; the released `classification/models/vig_h.py`.

    Example:
        >>> model = create_model("vig_h_tiny", num_classes=10)
        >>> model(torch.randn(2, 3, 100, 75)).shape
        torch.Size([2, 10])
    """

    stages: nn.Sequential

    def __init__(
        self, config: HierarchicalConfig, *, backend: str = "auto", num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224, in_chans: int = 3,
    ):
        dims, depths = config.dims, config.depths
        super().__init__(config, num_features=dims[-1], num_classes=num_classes, img_size=img_size, in_chans=in_chans)
        self.patch_embed = PatchEmbed(dims[0], 4, in_chans, activation=F.gelu)
        rates = iter(drop_path_rates(config.drop_path, sum(depths)))
        stages = []
        for n, (dim, num_heads, depth) in enumerate(zip(dims, config.num_heads, depths, strict=True)):
            blocks = [
                Block(dim, num_heads, drop_path=next(rates), backend=backend, norm=nn.LayerNorm, multiple_of=32)
                for _ in range(depth)
            ]
            stages.append(Stage(Downsample(dims[n - 1], dim) if n else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = new_head(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        self.backend = backend

    @property
    def levels(self) -> list[nn.Module]:
        return list(self.stages)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        widths = self.config.dims[: len(self.stages)]
        return [{"num_chs": D, "reduction": 4 * 2**n, "module": f"stages.{n}"} for n, D in enumerate(widths)]

    def embed(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < 1:
            raise ValueError(f"image size: expected at least one pixel, got {images.shape[2]}x{images.shape[3]}")
        return self.patch_embed(images)

    def keep_levels(self, n: int) -> None:
        self.stages = nn.Sequential(*self.levels[:n])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher()
        if not coarse:  # a block a group; a downsampling belongs to the block behind it
            finer = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
            groups["blocks"] = [*finer, *groups["blocks"][1:]]
        return groups


def create_model(
    name: str, *, backend: str = "auto", num_classes: int = 1000, img_size: int | tuple[int, int] = 224,
    in_chans: int = 3, drop_path: float | None = None,
) -> ViG | HierarchicalViG:
    """A new model by name, one of `PRESETS`; the other arguments are those of `ViG`. `drop_path` None is the preset's.

    Raises:
        ValueError: an unknown name, or what the model refuses.

    Example:
        >>> create_model("vig_small", num_classes=10).config.dim
        384
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; choose one of {tuple(PRESETS)}")
    config = PRESETS[name] if drop_path is None else replace(PRESETS[name], drop_path=drop_path)
    return build(config, backend=backend, num_classes=num_classes, img_size=img_size, in_chans=in_chans)


def build(config: ViGConfig | HierarchicalConfig, **options: Any) -> ViG | HierarchicalViG:
    """The family that a configuration belongs to, with the options of `ViG`."""
    return ViG(config, **options) if isinstance(config, ViGConfig) else HierarchicalViG(config, **options)


def wake(model: ViG | HierarchicalViG) -> None:
    """Initialise anew, in place, so that the global branch starts alive: mean(o^2) far above the eps of `norm_o`.

        dwconv     PyTorch's own: uniform with variance 1 / (3 * 9), so that `local` keeps the scale of its input
        qkv_proj   Xavier-uniform with gain 1 instead of 2^-2.5

    Everything else stays as it is. Of the released checkpoints this changes nothing: it is for training from scratch.

    Example:
        >>> model = create_model("vig_tiny")
        >>> wake(model)
    """
    for block in model.all_blocks():
        for module in block.mixer.modules():
            if isinstance(module, nn.Conv2d):  # the dwconv; rows of the roadmap have none
                module.reset_parameters()
        nn.init.xavier_uniform_(block.mixer.qkv_proj.weight)
