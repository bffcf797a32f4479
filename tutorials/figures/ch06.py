"""Figures of chapter 6, what ViG sees."""

from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor

from figures import BOTH, FWD, INK, MUTED, REV, Figure, new_figure
from vig_ref.see import Maps

DIVERGING = "RdBu_r"


def _bare(*axes: Axes) -> None:
    for ax in axes:
        ax.set(xticks=[], yticks=[])


def _frame(ax: Axes, row: int, column: int, patch: float) -> None:
    """A patch framed so that it is seen on any picture."""
    for colour, width in (("white", 3.5), ("black", 1.5)):
        corner = (column * patch - 0.5, row * patch - 0.5)
        ax.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=colour, linewidth=width))


def _limit(weights: Tensor, t: int) -> float:
    """A range of colours for a map, by the weights on other tokens than its own."""
    others = np.abs(np.delete(weights.flatten().numpy(), t))
    return float(np.quantile(others, 0.99)) or 1.0


def matrices(maps: Maps) -> Figure:
    """|A| of head 0: forward, reverse, merged, on one logarithmic scale."""
    figure = new_figure(7, 2.6)
    axes = figure.subplots(1, 3, sharey=True)
    fwd, rev = maps.fwd[0, 0].abs(), maps.rev[0, 0].abs()
    merged = (maps.fwd + maps.rev)[0, 0].abs()
    high = merged.quantile(0.995).item()
    for ax, A, title in zip(axes, (fwd, rev, merged), ("A_fwd", "A_rev", "A_fwd + A_rev"), strict=True):
        A = np.where(A > 0, A, np.nan)
        drawn = ax.imshow(A, norm=LogNorm(high / 300, high), cmap="magma", interpolation="antialiased")
        ax.set(title=title, xticks=range(0, 196, 56), yticks=range(0, 196, 56), xlabel="token j")
    axes[0].set_ylabel("token i, of 196")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="|weight|")
    return figure


def reach(distances: Iterable[int], measured: list[float], alpha: float) -> Figure:
    """The mean weight against the distance in the scan, with the decay of the gates beside it."""
    figure = new_figure(6.6, 3)
    ax = figure.subplots()
    d = np.array(list(distances))
    ax.semilogy(d, measured, color=FWD, label="mean |A_fwd[i, i - d]|")
    ax.semilogy(d, measured[0] * alpha ** (d - 1), "--", color=INK, label="0.958 to the power d")
    for at, name in ((1, "left"), (14, "above")):
        ax.axvline(at, color="0.85", zorder=0)
        ax.annotate(name, (at, ax.get_ylim()[0]), xytext=(4, 5), textcoords="offset points", color=MUTED)
    ax.set(xlabel="distance d in the scan (tokens)", ylabel="weight")
    ax.legend()
    return figure


def tokens(photographs: dict[str, np.ndarray], maps: dict[str, Maps], chosen: dict[str, tuple[int, int]]) -> Figure:
    """A row for each photograph: the picture, then the forward, reverse and merged map of one token over it."""
    figure = new_figure(7, 3.6)
    for axes, (name, (row, column)) in zip(figure.subplots(2, 4), chosen.items(), strict=True):
        image, m = photographs[name], maps[name]
        t = row * m.grid[1] + column
        fwd, rev = (A[0, 0, t].reshape(m.grid) for A in (m.fwd, m.rev))
        limit = _limit(fwd + rev, t)
        axes[0].imshow(image[::2, ::2], extent=(-0.5, 223.5, 223.5, -0.5))
        for ax, weights, title in zip(axes[1:], (fwd, rev, fwd + rev), ("forward", "reverse", "merged"), strict=True):
            _map(ax, image, weights, limit)
            ax.set_title(title if row == 8 else "", fontsize=10)
        for ax in axes:
            _frame(ax, row, column, image.shape[0] / m.grid[0])
        axes[0].set_ylabel(f"token ({row}, {column})", fontsize=9.5)
        _bare(*axes)
    return figure


def _map(ax: Axes, image: np.ndarray, weights: Tensor, limit: float):
    """A map in colours over the photograph in grey."""
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    ax.imshow(image.mean(-1)[::4, ::4], cmap="gray", vmin=-0.5, vmax=1.5, extent=extent)
    return ax.imshow(
        weights.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, alpha=0.75, interpolation="nearest", extent=extent
    )


def knob(image: np.ndarray, merged: dict[int, Tensor], token: tuple[int, int]) -> Figure:
    """The merged map of one token under several gates, each with its own range of colours."""
    figure = new_figure(7, 2.6)
    row, column = token
    for ax, (half_life, A) in zip(figure.subplots(1, len(merged)), merged.items(), strict=True):
        t = row * 14 + column
        weights = A[0, 0, t].reshape(14, 14)
        _map(ax, image, weights, _limit(weights, t))
        _frame(ax, row, column, image.shape[0] / 14)
        ax.set_title(f"half-life {half_life} tokens\nα = {0.5 ** (1 / half_life):.3f}", fontsize=10)
        _bare(ax)
    return figure


def fields(found: dict[str, Tensor]) -> Figure:
    """A panel a model, all with the same logarithmic colours; black is exactly 0 or next to nothing."""
    figure = new_figure(7, 2.7)
    axes = figure.subplots(1, len(found))
    for ax, (name, field) in zip(axes, found.items(), strict=True):
        small = torch.nn.functional.avg_pool2d(field[None, None], 2)[0, 0]
        drawn = ax.imshow(small.clamp_min(1e-6).numpy(), norm=LogNorm(1e-5, 1), cmap="magma")
        ax.set_title(name)
        _bare(ax)
    figure.colorbar(drawn, ax=axes, label="|gradient| / maximum", shrink=0.8)
    return figure


def gates(found: dict[tuple[str, int], dict[str, Tensor]]) -> Figure:
    """Boxes of alpha, for each block before and after training, in both directions."""
    figure = new_figure(7, 3)
    ax = figure.subplots()
    places, labels = [], []
    for n, ((when, block), alphas) in enumerate(found.items()):
        for shift, (direction, alpha) in zip((-0.18, 0.18), alphas.items(), strict=True):
            low, bottom, middle, top, high = np.quantile(alpha.numpy(), (0.01, 0.1, 0.5, 0.9, 0.99))
            colour = FWD if direction == "fwd" else REV
            ax.bxp(
                [dict(whislo=low, q1=bottom, med=middle, q3=top, whishi=high)], positions=[n + shift], widths=0.28,
                showfliers=False, patch_artist=True, manage_ticks=False,
                boxprops=dict(facecolor=colour, alpha=0.5), medianprops=dict(color=INK),
            )  # fmt: skip
            if n == 0:
                ax.plot([], [], "s", color=colour, alpha=0.6, label=f"alpha_{direction}")
        places.append(n)
        labels.append(f"{when},\nblock {block}")
    ax.axhline(0.5 ** (1 / 16), color="0.7", linewidth=1, zorder=0)
    ax.set(xticks=places, ylabel="forget gate α")
    ax.set_xticklabels(labels, fontsize=9.5)
    ax.legend(loc="lower left")
    return figure


def digits(images: Tensor, shown: dict[str, Maps], token: int, head: int) -> Figure:
    """A column a digit: the scan, then a token's merged map before and after training."""
    figure = new_figure(6, 4.4)
    grid = figure.subplots(1 + len(shown), len(images))
    row, column = divmod(token, 4)
    for ax, image in zip(grid[0], images, strict=True):
        ax.imshow(image[0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        _frame(ax, row, column, 2)
    for axes, (when, maps) in zip(grid[1:], shown.items(), strict=True):
        A = (maps.fwd + maps.rev)[:, head, token]
        limit = A.abs().max().item()
        for ax, weights in zip(axes, A, strict=True):
            drawn = ax.imshow(weights.reshape(4, 4).numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit)
            _frame(ax, row, column, 1)
        axes[0].set_ylabel(f"{when} training")
        figure.colorbar(drawn, ax=axes, shrink=0.8)
    grid[0][0].set_ylabel("digit")
    _bare(*grid.flat)
    return figure


def erasing(counts: Iterable[int], curves: dict[str, list[float]]) -> Figure:
    """Accuracy against the number of patches that are painted over."""
    figure = new_figure(6.8, 3.6)
    ax = figure.subplots()
    styles = ((FWD, "o-"), (BOTH, "s-"), (REV, "^--"), (INK, "D-"), (MUTED, "o:"))
    for (name, curve), (colour, style) in zip(curves.items(), styles, strict=True):
        ax.plot(list(counts), [100 * x for x in curve], style, color=colour, label=name, markersize=5)
    ax.axhline(10, color="0.85", zorder=0)
    ax.annotate("guessing", (0, 10), xytext=(0, 3), textcoords="offset points", color=MUTED, fontsize=9.5)
    ax.set(xlabel="patches painted over, of 16", ylabel="digits read rightly (%)", ylim=(0, 103))
    ax.legend(fontsize=9.5)
    return figure
