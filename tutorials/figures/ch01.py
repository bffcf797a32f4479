"""Figures of chapter 1: memories that fade, and what a patch of a photograph can read."""

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_sample_image
from torch import Tensor

import vig_ref
from figures import BOTH, FWD, INK, MUTED, REV, Figure, new_figure

COLOURS = (FWD, REV, BOTH, "#2e8b57", INK)
GRID = 14  # patches a side: 224 pixels in patches of 16


def photograph(name: str, size: int) -> Tensor:
    """The middle square of one of scikit-learn's two photographs, `[size, size, 3]` in 0 to 1."""
    image = torch.from_numpy(np.array(load_sample_image(name))).float() / 255
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side].permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return square[0].permute(1, 2, 0).clamp(0, 1)


def impulse(memories: dict[str, Tensor], t_write: int) -> Figure:
    """What is left of a single 1, for several gates."""
    figure = new_figure(7.2, 2.8)
    ax = figure.subplots()
    for (name, S), colour in zip(memories.items(), COLOURS, strict=False):
        ax.plot(S, color=colour, label=name, drawstyle="steps-post")
    ax.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    ax.annotate(f"a 1 is written at t = {t_write}", (t_write, 1), (t_write + 14, 0.93), fontsize=10,
                arrowprops={"arrowstyle": "->", "color": MUTED}, va="center")  # fmt: skip
    ax.set(xlabel="token t", ylabel="memory $S_t$", ylim=(-0.03, 1.12))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gates(x: Tensor, g: dict[str, Tensor]) -> Figure:
    """The gate, and the half-life that it means, over the number that the network computes."""
    figure = new_figure(7.2, 3.2)
    left, right = figure.subplots(1, 2)
    for (name, values), colour in zip(g.items(), (MUTED, FWD), strict=True):
        left.plot(x, values.exp(), color=colour, label=name)
        right.semilogy(x, np.log(0.5) / values, color=colour, label=name)
    left.set(xlabel="x, what the network computes", ylabel=r"gate $\alpha$", ylim=(0, 1.03))
    left.legend(frameon=False, loc="lower right", fontsize=10)
    right.axhline(14, color=REV, linewidth=1, linestyle="--")
    right.text(-8.3, 20, "the patch above,\n14 tokens back", color=REV, fontsize=9)
    right.set(xlabel="x", ylabel="half-life in tokens", ylim=(0.05, 2e4))
    return figure


def one_row(image: Tensor, row: int, x: Tensor, means: dict[str, Tensor]) -> Figure:
    """A line of a photograph, and two memories that ran along it."""
    figure = new_figure(7.2, 4.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(1.3, 1), sharex=True)
    top.imshow(image[:100], aspect="auto", extent=(0, image.shape[1], 100, 0))
    top.axhline(row, color=INK, linewidth=1.5)
    top.set(yticks=[], title=f"the black line is the sequence: {len(x)} pixels")
    bottom.plot(x, color="#bbbbbb", linewidth=1, label="brightness")
    for (name, mean), colour in zip(means.items(), (REV, FWD), strict=True):
        bottom.plot(mean, color=colour, label=name)
    bottom.set(xlabel="pixel t", ylabel="brightness", xlim=(0, len(x)), ylim=(-0.02, 1.35), yticks=(0, 0.5, 1))
    bottom.legend(frameon=False, loc="upper center", fontsize=9, ncols=3)
    return figure


def _matrix(ax, x: Tensor, title: str, limit: float) -> None:
    ax.imshow(x, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(x.numpy() + 0.0):  # -0 becomes 0
        colour = "white" if abs(value) > 0.6 * limit else INK
        ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=9, color=colour)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=10)


def outer_product(k: Tensor, v: Tensor) -> Figure:
    """One pair, written: a column times a row."""
    figure = new_figure(6.4, 2.4)
    widths = (1, 0.35, len(v), 0.35, len(v))
    axes = figure.subplots(1, 5, width_ratios=widths)
    limit = float(torch.outer(k, v).abs().max())
    _matrix(axes[0], k[:, None], "$k_t^T$ [K, 1]", limit)
    _matrix(axes[2], v[None], "$v_t$ [1, V]", limit)
    _matrix(axes[4], torch.outer(k, v), "$k_t^T v_t$ [K, V]", limit)
    for ax, sign in ((axes[1], "·"), (axes[3], "=")):
        ax.text(0.5, 0.5, sign, ha="center", va="center", fontsize=18)
        ax.axis("off")
    return figure


def interference(counts: list[int], predicted: Tensor, measured: Tensor, K: int) -> Figure:
    figure = new_figure(6, 3)
    ax = figure.subplots()
    ax.loglog(counts, predicted, color=MUTED, label=r"predicted, $\sqrt{(n-1)/K}$")
    ax.loglog(counts, measured, "o", color=FWD, label="measured")
    ax.axvline(K, color=REV, linewidth=1, linestyle="--")
    ax.text(K * 1.08, 0.35, f"n = K = {K}", color=REV)
    ax.set_xticks(counts, counts, minor=False)
    ax.set_yticks([0.25, 0.5, 1, 2], ["1/4", "1/2", "1", "2"])
    ax.minorticks_off()
    ax.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set(xlabel="pairs n in the memory", ylabel="noise / value")
    ax.legend(frameon=False)
    return figure


def states(S: list[Tensor], alpha: list[Tensor]) -> Figure:
    """A state after each token; the gate of every row to its left."""
    figure = new_figure(7.2, 1.5)
    axes = figure.subplots(1, len(S))
    limit = max(float(s.abs().max()) for s in S)
    for t, (ax, s, a) in enumerate(zip(axes, S, alpha, strict=True)):
        _matrix(ax, s, f"$S_{t}$  [{s.shape[0]}, {s.shape[1]}]", limit)
        if t:
            for row, value in enumerate(a):
                ax.text(-0.62, row, f"×{value:.2g}", ha="right", va="center", fontsize=9, color=REV)
    return figure


def three_matrices(fwd: Tensor, rev: Tensor) -> Figure:
    """Weights of a scan from the left, one from the right, and their mean."""
    figure = new_figure(7.2, 2.9)
    for ax, A, name in zip(
        figure.subplots(1, 3), (fwd, rev, (fwd + rev) / 2), ("forward scan", "reverse scan", "mean"), strict=True
    ):
        _matrix(ax, A, f"{name}  [T, T]", 1.4)
        ax.set(xlabel="j, the token that is read")
    figure.axes[0].set(ylabel="i, the token that reads")
    return figure


def _patches_axis(ax, image: Tensor) -> None:
    ax.imshow(image, extent=(-0.5, GRID - 0.5, GRID - 0.5, -0.5))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def scan_order(image: Tensor) -> Figure:
    """The photograph as a sequence: both scans' ways through the patches."""
    figure = new_figure(7.2, 3.8)
    ways = (("fwd: row by row from the top left", FWD, 0), ("rev: the same way back", REV, GRID * GRID - 1))
    for ax, (name, colour, start) in zip(figure.subplots(1, 2), ways, strict=True):
        _patches_axis(ax, image)
        for edge in range(1, GRID):
            ax.axhline(edge - 0.5, color="white", linewidth=0.5)
            ax.axvline(edge - 0.5, color="white", linewidth=0.5)
        for row in range(GRID):
            ends = ((-0.3, row), (GRID - 0.7, row))
            a, b = ends if start == 0 else ends[::-1]
            ax.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.2))
        ax.plot(start % GRID, start // GRID, "o", color=colour, markersize=8, markeredgecolor="white")
        ax.set_title(name, fontsize=10, color=colour)
    return figure


def readings(image: Tensor, maps: dict[str, tuple[Tensor, Tensor]], token: int) -> Figure:
    """For several gates, how much of each patch reaches one token: forward, reverse, and the mean of both.

    Args:
        maps: by name of the gate, the weights `[T]` of the two scans for that token.
    """
    figure = new_figure(7.2, 2.05 * len(maps) + 0.3)
    grid = figure.subplots(len(maps), 3, squeeze=False)
    for axes, (name, (fwd, rev)) in zip(grid, maps.items(), strict=True):
        for ax, weight in zip(axes, (fwd, rev, (fwd + rev) / 2), strict=True):
            _patches_axis(ax, image.mean(-1)[..., None].expand(-1, -1, 3) * 0.5 + 0.5)
            limit = float(torch.cat([fwd, rev]).abs().max())
            shown = ax.imshow(weight.reshape(GRID, GRID), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.75)
            _frame(ax, token)
        axes[0].set_ylabel(name)
        figure.colorbar(shown, ax=axes[2], shrink=0.8)
    for ax, name in zip(grid[0], ("forward", "reverse", "mean of both"), strict=True):
        ax.set_title(name, fontsize=10)
    return figure


def _frame(ax, token: int) -> None:
    corner = (token % GRID - 0.5, token // GRID - 0.5)
    for colour, width in (("white", 3.5), ("black", 1.5)):  # seen on any picture
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def recalled(pictures: dict[str, dict[str, Tensor]]) -> Figure:
    """Patches `[T, 16, 16, 3]` read back from a memory: a row for each kind of keys, a column for each gate."""
    columns = len(next(iter(pictures.values())))
    figure = new_figure(2.4 * columns, 2.5 * len(pictures))
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    for axes, (row, found) in zip(grid, pictures.items(), strict=True):
        for ax, (name, picture) in zip(axes, found.items(), strict=True):
            rows = picture.clamp(0, 1).unflatten(0, (GRID, GRID)).transpose(1, 2)  # [14, 16, 14, 16, 3]
            ax.imshow(rows.flatten(0, 1).flatten(1, 2))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_title(name, fontsize=10)
        axes[0].set_ylabel(row)
    return figure


# --- the animation of the scan ---------------------------------------------------------------------------------------


def _gates(colour: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Log gates of both scans `[T]`, by name: three constants, and one that closes where the colour jumps."""
    T = len(colour)
    gates = {f"half-life {n}": (torch.full((T,), -np.log(2) / n),) * 2 for n in (16, 4, 64)}
    jump = (colour[1:] - colour[:-1]).norm(dim=1)  # between a patch and the next  [T-1]
    closing = -6 * (jump - 0.08).clamp_min(0)
    keep = torch.full((1,), -np.log(2) / 64)
    gates["closes at edges"] = torch.cat([keep, closing + keep]), torch.cat([closing + keep, keep])
    return gates


def decays(g_fwd: Tensor, g_rev: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of patch j when a scan reaches patch t, `[T, T]` each: the library's scans with q = k = 1, v = I."""
    T = len(g_fwd)
    one, v = torch.ones(1, 1, T, 1), torch.eye(T)[None, None]
    scans = ((g_fwd, False), (g_rev, True))
    return tuple(
        vig_ref.gla(one, one, v, g[None, None, :, None], reverse=reverse, scale=1.0, backend="naive")[0, 0]
        for g, reverse in scans
    )


def scan_data() -> dict:
    """Numbers of docs/animations/scan.html.

    Keys are at right angles here (K = T), so that row j of a state is patch j's value times what is left of it.
    """
    side = 8
    image = photograph("china.jpg", GRID * side)
    patches = image.unflatten(0, (GRID, side)).unflatten(2, (GRID, side)).transpose(1, 2).flatten(0, 1)
    values = patches.flatten(1)  # [T, V]
    weights, norms = {}, {}
    for name, (g_fwd, g_rev) in _gates(patches.mean((1, 2))).items():
        fwd, rev = decays(g_fwd, g_rev)
        weights[name] = (255 * torch.maximum(fwd, rev)).round().int()  # they share the diagonal, where both are 1
        norms[name] = {way: (w[..., None] * values).flatten(1).norm(dim=1) for way, w in (("fwd", fwd), ("rev", rev))}
    return {
        "grid": GRID, "side": side, "photograph": (255 * image).round().int(), "weights": weights, "norms": norms,
    }  # fmt: skip


def scan_frame(step: int, gate: str = "half-life 16") -> Figure:
    """One step of that animation as a picture."""
    data = scan_data()
    weight = data["weights"][gate][step].float() / 255
    j = torch.arange(GRID * GRID)
    held = {
        "the image": torch.ones_like(weight),
        "$S_{fwd}[t]$ holds": weight * (j <= step),
        "$S_{rev}[t]$ holds": weight * (j >= step),
        "$o[t]$: the mean": weight * torch.where(j == step, 1, 0.5),
    }
    figure = new_figure(7.2, 2.2)
    for ax, (name, w) in zip(figure.subplots(1, 4), held.items(), strict=True):
        w = w.reshape(GRID, GRID).repeat_interleave(8, 0).repeat_interleave(8, 1)[..., None]
        _patches_axis(ax, w * data["photograph"] / 255 + (1 - w) * 0.93)
        _frame(ax, step)
        ax.set_title(name, fontsize=10)
    return figure
