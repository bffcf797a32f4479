"""Figures of chapter 4, gradients by hand. Each function returns a matplotlib figure."""

import math

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from figures import FWD, INK, MUTED, Figure, new_figure

BACK, THIRD = "#b2182b", "#e08214"


def box(ax, x: float, y: float, text: str, colour: str, width: float = 1.0) -> None:
    corner = x - width / 2, y - 0.27
    ax.add_patch(FancyBboxPatch(corner, width, 0.54, boxstyle="round,pad=0.04", fc="white", ec=colour, lw=1.6))
    ax.text(x, y, text, ha="center", va="center", color=colour, fontsize=11)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], colour: str, text: str = "") -> None:
    style = dict(arrowstyle="-|>", mutation_scale=13, lw=1.5, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(start, end, color=colour, **style))
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.2, text, ha="center", va="center", color=colour)


def two_scans() -> Figure:
    """The scan over the states, and under it the scan over their gradients, the other way."""
    figure = new_figure(7.2, 3.9)
    ax = figure.subplots()
    names = ["t-1", "t", "t+1"]
    for n, name in enumerate(names):
        x = 2.2 * n
        box(ax, x, 3, f"$S_{{{name}}}$", FWD)
        box(ax, x, 1.4, f"$dS_{{{name}}}$", BACK)
        arrow(ax, (x, 3.95), (x, 3.36), FWD)
        ax.text(x, 4.1, f"$+\\,k_{{{name}}}^\\top v_{{{name}}}$", ha="center", color=FWD, fontsize=10)
        arrow(ax, (x, 0.45), (x, 1.04), BACK)
        ax.text(x, 0.15, f"$+\\,s\\;q_{{{name}}}^\\top do_{{{name}}}$", ha="center", color=BACK, fontsize=10)
    for n in (0, 1):
        gate = f"$\\times\\,\\alpha_{{{names[n + 1]}}}$"
        arrow(ax, (2.2 * n + 0.6, 3), (2.2 * (n + 1) - 0.6, 3), FWD, gate)
        arrow(ax, (2.2 * (n + 1) - 0.6, 1.4), (2.2 * n + 0.6, 1.4), BACK, gate)
    arrow(ax, (-1.4, 3), (-0.6, 3), FWD)
    arrow(ax, (5.0, 3), (5.8, 3), FWD)
    arrow(ax, (5.8, 1.4), (5.0, 1.4), BACK)
    arrow(ax, (-0.6, 1.4), (-1.4, 1.4), BACK)
    ax.text(-1.5, 3, "0", ha="right", va="center", color=FWD)
    ax.text(5.9, 1.4, "0", ha="left", va="center", color=BACK)
    ax.text(7.1, 3, "the layer's scan\n$S: [K, V]$", va="center", ha="center", color=FWD, fontsize=10)
    ax.text(7.1, 1.4, "its adjoint\n$dS: [K, V]$", va="center", ha="center", color=BACK, fontsize=10)
    ax.text(2.2, 2.2, "the gate of an arrow is the same in both rows", ha="center", va="center", color=MUTED)
    ax.set(xlim=(-2, 8.1), ylim=(-0.1, 4.4))
    ax.axis("off")
    return figure


def bytes_kept(T: Tensor, curves: dict[str, Tensor], measured: dict[str, tuple[int, int]]) -> Figure:
    """Bytes that wait for the backward pass against the number of tokens; points are what autograd kept."""
    figure = new_figure(6.8, 4.8)
    ax = figure.subplots()
    colours = [BACK, THIRD, FWD, MUTED]
    for (name, size), colour in zip(curves.items(), colours, strict=True):
        ax.loglog(T, size, color=colour, lw=2, label=name, zorder=1)
    for (name, (t, size)), marker in zip(measured.items(), "osD", strict=True):
        ax.plot(t, size, marker, color=INK, ms=7, label=f"measured: {name}")
    ax.set(xlabel="tokens T (196: 224 x 224 pixels; 4096: 1024 x 1024)", ylabel="bytes a layer and image")
    ax.set_yticks([1e5, 1e6, 1e7, 1e8], ["100 kB", "1 MB", "10 MB", "100 MB"])
    ax.set_xticks([49, 196, 784, 4096], ["49", "196", "784", "4096"])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def pairs(P: dict[str, Tensor], t: int) -> Figure:
    """log10 |P_ij| under weak and strong decay, with the pairs of dg_t framed."""
    figure = new_figure(7.8, 4.3)
    axes = figure.subplots(1, 2)
    for ax, (title, values) in zip(axes, P.items(), strict=True):
        T = len(values)
        shown = values.abs().log10().clamp(min=-24)
        shown[torch.ones(T, T).triu(1).bool()] = math.nan
        image = ax.imshow(shown, cmap="viridis", vmin=-24, vmax=1)
        wide = T + 0.8  # drawn a little outside of the triangle, so that no frame hides another
        ax.add_patch(Rectangle((-0.9, t - 0.5), wide, T - t + 0.4, fill=False, ec=FWD, lw=2.4, clip_on=False))
        ax.add_patch(Rectangle((t - 0.5, -0.9), T - t + 0.4, wide, fill=False, ec=THIRD, lw=2.4, clip_on=False))
        ax.add_patch(Rectangle((-0.42, t - 0.42), t - 0.16, T - t - 0.16, fill=False, ec=BACK, lw=3))
        ax.set(title=title, xlabel="j, the token that is read", ylabel="i, the token that reads")
        ax.set_xticks([0, t, T - 1], ["0", "t", "T-1"])
        ax.set_yticks([0, t, T - 1], ["0", "t", "T-1"])
        ax.set(xlim=(-1.2, T + 0.2), ylim=(T + 0.2, -1.2))
        ax.tick_params(length=0, pad=1)
        ax.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, fill=False, ec=c, lw=2) for c in (FWD, THIRD, BACK)]
    labels = ["rows i ≥ t: the sum of q dq", "columns j ≥ t: the sum of k dk", "i ≥ t > j: what dg wants"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.colorbar(image, ax=axes, label="log10 |P|", shrink=0.8)
    return figure


def gate_errors(errors: dict[str, dict[str, float]]) -> Figure:
    """RMS error of dg over the RMS of dg, a group of bars for each regime of the gates."""
    figure = new_figure(7.4, 4.0)
    ax = figure.subplots()
    colours = ["#fdb863", "#e08214", "#b2182b", "#92c5de", "#4393c3", "#2166ac"]
    width = 0.8 / len(errors)
    for n, ((method, found), colour) in enumerate(zip(errors.items(), colours, strict=True)):
        x = [m + (n - (len(errors) - 1) / 2) * width for m in range(len(found))]
        bottom = 1e-8
        ax.bar(x, [max(e, bottom) - bottom for e in found.values()], width, bottom=bottom, color=colour, label=method)
    ax.axhline(1, color=INK, lw=1, ls="--")
    ax.text(-0.45, 2, "error as large as dg itself", fontsize=9, va="bottom")
    ax.set(yscale="log", ylim=(1e-8, 1e13), ylabel="rms(error) / rms(dg)")
    ax.set_yticks([10.0**n for n in range(-8, 9, 2)])
    ax.set_xticks(range(len(found)), list(found))
    ax.grid(axis="y", alpha=0.25)
    ax.legend(fontsize=8.5, ncols=2, loc="upper left")
    return figure


def boundaries(matrices: dict[str, Tensor]) -> Figure:
    """The 0/1 matrices M, one for each kind of boundary, `[C, C]`."""
    figure = new_figure(7.6, 2.2)
    axes = figure.subplots(1, len(matrices))
    for ax, (title, M) in zip(axes, matrices.items(), strict=True):
        C = len(M)
        ax.imshow(M, cmap="Blues", vmin=0, vmax=1.4)
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[0, C - 1], yticks=[0, C - 1], xlabel="gate t")
        ax.set_xticks([n + 0.5 for n in range(C - 1)], minor=True)
        ax.set_yticks([n + 0.5 for n in range(C - 1)], minor=True)
        ax.grid(which="minor", color="#cccccc", lw=0.5)
        ax.tick_params(which="minor", length=0)
    axes[0].set_ylabel("token i")
    return figure
