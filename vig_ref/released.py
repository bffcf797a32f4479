"""Weights of the released models (github.com/hustvl/ViG) into ours: nothing is unpickled, nothing is guessed."""

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vig_ref.model import PRESETS, HierarchicalConfig, HierarchicalViG, Mixer, ViG, ViGConfig, build

#: Our names to the released ones of the plain ViG, outside the blocks.
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
#: The same for ViG-H: outside the stages, in front of a stage's blocks, and in a block.
H_OUTER_NAMES = {
    "patch_embed.conv1.weight": "patch_embed.0.weight",
    "patch_embed.conv1.bias": "patch_embed.0.bias",
    "patch_embed.norm1.weight": "patch_embed.2.weight",
    "patch_embed.norm1.bias": "patch_embed.2.bias",
    "patch_embed.conv2.weight": "patch_embed.5.weight",
    "patch_embed.conv2.bias": "patch_embed.5.bias",
    "patch_embed.norm2.weight": "patch_embed.7.weight",
    "patch_embed.norm2.bias": "patch_embed.7.bias",
    "norm.weight": "classifier.norm.weight",
    "norm.bias": "classifier.norm.bias",
    "head.weight": "classifier.head.weight",
    "head.bias": "classifier.head.bias",
}
H_DOWNSAMPLE_NAMES = {
    "downsample.conv.weight": "downsample.1.weight",
    "downsample.conv.bias": "downsample.1.bias",
    "downsample.norm.weight": "downsample.3.weight",
    "downsample.norm.bias": "downsample.3.bias",
}
H_BLOCK_NAMES = {
    "norm1.weight": "norm.weight",
    "norm1.bias": "norm.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.gate_up_proj.weight": "mlp.fc1.weight",
    "mlp.down_proj.weight": "mlp.fc2.weight",
}
H_BLOCK_NAMES |= {
    ours: theirs.replace("attn.", "op.") for ours, theirs in BLOCK_NAMES.items() if ours.startswith("mixer.")
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_released(
    source: str | os.PathLike | Mapping, *, backend: str = "auto", released_inference: bool = False
) -> ViG | HierarchicalViG:
    """A model with released weights, in eval mode: family, variant and sizes are read from the names and shapes.

    The released plain ViG halves o twice at inference, and RMSNorm hides all but a trace of it:

        RMSNorm(o / 2, eps) = RMSNorm(o, 4 eps)

    The released ViG-H does not: there both paths are one function.

    Args:
        source: a file written by `torch.save`, a `.safetensors` file, or a state dict with the released names. They may
            stand under `"model_ema"` (averaged weights, which win when both are there) or `"model"`, and behind a
            `module.` prefix, beside optimizer state and settings, which are not looked at. Number of classes, image
            channels and (square) position grid are free. Names are those of the released code today; those that it
            renames for weights from before (`ln_1`, `self_attention`, `patch_embed.proj` in ViG-H) are refused.
        backend: one of `vig_ref.BACKENDS`.
        released_inference: reproduce the released inference path, by eps = 4e-6 instead of 1e-6 in every `norm_o` of
            a plain ViG; False is the function that the weights were trained as.

    Returns:
        The model, on the device of the weights (the CPU for a file) and in their dtype: float64 if any is, otherwise
        float32, also for half precision. It shares no memory with `source`.

    Raises:
        TypeError: `source`, or what its file holds, is not a state dict.
        ValueError: a file that is not a plain tensor checkpoint (it is refused, never unpickled), or entries that do
            not fit; the message lists them all.

    Source: hustvl/ViG dfb9d32, `classification/models/vig.py` and `vig_h.py`; the equation: eps in
    `GatedLinearAttention.forward`.

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
    weights = {ours: state[theirs].detach().to(dtype, copy=True) for ours, theirs in released_names(model).items()}
    model.load_state_dict(weights, assign=True)
    if released_inference and isinstance(model, ViG):
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
        # The authors' training files hold their settings too, a kind of dictionary from `yacs`: read it as one.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
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
    return {str(name).removeprefix("module."): as_linear(x) for name, x in source.items()}


def as_linear(x: Tensor) -> Tensor:
    """A linear layer saved as a 1x1 convolution, `[D', D, 1, 1]`, as `[D', D]`; the released ViG-H takes both."""
    return x.flatten(1) if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2:] == (1, 1) else x


def released_names(model: ViG | HierarchicalViG) -> dict[str, str]:
    """Our parameters' names to the released ones.

    The authors put a downsampling behind the blocks of the stage before; here it stands before those that it feeds.

    Example:
        >>> released_names(create_model("vig_tiny"))["blocks.3.mixer.out_proj.weight"]
        'blocks.3.attn.o_proj.weight'
        >>> released_names(create_model("vig_h_tiny"))["stages.1.downsample.conv.bias"]
        'layers.0.downsample.1.bias'
    """

    def released(name: str) -> str:
        if name in outer:
            return outer[name]
        parts = name.split(".")
        if parts[0] == "blocks":
            return f"blocks.{parts[1]}.{BLOCK_NAMES['.'.join(parts[2:])]}"
        if parts[2] == "blocks":
            return f"layers.{parts[1]}.blocks.{parts[3]}.{H_BLOCK_NAMES['.'.join(parts[4:])]}"
        return f"layers.{int(parts[1]) - 1}.{H_DOWNSAMPLE_NAMES['.'.join(parts[2:])]}"

    outer = outer_names(model.config)
    return {name: released(name) for name in model.state_dict()}


def outer_names(config: ViGConfig | HierarchicalConfig) -> dict[str, str]:
    return OUTER_NAMES if isinstance(config, ViGConfig) else H_OUTER_NAMES


def empty_model(state: Mapping[str, Tensor], backend: str) -> ViG | HierarchicalViG:
    """The variant that the entries fit best, without storage; its free sizes are read where they can be."""

    def size(name: str, axis: int, dim: int, default: int) -> int:
        x = state.get(name)
        return x.shape[axis] if isinstance(x, Tensor) and x.dim() == dim and x.shape[axis] else default

    side = math.isqrt(size("pos_embed", axis=1, dim=3, default=14 * 14))
    models = []
    for config in PRESETS.values():
        names = outer_names(config)
        with torch.device("meta"):
            models.append(build(
                config, backend=backend,
                img_size=side * config.patch_size if isinstance(config, ViGConfig) else 224,
                num_classes=size(names["head.weight"], axis=0, dim=2, default=1000),
                in_chans=size(names["patch_embed.conv1.weight"], axis=1, dim=4, default=3),
            ))
    return min(models, key=lambda model: len(misfits(state, model)))


def misfits(state: Mapping[str, Tensor], model: ViG | HierarchicalViG) -> list[str]:
    """One line for each entry of `state` that is missing, unknown, misshapen, or not a floating-point tensor."""
    names = released_names(model)
    expected = {names[name]: list(parameter.shape) for name, parameter in model.state_dict().items()}
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
