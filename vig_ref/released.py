"""Weights of the released ViG (github.com/hustvl/ViG) into `vig_ref.ViG`: nothing is unpickled, nothing is guessed."""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vig_ref.model import PRESETS, Mixer, ViG

#: Our names to the released ones, outside the blocks.
OUTER_NAMES = {
    "pos_embed": "pos_embed",
    "patch_embed.conv1.weight": "patch_embed.proj.0.weight",
    "patch_embed.conv1.bias": "patch_embed.proj.0.bias",
    "patch_embed.norm1.weight": "patch_embed.proj.1.weight",
    "patch_embed.norm1.bias": "patch_embed.proj.1.bias",
    "patch_embed.conv2.weight": "patch_embed.proj.3.weight",
    "patch_embed.conv2.bias": "patch_embed.proj.3.bias",
    "patch_embed.norm2.weight": "patch_embed.proj.4.weight",
    "patch_embed.norm2.bias": "patch_embed.proj.4.bias",
    "norm.weight": "norm.weight",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
#: The same behind `blocks.N.`. The rows of the matrices are in the same order in both.
BLOCK_NAMES = {
    "norm1.weight": "attn_norm.weight",
    "mixer.dwconv.weight": "attn.in_proj.0.weight",
    "mixer.qkv_proj.weight": "attn.qkv_proj.weight",
    "mixer.forget_proj.0.weight": "attn.gk_proj.0.weight",
    "mixer.forget_proj.1.weight": "attn.gk_proj.1.weight",
    "mixer.forget_proj.1.bias": "attn.gk_proj.1.bias",
    "mixer.gate_proj.weight": "attn.g_proj.weight",
    "mixer.gate_proj.bias": "attn.g_proj.bias",
    "mixer.out_proj.weight": "attn.o_proj.weight",
    "mixer.norm_o.weight": "attn.g_norm.weight",
    "mixer.norm_local.weight": "attn.l_norm.weight",
    "norm2.weight": "mlp_norm.weight",
    "mlp.gate_up_proj.weight": "mlp.gate_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_released(
    source: str | os.PathLike | Mapping, *, backend: str = "auto", released_inference: bool = False
) -> ViG:
    """A `ViG` with released weights, in eval mode: the variant and its sizes are read from the shapes.

    The released code halves o twice at inference, and RMSNorm hides all but a trace of it:

        RMSNorm(o / 2, eps) = RMSNorm(o, 4 eps)

    Args:
        source: a file written by `torch.save`, a `.safetensors` file, or a state dict with the released names. They may
            stand under `"model_ema"` (averaged weights, which win when both are there) or `"model"`, and behind a
            `module.` prefix. Number of classes, image channels and (square) position grid are free.
        backend: one of `vig_ref.BACKENDS`.
        released_inference: reproduce the released inference path, by eps = 4e-6 instead of 1e-6 in every `norm_o`;
            False is the function that the weights were trained as.

    Returns:
        The model, on the device of the weights (the CPU for a file) and in their dtype: float64 if any is, otherwise
        float32, also for half precision. It shares no memory with `source`.

    Raises:
        TypeError: `source`, or what its file holds, is not a state dict.
        ValueError: a file that is not a plain tensor checkpoint (it is refused, never unpickled), or entries that do
            not fit; the message lists them all.

    Source: hustvl/ViG dfb9d32, `classification/models/vig.py`; equation: eps in `GatedLinearAttention.forward`.

    Example:
        >>> model = load_released("vig_t.pth")  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 224, 224)).shape  # doctest: +SKIP
        torch.Size([1, 1000])
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_checkpoint(Path(source))
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a state dict or a file that holds one, got {type(source).__name__}")
    state = released_state(source)
    model = empty_model(state, backend)
    if problems := misfits(state, model):
        raise ValueError("\n  ".join([f"not a released ViG: {len(problems)} entries do not fit", *problems]))
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in state.values()), torch.float32)
    weights = {name: state[released_name(name)].detach().to(dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    if released_inference:
        for mixer in model.modules():
            if isinstance(mixer, Mixer):
                mixer.norm_o.eps = 4e-6
    return model.eval()


def read_checkpoint(path: Path) -> Mapping:
    """The content of a `.safetensors` or `torch.save` file, on the CPU; tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:  # a damaged or hostile file can make a parser fail in any way
        raise ValueError(
            f"{path} is not a plain tensor checkpoint and was not unpickled; where you trust its origin, save its "
            f"state dict alone and load that file ({type(error).__name__})"
        ) from error


def released_state(source: Mapping) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefix that DistributedDataParallel adds."""
    for key in ("model_ema", "model"):
        if isinstance(source.get(key), Mapping):
            source = source[key]
            break
    return {str(name).removeprefix("module."): x for name, x in source.items()}


def released_name(name: str) -> str:
    """The released name of one of our parameters.

    Example:
        >>> released_name("blocks.3.mixer.out_proj.weight")
        'blocks.3.attn.o_proj.weight'
    """
    if not name.startswith("blocks."):
        return OUTER_NAMES[name]
    _, index, inner = name.split(".", 2)
    return f"blocks.{index}.{BLOCK_NAMES[inner]}"


def empty_model(state: Mapping[str, Tensor], backend: str) -> ViG:
    """The variant that the entries fit best, without storage; its free sizes are read where they can be."""

    def size(name: str, axis: int, dim: int, default: int) -> int:
        x = state.get(name)
        return x.shape[axis] if isinstance(x, Tensor) and x.dim() == dim and x.shape[axis] else default

    side = math.isqrt(size("pos_embed", axis=1, dim=3, default=14 * 14))
    models = []
    for config in PRESETS.values():
        with torch.device("meta"):
            models.append(ViG(
                config, backend=backend, img_size=side * config.patch_size,
                num_classes=size("head.weight", axis=0, dim=2, default=1000),
                in_chans=size("patch_embed.proj.0.weight", axis=1, dim=4, default=3),
            ))
    return min(models, key=lambda model: len(misfits(state, model)))


def misfits(state: Mapping[str, Tensor], model: ViG) -> list[str]:
    """One line for each entry of `state` that is missing, unknown, misshapen, or not a floating-point tensor."""
    expected = {released_name(name): list(parameter.shape) for name, parameter in model.state_dict().items()}
    problems = [f"{name}: unknown" for name in state if name not in expected]
    for name, shape in expected.items():
        x = state.get(name)
        if name not in state:
            problems.append(f"{name}: missing, expected {shape}")
        elif not isinstance(x, Tensor):
            problems.append(f"{name}: expected a tensor, got {type(x).__name__}")
        elif x.dtype not in DTYPES or x.layout != torch.strided:
            problems.append(f"{name}: expected dense float64, float32, float16 or bfloat16, got {x.layout} {x.dtype}")
        elif list(x.shape) != shape:
            problems.append(f"{name}: expected {shape}, got {list(x.shape)}")
    return problems
