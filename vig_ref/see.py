"""`vig-ref see attention` and `vig-ref see erf`: what a token reads, and which pixels an output depends on.

Attention maps (Figure 5 of the paper) come from the operator's definition. Unrolled, both scans are matrices,

    o = (A_fwd + A_rev) v        A_fwd[i, j] = scale/2 * q[i] . (k[j] * exp(g_fwd[j+1] + ... + g_fwd[i]))     for j <= i
                                 A_rev[i, j] = scale/2 * q[i] . (k[j] * exp(g_rev[i] + ... + g_rev[j-1]))     for j >= i

whose rows are the maps of token i. There is no softmax: weights may be negative, and a row sums to anything.
The effective receptive field (Figure 6) is the gradient of the middle token of the last map with respect to the pixels,
its channels summed with random signs: plain sums do not see what passes a LayerNorm.

Without `--weights` the models are untrained, initialised by `vig_ref.wake`: the pictures then show what
the architecture can reach, and not what a trained model looks at. They say so.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from vig_ref.cli import make_folders, positive
from vig_ref.demo import SEED, evaluating, new_figure
from vig_ref.machine import import_timm
from vig_ref.model import PRESETS, HierarchicalViG, Mixer, ViG, create_model, wake
from vig_ref.ops import bidirectional_gla
from vig_ref.released import load_released
from vig_ref.roadmap import create_row

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet, as in training


# --- the photograph --------------------------------------------------------------------------------------------------


def photograph(path: Path | None, size: int) -> np.ndarray:
    """The middle square of a picture, `[size, size, 3]` in 0 to 1; None is the flower that comes with scikit-learn.

    Raises:
        ValueError: a file that is not there or that matplotlib cannot read.
    """
    try:
        pixels = load_sample_image("flower.jpg") if path is None else imread(path)
    except (OSError, SyntaxError) as error:  # the latter is Pillow's word for a damaged PNG
        raise ValueError(f"image: expected a picture, got {path} ({error}); give another file") from error
    if pixels.ndim == 2:  # grey
        pixels = np.stack([pixels] * 3, axis=-1)
    image = torch.from_numpy(np.array(pixels[..., :3])).float()
    image = image / 255 if pixels.dtype == np.uint8 else image
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side].permute(2, 0, 1)[None]
    square = nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return square[0].permute(1, 2, 0).clamp(0, 1).numpy()


def normalised(image: np.ndarray) -> Tensor:
    """`[h, w, 3]` in 0 to 1 as a batch of one, as the models were trained: `[1, 3, h, w]`."""
    return ((torch.from_numpy(image) - MEAN) / STD).permute(2, 0, 1)[None].contiguous()


# --- attention -------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """What one block computes: `fwd` and `rev` `[B, H, T, T]`, `v` and `o` `[B, H, T, V]`, the grid of its tokens."""

    fwd: Tensor
    rev: Tensor
    v: Tensor
    o: Tensor
    grid: tuple[int, int]


def attention_matrix(q: Tensor, k: Tensor, g: Tensor, *, reverse: bool, scale: float) -> Tensor:
    """A with `gla(q, k, v, g) = A v`, `[B, H, T, T]`: row i weighs every token that the scan has met by token i.

    Args: those of `vig_ref.gla`.
    """
    T = q.shape[2]
    decay = torch.zeros_like(k)  # row j: exp(sum of the gates met after token j), 0 before j is met
    rows = [q[:, :, 0, :0]] * T
    for i in reversed(range(T)) if reverse else range(T):
        decay = decay * torch.exp(g[:, :, i, None])
        decay[:, :, i] = 1
        rows[i] = (q[:, :, i, None] * k * decay).sum(-1)  # [B, H, T]
    return scale * torch.stack(rows, dim=2)


@torch.no_grad()
def attention_maps(model: ViG | HierarchicalViG, images: Tensor, block: int) -> Maps:
    """The maps of one block, for images.

    Args:
        model: any ViG with the local branch, so not the other rows of the roadmap.
        images: `[B, 3, height, width]`.
        block: its number from the image, over all stages; negative from the end.

    Raises:
        ValueError: a block that is not there.
    """
    blocks = model.all_blocks()
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block: expected {-len(blocks)} to {len(blocks) - 1}, got {block}")
    mixer: Mixer = blocks[block].mixer
    seen = []
    hook = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with evaluating(model):
            model(images)
    finally:
        hook.remove()
    (x,) = seen
    q, k, v, g_fwd, g_rev = mixer.project(mixer.local(x))
    half = q.shape[3] ** -0.5 / 2
    fwd = attention_matrix(q, k, g_fwd, reverse=False, scale=half)
    rev = attention_matrix(q, k, g_rev, reverse=True, scale=half)
    o = bidirectional_gla(q, k, v, g_fwd, g_rev, backend=model.backend)
    return Maps(fwd, rev, v, o, (x.shape[1], x.shape[2]))


def draw_attention(
    image: np.ndarray, maps: Maps, tokens: list[tuple[int, ...]], head: int, title: str, path: Path
) -> None:
    """One row a token: the photograph with the token framed, then its forward, reverse and merged map."""
    rows, columns = maps.grid
    patch = image.shape[0] / rows
    figure = new_figure(10.5, 0.6 + 2.45 * len(tokens))
    figure.suptitle(title, fontsize=11)
    grey = image.mean(-1)
    for axes, (row, column) in zip(figure.subplots(len(tokens), 4, squeeze=False), tokens, strict=True):
        t = row * columns + column
        fwd, rev = (m[0, head, t].reshape(rows, columns).numpy() for m in (maps.fwd, maps.rev))
        merged = fwd + rev
        others = np.abs(np.delete(merged.ravel(), t))  # a token's weight on itself would outshine the rest
        limit = float(np.quantile(others, 0.995)) or 1.0
        colours = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
        axes[0].imshow(image)
        for ax, weights in zip(axes[1:], (fwd, rev, merged), strict=True):
            ax.imshow(grey, cmap="gray", vmin=-0.5, vmax=1.5)
            ax.imshow(
                weights, cmap=colours.cmap, norm=colours.norm, alpha=0.75, interpolation="nearest",
                extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
            )  # fmt: skip
        for ax in axes:
            corner = (column * patch - 0.5, row * patch - 0.5)
            for colour, width in (("white", 3.5), ("black", 1.5)):  # seen on any picture
                ax.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=colour, linewidth=width))
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(f"token ({row}, {column})")
        figure.colorbar(colours, ax=axes[3], shrink=0.9, format="%.0e")
        if (row, column) == tokens[0]:
            for ax, name in zip(axes, ("photograph", "forward", "reverse", "merged"), strict=True):
                ax.set_title(name)
    figure.savefig(path)


# --- effective receptive field ---------------------------------------------------------------------------------------


def signs(n: int) -> Tensor:
    """n random signs, +1 or -1, in float32: the same ones at each call."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(SEED)).float() * 2 - 1


def effective_receptive_field(model: Any, images: Tensor) -> Tensor:
    """|d (signs . middle token) / d pixel|, summed over colours and images, with maximum 1: `[height, width]`.

    The signs are random and fixed. A plain sum over channels would miss all that passes a LayerNorm (as initialised),
    whose outputs sum to a constant: the whole field where a model ends in one, as ViG-H and DeiT do, and the path
    past all blocks where its stem does, as in ViG. What is then left to divide by its maximum may be rounding errors.

    Args:
        model: anything with `forward_intermediates`: ours and timm's.
        images: `[B, 3, height, width]`.
    """
    images = images.detach().requires_grad_()
    with evaluating(model):
        (features,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        height, width = features.shape[2:]
        response = (features[:, :, height // 2, width // 2] * signs(features.shape[1]).to(features)).sum()
        (gradient,) = torch.autograd.grad(response, images)
    field = gradient.abs().sum(dim=(0, 1))
    return field / field.max()


def share_of_pixels(field: Tensor, share: float) -> float:
    """The smallest part of the image that holds this share of the response: 0.5 of a uniform field holds 0.5."""
    sizes = field.flatten().sort(descending=True).values.double().cumsum(0)
    return (int((sizes < share * sizes[-1]).sum()) + 1) / field.numel()


PEERS = ("ResNet50", "DeiT-T")  # timm has them
ROWS = {"GLA": "patch_embed", "BidGLA (no 2D gate)": "direction_wise", "ViG": "gate_2d"}


def untrained(name: str, size: int, timm: Any) -> Any:
    """A model of Figure 6 by its name there: the same one whatever was built before it."""
    torch.manual_seed(SEED)
    if name == "ResNet50":
        return timm.create_model("resnet50", zero_init_last=False)  # else each block is the identity
    if name == "DeiT-T":
        return timm.create_model("deit_tiny_patch16_224", img_size=size)
    model = create_row(ROWS[name], img_size=size)
    wake(model)
    return model


def fields(size: int, images: Tensor, timm: Any) -> dict[str, Tensor]:
    """The paper's models, as far as they can be had, each untrained: in the order of Figure 6."""
    names = (*PEERS, *ROWS) if timm else ROWS
    return {name: effective_receptive_field(untrained(name, size, timm), images) for name in names}


COLUMNS = 3


def draw_fields(fields: dict[str, Tensor], title: str, path: Path) -> None:
    """One panel a model, COLUMNS in a row, so that a phone shows them; all with the same logarithmic colours."""
    figure = new_figure(2.6 * COLUMNS + 1, 3.3 * math.ceil(len(fields) / COLUMNS) + 0.4)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(math.ceil(len(fields) / COLUMNS), COLUMNS).flatten()
    for ax in axes[len(fields) :]:
        ax.set_axis_off()
    colours = ScalarMappable(LogNorm(1e-5, 1), "magma")
    for ax, (name, field) in zip(axes[: len(fields)], fields.items(), strict=True):
        ax.imshow(field.clamp_min(1e-6).numpy(), cmap=colours.cmap, norm=colours.norm)
        ax.set_title(name)
        ax.set(xticks=[], yticks=[], xlabel=f"half of it in {share_of_pixels(field, 0.5):.1%}\nof the pixels")
    figure.colorbar(colours, ax=axes, label="|gradient| / maximum", shrink=0.8, pad=0.01)
    figure.savefig(path)


# --- the command -----------------------------------------------------------------------------------------------------

#: Options of `see attention` alone, and what they are if not given.
ATTENTION = {"model": "vig_tiny", "weights": None, "block": -1, "head": 0, "token": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("attention", "erf"), help="attention maps, or effective receptive fields")
    parser.add_argument("--out", type=Path, default=Path("out/see"), help="folder for what is written (out/see)")
    parser.add_argument("--image", type=Path, help="a picture; the default is scikit-learn's photograph of a flower")
    parser.add_argument("--size", type=positive, default=224, help="pixels a side (224)")
    only = parser.add_argument_group("of attention only")
    only.add_argument("--model", choices=PRESETS, help="an untrained model (vig_tiny)")
    only.add_argument("--weights", type=Path, help="a released checkpoint, instead of an untrained model")
    only.add_argument("--block", type=int, help="counted from the image, negative from the end (-1)")
    only.add_argument("--head", type=int, help="of that block (0)")
    only.add_argument("--token", type=int, nargs=2, action="append", metavar=("ROW", "COLUMN"), help="may be repeated")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    make_folders("vig-ref see", options.out)
    given = [f"--{name}" for name in ATTENTION if getattr(options, name) is not None]
    for name, default in ATTENTION.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    try:
        if options.what == "erf" and given:
            raise ValueError(f"erf draws five models of its own, untrained, and takes no {', '.join(given)}")
        if {"--model", "--weights"} <= set(given):
            raise ValueError("the weights say which model they are of; give --model or --weights, not both")
        image = photograph(options.image, options.size)
        see = see_attention if options.what == "attention" else see_fields
        print(f"written: {see(options, image)}")
    except ValueError as error:
        raise SystemExit(f"vig-ref see: {error}") from error
    return 0


def see_attention(options: argparse.Namespace, image: np.ndarray) -> Path:
    torch.manual_seed(SEED)
    if options.weights:
        try:
            model, origin = load_released(options.weights).float(), options.weights.name
        except (OSError, TypeError) as error:
            raise ValueError(f"weights: expected a released checkpoint ({error}); give its file") from error
    else:
        model, origin = create_model(options.model, img_size=options.size).eval(), f"{options.model}, untrained"
        wake(model)
    maps = attention_maps(model, normalised(image), options.block)
    rows, columns = maps.grid
    tokens = [tuple(t) for t in options.token or [(rows // 4, columns // 4), (rows // 2, columns // 2)]]
    if not 0 <= options.head < maps.fwd.shape[1]:
        raise ValueError(f"head: expected 0 to {maps.fwd.shape[1] - 1}, got {options.head}")
    for row, column in tokens:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"token: expected a row and a column of the {rows}x{columns} grid, got {row} {column}")
    path = options.out / "attention.png"
    block = options.block % len(model.all_blocks())
    title = f"What a token reads in block {block}, head {options.head} ({origin}): its weights on v"
    draw_attention(image, maps, tokens, options.head, title, path)
    return path


def see_fields(options: argparse.Namespace, image: np.ndarray) -> Path:
    images = torch.cat([normalised(np.ascontiguousarray(np.rot90(image, n))) for n in range(4)])
    timm, reason = import_timm()
    if not timm:
        print(f"Left out: {' and '.join(PEERS)}: {reason}.")
    found = fields(options.size, images, timm)
    path = options.out / "erf.png"
    draw_fields(found, "Effective receptive field of the middle token, untrained models", path)
    areas = {name: {s: share_of_pixels(f, s) for s in (0.5, 0.9, 0.99)} for name, f in found.items()}
    (options.out / "erf.json").write_text(json.dumps({"share_of_pixels_that_hold": areas}, indent=1) + "\n")
    return path
