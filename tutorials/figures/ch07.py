"""Chapter 7, the roadmap: two small tasks, the runs on them, and their figures.

`python -m figures.ch07`, in `tutorials/`, trains every row several times on both tasks and writes
`docs/results/roadmap.json` (half an hour on one core). The chapter runs the same functions with one seed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from sklearn.datasets import load_sample_image
from torch import Tensor
from tqdm import tqdm

from figures import BOTH, FWD, INK, MUTED, REV, Figure, new_figure
from vig_ref import demo
from vig_ref.machine import circumstances
from vig_ref.model import ViG, ViGConfig, wake
from vig_ref.roadmap import ROADMAP, create_row

RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "roadmap.json"
ROWS = [name for name in ROADMAP if name != "fused"]  # the seventh row computes what the sixth does
SHORT, LONG = 120, 600  # steps of training
SIDE, PATCH = 24, 4  # of a crop, in pixels: 6x6 tokens
HIDDEN = 0.4  # share of the patches that are hidden


# --- training --------------------------------------------------------------------------------------------------------


def small(row: str, seed: int, patch_size: int, **options) -> ViG:
    """A row as a model of two blocks, its global branch awake."""
    torch.manual_seed(seed)
    config = ViGConfig(dim=32, num_heads=1, depth=2, patch_size=patch_size, silu=True)
    model = create_row(row, config=config, backend="chunked", **options)
    wake(model)
    return model


def fit(model: ViG, loss: Callable[[], Tensor], steps: int) -> None:
    """The same for every row and task: AdamW, a rate that rises to 0.005 and falls to 0, gradients clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


# --- task 1: which digit is it? --------------------------------------------------------------------------------------


def digits(row: str, seed: int, steps: int) -> float:
    """Share of the 360 held-out handwritten digits that the row reads wrongly."""
    data, random = demo.load("cpu"), torch.Generator().manual_seed(seed)
    model = small(row, seed, patch_size=2, num_classes=10, img_size=8, in_chans=1)

    def loss() -> Tensor:
        batch = torch.randint(len(data.x), (64,), generator=random)
        return F.cross_entropy(model(demo.jitter(data.x[batch], random)), data.y[batch])

    fit(model, loss, steps)
    with torch.no_grad():
        return (model(data.x_test).argmax(1) != data.y_test).float().mean().item()


# --- task 2: which colour has a hidden patch? ------------------------------------------------------------------------


class Puzzle(NamedTuple):
    """Crops with hidden patches `[B, 4, 24, 24]`, all colours `[B, 36, 3]`, and where they are asked for `[B, 36]`."""

    crops: Tensor
    colours: Tensor
    asked: Tensor


def photographs() -> list[Tensor]:
    """scikit-learn's two photographs at half their size, `[3, 213, 320]` in -1 to 1."""
    pixels = (np.array(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    images = (torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in pixels)
    return [F.interpolate(x, scale_factor=0.5, mode="area")[0] for x in images]


def puzzle(photos: list[Tensor], n: int, held_out: bool, random: torch.Generator) -> Puzzle:
    """n random crops, of the left 70 % of the photographs or of the rest; hidden patches are grey, and marked."""

    def crop() -> Tensor:
        photo = photos[int(torch.randint(len(photos), (), generator=random))]
        edge = int(0.7 * photo.shape[2])
        low, high = (edge, photo.shape[2]) if held_out else (0, edge)
        left = int(torch.randint(low, high - SIDE + 1, (), generator=random))
        top = int(torch.randint(photo.shape[1] - SIDE + 1, (), generator=random))
        return photo[:, top : top + SIDE, left : left + SIDE]

    crops = torch.stack([crop() for _ in range(n)])
    asked = torch.rand(n, 1, SIDE // PATCH, SIDE // PATCH, generator=random) < HIDDEN
    mask = F.interpolate(asked.float(), scale_factor=PATCH)  # of pixels
    colours = F.avg_pool2d(crops, PATCH).flatten(2).mT
    return Puzzle(torch.cat([crops * (1 - mask), mask], dim=1), colours, asked.flatten(1))


def unexplained(guess: Tensor, test: Puzzle) -> float:
    """Mean squared error on the hidden patches, of what guessing their mean colour would give."""
    right = test.colours[test.asked]
    return ((guess[test.asked] - right).square().mean() / (right - right.mean(0)).square().mean()).item()


def hidden(row: str, seed: int, steps: int) -> float:
    """What the row leaves unexplained of the colours of hidden patches, in the held-out part of the photographs."""
    photos, random = photographs(), torch.Generator().manual_seed(seed)
    model = small(row, seed, PATCH, num_classes=3, img_size=SIDE, in_chans=4)

    def loss() -> Tensor:
        p = puzzle(photos, 32, False, random)
        return (model.head(model.forward_features(p.crops)) - p.colours)[p.asked].square().mean()

    fit(model, loss, steps)
    test = held_out(photos)
    with torch.no_grad():
        return unexplained(model.head(model.forward_features(test.crops)), test)


def held_out(photos: list[Tensor]) -> Puzzle:
    """The 512 crops that every run is tested on."""
    return puzzle(photos, 512, True, torch.Generator().manual_seed(99))


TASKS = {"digits": digits, "hidden": hidden}


# --- figures ---------------------------------------------------------------------------------------------------------


def dependence(found: dict[str, Tensor]) -> Figure:
    """A panel a row of the roadmap, all with the same logarithmic colours relative to their own maximum."""
    figure = new_figure(7, 4.7)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for ax, (name, A) in zip(axes.flat, found.items(), strict=True):
        drawn = ax.imshow((A / A.max()).clamp_min(1e-6), norm=LogNorm(1e-4, 1), cmap="magma")
        ax.set(title=name, xticks=range(0, 36, 6), yticks=range(0, 36, 6))
    for ax in axes[1]:
        ax.set_xlabel("patch j")
    for ax in axes[:, 0]:
        ax.set_ylabel("token i")
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="gradient / maximum")
    return figure


def borders(found: dict[str, Tensor]) -> Figure:
    """Two small matrices of 0, 1/2 and 1, the object's block framed."""
    figure = new_figure(6.2, 3.1)
    for ax, (name, A) in zip(figure.subplots(1, 2), found.items(), strict=True):
        drawn = ax.imshow(A, cmap="Blues", vmin=0, vmax=1)
        ax.add_patch(Rectangle((3.5, 3.5), 4, 4, fill=False, edgecolor=REV, linewidth=2))
        ax.set(title=name, xticks=range(0, 12, 2), yticks=range(0, 12, 2), xlabel="token j")
    figure.axes[0].set_ylabel("token i")
    figure.colorbar(drawn, ax=figure.axes, shrink=0.75, ticks=(0, 0.5, 1), label="weight")
    return figure


def puzzles(test: Puzzle) -> Figure:
    """Four crops with much to see: as they are given, and with the colours that are wanted."""
    figure = new_figure(6, 3)
    grid = figure.subplots(2, 4)
    lively = test.colours.std(dim=1).mean(1).argsort(descending=True)[::20]
    for n, (top, bottom) in zip(lively.tolist(), grid.T, strict=False):
        colours = test.colours[n].T.reshape(3, 6, 6)
        mask = test.asked[n].reshape(1, 6, 6)
        blocks = F.interpolate(torch.where(mask, colours, 0.0)[None], scale_factor=PATCH)[0]
        shown = test.crops[n, :3]
        for ax, image in ((top, shown), (bottom, shown + blocks)):
            ax.imshow((image.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
            ax.set(xticks=[], yticks=[])
    grid[0, 0].set_ylabel("given")
    grid[1, 0].set_ylabel("wanted")
    return figure


def runs(
    record: dict[str, dict[str, list[float]]], live: dict[str, float], paper: dict[str, float], label: str,
    baselines: dict[int, float] | None = None,
) -> Figure:
    """A dot a run, short and long, a line through their means; the paper's errors in a panel of their own."""
    figure = new_figure(7, 3.9)
    ours, theirs = figure.subplots(1, 2, width_ratios=(5, 2), sharey=True)
    for (steps, rows), colour, shift in zip(record.items(), (FWD, BOTH), (-0.12, 0.12), strict=True):
        for n, row in enumerate(ROWS):
            ours.plot([100 * x for x in rows[row]], [n + shift] * len(rows[row]), "o", color=colour, alpha=0.55, ms=5)
        means = [100 * np.mean(rows[row]) for row in ROWS]
        ours.plot(means, np.arange(len(ROWS)) + shift, "-", color=colour, linewidth=1, label=f"{steps} steps")
    ours.plot([100 * x for x in live.values()], [ROWS.index(row) - 0.12 for row in live], "*", color=REV, ms=10,
              label="this notebook", linestyle="none")  # fmt: skip
    for n, (count, error) in enumerate((baselines or {}).items()):
        ours.axvline(100 * error, color=INK, linestyle=("--", ":")[n], linewidth=1, label=f"{count} neighbours")
    ours.set(yticks=range(len(ROWS)), xlabel=label, xscale="log")
    ours.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ours.xaxis.set_major_locator(FixedLocator((0.5, 1, 2, 5, 10, 20, 50)))
    ours.xaxis.set_minor_locator(NullLocator())
    ours.set_yticklabels(ROWS)
    ours.grid(axis="x", color="0.93")
    figure.legend(loc="outside upper center", ncols=5, fontsize=9, columnspacing=1.2, handletextpad=0.5)
    theirs.plot([100 - paper[row] for row in ROWS], range(len(ROWS)), "s-", color=MUTED)
    theirs.set(xlabel="ImageNet, by the\npaper: errors (%)", xlim=(20, 36))
    theirs.tick_params(labelleft=False)
    ours.invert_yaxis()
    return figure


# --- the record ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(5, 3), metavar="N", help="runs, short and long (5 3)")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = [
        (task, steps, row, seed)
        for steps, seeds in zip((SHORT, LONG), options.seeds, strict=True)
        for task in TASKS for seed in range(seeds) for row in ROWS
    ]  # fmt: skip
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for task, steps, row, seed in tqdm(plan, desc="runs"):
        runs = found.setdefault(task, {}).setdefault(str(steps), {}).setdefault(row, [])
        runs.append(round(TASKS[task](row, seed, steps), 6))
    command = f"python -m figures.ch07 --seeds {options.seeds[0]} {options.seeds[1]}"
    record = {"errors": found, **circumstances(command, "cpu", ("scikit-learn",))}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
