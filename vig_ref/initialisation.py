"""`vig-ref init`: the released initialisation against one under which the global branch starts alive.

Released, q, k and v start so small that o, of third order in them, vanishes beside the eps of the norm behind it: the
norm's output is close to 0, and so are the gradients of all that lies before it. `vig_ref.wake` gives the two layers
that make them small their usual scale. The command trains the demo's model of digits from both starts, with the same
seeds and batches.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vig_ref import demo
from vig_ref.cli import make_folders, positive
from vig_ref.model import HierarchicalViG, Mixer, ViG, create_model, wake


def released(model: ViG | HierarchicalViG) -> None:
    """Nothing: a new model has the released initialisation."""


INITIALISATIONS: dict[str, Callable[[ViG | HierarchicalViG], None]] = {"released": released, "wake": wake}


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def life(model: ViG | HierarchicalViG, images: Tensor) -> list[float]:
    """mean(o^2) / eps of every block, from the image to the head: well below 1, the global branch is off.

    In eval mode; the model is left in the mode in which it was.
    """
    ratios = []

    def record(norm: Any, inputs: tuple[Tensor]) -> None:
        ratios.append((inputs[0].double().square().mean() / norm.eps).item())

    norms = [module.norm_o for module in model.modules() if isinstance(module, Mixer)]
    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        with demo.evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ratios


def at_the_start(name: str, initialise: Callable[[ViG | HierarchicalViG], None]) -> dict[str, float]:
    """The least and the greatest of `life` over the blocks of a new model, for an image of noise."""
    torch.manual_seed(demo.SEED)
    model = create_model(name)
    initialise(model)
    ratios = life(model, torch.randn(1, 3, 224, 224))
    return {"least": min(ratios), "greatest": max(ratios)}


def train(data: demo.Digits, initialise: Callable[[ViG], None], seed: int, epochs: int) -> dict[str, Any]:
    """The demo's training from another start."""
    steps = epochs * (len(data.x) // demo.BATCH)
    learner = demo.Learner(data, backend="chunked", steps=steps)
    torch.manual_seed(seed)
    learner.random.manual_seed(seed)
    model = ViG(demo.CONFIG, num_classes=10, img_size=8, in_chans=1)
    initialise(model)
    learner.model.load_state_dict(model.state_dict())
    at_start = life(learner.model, data.x[:64])
    history = demo.train(learner, epochs)
    return {
        "seed": seed, "life_at_start": at_start, "life_at_end": life(learner.model, data.x[:64]), "history": history,
        "test_accuracy": learner.accuracy(), "without_global_branch": learner.accuracy_without_global_branch(),
    }  # fmt: skip


def measure(seeds: int, epochs: int) -> dict[str, Any]:
    data = demo.load("cpu")
    return {
        "epochs": epochs, "test_images": len(data.y_test),
        "at_the_start": {
            name: {which: at_the_start(name, f) for which, f in INITIALISATIONS.items()}
            for name in ("vig_tiny", "vig_h_tiny")
        },
        "digits": {
            which: [train(data, f, seed, epochs) for seed in range(seeds)] for which, f in INITIALISATIONS.items()
        },
    }  # fmt: skip


# --- writing ---------------------------------------------------------------------------------------------------------


def markdown(data: dict[str, Any]) -> str:
    """Both tables as one page."""
    seeds = len(data["digits"]["released"])
    lines = [
        "# Two initialisations", "",
        f"Written by `vig-ref init --seeds {seeds} --epochs {data['epochs']}`. mean(o²)/eps is what enters the norm "
        "behind the operator, beside the number that the norm adds to it: well below 1, the global branch is off.", "",
        "## A new model, an image of noise at 224x224", "",
        "| model | initialisation | least mean(o²)/eps of a block | greatest |", "|---|---|---:|---:|",
    ]  # fmt: skip
    for name, starts in data["at_the_start"].items():
        for which, life in starts.items():
            lines.append(f"| {name} | {which} | {life['least']:.1e} | {life['greatest']:.1e} |")
    lines += [
        "", f"## The demo's model on handwritten digits, {data['epochs']} epochs, {seeds} seeds", "",
        "Mean, and in brackets the extremes, over the seeds.", "",
        "| | " + " | ".join(data["digits"]) + " |", "|---|" + "---:|" * len(data["digits"]),
    ]  # fmt: skip
    last = data["epochs"]
    early = min(3, last)
    rows: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
        "least mean(o²)/eps at the start": (lambda r: min(r["life_at_start"]), ".1e"),
        "least mean(o²)/eps at the end": (lambda r: min(r["life_at_end"]), ".1e"),
        f"training loss, epoch {early}": (lambda r: r["history"][early - 1]["loss"], ".3f"),
        f"training loss, epoch {last}": (lambda r: r["history"][-1]["loss"], ".4f"),
        f"test accuracy, epoch {early}": (lambda r: r["history"][early - 1]["test_accuracy"], ".2%"),
        f"test accuracy, epoch {last}": (lambda r: r["test_accuracy"], ".2%"),
        "the same with o = 0": (lambda r: r["without_global_branch"], ".2%"),
    }
    for title, (value, form) in rows.items():
        cells = []
        for runs in data["digits"].values():
            values = [value(run) for run in runs]
            cells.append(f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    image = 1 / data["test_images"]
    lines += ["", f"One test image is {image:.2%}."]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/init"), help="folder for what is written (out/init)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each initialisation (3)")
    parser.add_argument("--epochs", type=positive, default=demo.EPOCHS, help=f"epochs of each run ({demo.EPOCHS})")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    make_folders("vig-ref init", options.out)
    data = measure(options.seeds, options.epochs)
    page = markdown(data)
    (options.out / "initialisation.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "initialisation.md").write_text(page)
    print(page)
    print(f"written: {options.out / 'initialisation.md'} and initialisation.json beside it")
    return 0
