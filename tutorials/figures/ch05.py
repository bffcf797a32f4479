"""Figures of chapter 5, from an image to logits."""

import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

from figures import BOTH, FWD, INK, MUTED, REV, Figure, new_figure

PAPER, CODE = "#e8f0f8", "#eeeeee"


def _box(ax, x: float, y: float, text: str, shape: str = "", *, width: float = 2.0, colour: str = PAPER) -> None:
    """A step at (x, y), with the shape of what leaves it in a second line."""
    outline = dict(boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=colour, edgecolor=INK, linewidth=1)
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.32), width, 0.64, **outline))
    ax.text(x, y + (0.12 if shape else 0), text, ha="center", va="center", fontsize=10.5, color=INK)
    if shape:
        ax.text(x, y - 0.16, shape, ha="center", va="center", fontsize=9, color="#444444", family="monospace")


def _arrow(ax, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.2, shrinkA=0, shrinkB=0))


def _canvas(width: float, height: float, xlim: tuple[float, float], ylim: tuple[float, float]):
    figure = new_figure(width, height)
    ax = figure.subplots()
    ax.set(xlim=xlim, ylim=ylim)
    ax.axis("off")
    return figure, ax


def pipeline() -> Figure:
    """The whole model, in two rows of three steps."""
    figure, ax = _canvas(7, 3.1, (0, 9.2), (0, 3.6))
    top, bottom = 2.9, 1.1
    steps = [
        (1.3, top, "images", "[B, 3, 224, 224]"), (4.6, top, "patch_embed", "[B, 14, 14, 192]"),
        (7.9, top, "+ pos_embed", "[B, 14, 14, 192]"), (7.9, bottom, "12 blocks", "[B, 14, 14, 192]"),
        (4.6, bottom, "norm, mean", "[B, 192]"), (1.3, bottom, "head", "[B, 1000]"),
    ]  # fmt: skip
    for x, y, text, shape in steps:
        _box(ax, x, y, text, shape, width=2.4)
    for start, end in (((2.5, top), (3.4, top)), ((5.8, top), (6.7, top)), ((7.9, top - 0.32), (7.9, bottom + 0.32)),
                       ((6.7, bottom), (5.8, bottom)), ((3.4, bottom), (2.5, bottom))):  # fmt: skip
        _arrow(ax, start, end)
    ax.text(7.75, 2.0, "T = 196 tokens", ha="right", va="center", color=MUTED)
    ax.text(7.9, 0.45, "x + mixer(norm1(x))\nx + mlp(norm2(x))", ha="center", va="center", fontsize=9, color=INK)
    return figure


def mixer() -> Figure:
    """The mixer: local branch on the left, global one on the right, the gate between them."""
    figure, ax = _canvas(7, 6.3, (0, 9.8), (0.4, 8.7))
    _box(ax, 4.7, 8.2, "norm1(x)", "[B, 14, 14, 192]", width=2.5)
    _box(ax, 4.7, 7.1, "dwconv 3x3, SiLU", "local [B, 196, 192]", width=2.9)
    _box(ax, 8.35, 5.7, "forget_proj", "g [B, 3, 196, 32] x2", width=2.8)
    _box(ax, 5.35, 5.7, "qkv_proj", "q, k, v [B, 3, 196, ..]", width=3.0)
    _box(ax, 6.7, 4.4, "bidirectional_gla", "o [B, 3, 196, 64]", width=2.7)
    _box(ax, 6.7, 3.3, "norm_o", width=2.1, colour=CODE)
    _box(ax, 1.05, 3.3, "norm_local", width=2.0, colour=CODE)
    _box(ax, 3.4, 4.7, "gate_proj", "gate [B, 196, 192]", width=2.4)
    _box(ax, 3.85, 2.1, "gate * far + (1 - gate) * near", "y [B, 196, 192]", width=4.5)
    _box(ax, 3.85, 0.9, "SiLU, out_proj", "[B, 14, 14, 192]", width=2.6)
    for start, end, colour in (
        ((4.7, 7.88), (4.7, 7.42), INK), ((5.6, 6.78), (7.9, 6.02), REV), ((5.1, 6.78), (5.2, 6.02), REV),
        ((4.2, 6.78), (3.3, 5.02), BOTH), ((3.25, 7.0), (1.05, 3.62), FWD), ((8.2, 5.38), (7.3, 4.72), REV),
        ((5.35, 5.38), (6.2, 4.72), REV), ((6.7, 4.08), (6.7, 3.62), REV), ((6.7, 2.98), (5.4, 2.42), REV),
        ((1.05, 2.98), (2.3, 2.42), FWD), ((3.45, 4.38), (3.8, 2.42), BOTH), ((3.85, 1.78), (3.85, 1.22), INK),
    ):  # fmt: skip
        _arrow(ax, start, end, colour)
    ax.text(0.2, 5.6, "near:\n9 tokens", color=FWD, ha="left", va="center")
    ax.text(8.0, 3.3, "far: all tokens,\nboth directions", color=REV, ha="left", va="center", fontsize=9.5)
    return figure


def footprint(photograph: np.ndarray, read: np.ndarray, token: tuple[int, int]) -> Figure:
    """The photograph, dark where the token does not read, and the surroundings enlarged."""
    figure = new_figure(5.4, 2.9)
    row, column = token
    whole, near = figure.subplots(1, 2)
    for ax in (whole, near):
        ax.imshow(photograph * np.where(read, 1, 0.45)[..., None])
        corner = (16 * column - 0.5, 16 * row - 0.5)
        ax.add_patch(Rectangle(corner, 16, 16, fill=False, edgecolor="white", linewidth=2))
        ax.set(xticks=range(0, 225, 32), yticks=range(0, 225, 32))
        ax.tick_params(labelsize=7)
        ax.tick_params(axis="x", rotation=90)
    near.set(xlim=(16 * column - 20, 16 * column + 28), ylim=(16 * row + 28, 16 * row - 20))
    near.set_title(f"token ({row}, {column}): 25x25 pixels")
    whole.set_title("224x224 pixels, 14x14 patches")
    return figure


def mixing(photograph: np.ndarray, channel: list[torch.Tensor]) -> Figure:
    """The photograph and, of one channel on the grid: near, far, the gate and what it makes of them."""
    figure = new_figure(7, 4.6)
    axes = figure.subplots(2, 3).ravel()
    axes[0].imshow(photograph)
    axes[0].set_title("photograph")
    axes[5].axis("off")
    titles = ("near = norm_local(local)", "far = norm_o(o)", "gate", "gate far + (1 - gate) near")
    for ax, values, title in zip(axes[1:5], channel, titles, strict=True):
        limit = 1.0 if title == "gate" else max(abs(values.min()), abs(values.max())).item()
        low = 0.0 if title == "gate" else -limit
        drawn = ax.imshow(values.numpy(), cmap="viridis" if title == "gate" else "RdBu_r", vmin=low, vmax=limit)
        figure.colorbar(drawn, ax=ax, shrink=0.75)
        ax.set_title(title, fontsize=9.5)
    for ax in axes[:5]:
        ax.set(xticks=[], yticks=[])
    return figure


def awake(life: dict[str, list[float]]) -> Figure:
    """sqrt(r / (r + 1)), the root mean square behind the norm, against r = mean(o^2) / eps, and the blocks on it."""
    figure = new_figure(6.6, 3.2)
    ax = figure.subplots()
    r = np.logspace(-13, 6, 200)
    ax.loglog(r, np.sqrt(r / (r + 1)), color=MUTED)
    for (name, ratios), colour in zip(life.items(), (REV, FWD), strict=True):
        x = np.array(ratios)
        ax.loglog(x, np.sqrt(x / (x + 1)), "o", color=colour, markersize=6, alpha=0.7)
        where = ((14, -3), "left") if x.max() < 1 else ((-10, -22), "center")
        ax.annotate(f"{name}, 12 blocks", (x.max(), np.sqrt(x.max() / (x.max() + 1))), xytext=where[0],
                    textcoords="offset points", color=colour, ha=where[1])  # fmt: skip
    ax.axvline(1, color="0.8", linewidth=1, zorder=0)
    ax.set(xlabel="mean(o²) / eps", ylabel="RMS of norm_o(o)")
    return figure


def readings(found: dict[str, list[float]]) -> Figure:
    """Deviations on a logarithmic axis, two marks a reading."""
    figure = new_figure(7, 3.2)
    ax = figure.subplots()
    names = list(found)
    for n, name in enumerate(names):
        train, infer = (max(x, 1e-16) for x in found[name])
        ax.plot([train, infer], [n, n], color="0.85", linewidth=2, zorder=0)
        ax.plot(train, n, "o", color=FWD, label="their training path" if n == 0 else None)
        ax.plot(infer, n, "s", color=REV, markersize=5, label="their inference path" if n == 0 else None)
    ax.set(xscale="log", xlim=(1e-16, 10), yticks=range(len(names)), xlabel="largest deviation / largest logit")
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.92")
    ax.legend(loc="lower left", fontsize=9, bbox_to_anchor=(0.02, 0.12))
    return figure


def costs(parts: dict[str, dict[str, int]], printed: dict[str, float]) -> Figure:
    """A horizontal bar a model, its parts in percent; the paper's figure as a vertical line."""
    figure = new_figure(7, 3.6)
    ax = figure.subplots()
    colours = ["#b8b8b8", "#56b4e9", FWD, REV, "#8fbf8f", "#d8ead8", "#444444"]
    for n, (name, part) in enumerate(parts.items()):
        whole, left = sum(part.values()), 0.0
        for (label, value), colour in zip(part.items(), colours, strict=True):
            share = 100 * value / whole
            hatch = "///" if label == "MLP, second matrix" else None
            ax.barh(n, share, left=left, height=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5,
                    label=label if n == 0 else None)  # fmt: skip
            if share > 9:
                ax.text(left + share / 2, n, f"{share:.0f} %", ha="center", va="center", fontsize=9, color=INK,
                        bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1.2))  # fmt: skip
            left += share
        at = 100 * printed[name] * 1e9 / whole
        label = "the paper's figure" if n == 0 else None
        ax.plot([at, at], [n - 0.42, n + 0.42], color=INK, linewidth=2.5, label=label)
    ax.set(yticks=range(len(parts)), xlim=(0, 100), xlabel="percent of the multiply-accumulates")
    ax.set_yticklabels([f"{name}\n{sum(part.values()) / 1e9:.2f} G" for name, part in parts.items()])
    ax.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize=8.5)
    return figure


def positions(learned: torch.Tensor, resized: torch.Tensor) -> Figure:
    """A channel of pos_embed on both grids, with one range of colours."""
    figure = new_figure(7, 2.7)
    axes = figure.subplots(1, 2, width_ratios=(14, 20))
    for ax, grid in zip(axes, (learned, resized), strict=True):
        drawn = ax.imshow(grid[0, :, :, 0].detach().numpy(), cmap="PuOr", vmin=-0.06, vmax=0.06)
        ax.set(title=f"pos_embed, {grid.shape[1]}x{grid.shape[2]}", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    return figure
