"""`vig-ref demo`: check that the three layers agree, then train a small ViG on real handwritten digits.

Read it top to bottom:  data -> training -> the same steps in two layers -> pictures -> the command.
Nothing is downloaded: the digits are the 1797 scans of 8x8 pixels that come with scikit-learn (UCI repository, 1998).
Everything is seeded: the same machine and versions give the same result.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from vig_ref import agreement, tolerance
from vig_ref.cli import make_folders, positive
from vig_ref.machine import circumstances, prepare
from vig_ref.model import Mixer, ViG, ViGConfig, wake
from vig_ref.ops import resolve_backend

SEED = 0
EPOCHS = 20
BATCH = 64
REQUIRED_ACCURACY = 0.97
SIDE_BY_SIDE_STEPS = 5
#: A ViG for images of 8x8: patches of 2x2 make T = 16 tokens; each head's state is K x V = 16 x 32.
CONFIG = ViGConfig(dim=64, num_heads=2, depth=3, patch_size=2, silu=True)

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's: distinct under every common colour blindness


# --- data ------------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images `[N, 1, 8, 8]` in [-1, 1] and their labels `[N]`, in a part for training and one held out."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(device: str) -> Digits:
    """The scans, one in five of each digit held out: the split is a function of SEED alone."""
    pixels, labels = load_digits(return_X_y=True)  # [N, 64] in 0 to 16, [N]
    images = np.float32(pixels / 8 - 1).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=SEED, stratify=labels)
    return Digits(*(torch.from_numpy(part).to(device) for part in (x, y, x_test, y_test)))


def jitter(x: Tensor, r: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 % and moved by up to 0.8 pixels.

    1437 scans are few: without this the model learns them by heart within a few epochs.
    """
    most = torch.tensor([[0.21], [0.12], [0.2], [0.2]])  # radians, share of the size, half widths of the image
    turn, zoom, move_x, move_y = ((2 * torch.rand(4, len(x), generator=r) - 1) * most).to(x)
    cos, sin = (1 + zoom) * turn.cos(), (1 + zoom) * turn.sin()
    theta = torch.stack([cos, -sin, move_x, sin, cos, move_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # paper is -1 here; grid_sample fills with 0


# --- training --------------------------------------------------------------------------------------------------------


def build(backend: str) -> ViG:
    """A small ViG whose global branch is awake: from the released start it hardly learns to use it.

    `vig-ref init` measures both, docs/results/initialisation.md holds the figures.
    """
    model = ViG(CONFIG, backend=backend, num_classes=10, img_size=8, in_chans=1)
    wake(model)
    return model


def mixers(model: ViG) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, in which no path is dropped; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Learner:
    """A model and what trains it. Two learners of one seed meet the same weights, batches and jitter.

    Args:
        backend: the layer that computes the mixer; the one thing in which two learners may differ.
        steps: length of the learning-rate schedule.
    """

    def __init__(self, data: Digits, *, backend: str, steps: int):
        torch.manual_seed(SEED)
        self.data = data
        self.random = torch.Generator().manual_seed(SEED)
        self.model = build(backend).to(data.x)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 3e-3, total_steps=steps, pct_start=0.2)

    def batches(self) -> list[Tensor]:
        """The indices of one epoch in a random order; the last, smaller batch is left out."""
        order = torch.randperm(len(self.data.x), generator=self.random)
        return list(order.split(BATCH))[: len(self.data.x) // BATCH]

    def step(self, batch: Tensor) -> float:
        """One step of training; returns the loss before it."""
        batch = batch.to(self.data.x.device)
        self.model.train()
        logits = self.model(jitter(self.data.x[batch], self.random))
        loss = F.cross_entropy(logits, self.data.y[batch])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def answers(self) -> Tensor:
        """The model's digit for each held-out image."""
        return self.model.eval()(self.data.x_test).argmax(1)

    def accuracy(self) -> float:
        """The share of held-out digits read rightly."""
        return (self.answers() == self.data.y_test).float().mean().item()

    def accuracy_without_global_branch(self) -> float:
        """The same with o = 0: what the local branch reads alone, and so whether the operator does anything here."""
        hooks = [mixer.norm_o.register_forward_hook(lambda *_: 0.0) for mixer in mixers(self.model)]
        try:
            return self.accuracy()
        finally:
            for hook in hooks:
                hook.remove()


def train(learner: Learner, epochs: int) -> list[dict[str, float]]:
    """Train, and return each epoch's mean loss and held-out accuracy. Nothing is chosen by that accuracy."""
    history = []
    with tqdm(total=epochs * (len(learner.data.x) // BATCH), desc="training", unit="step", disable=None) as progress:
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in learner.batches():
                losses.append(learner.step(batch))
                progress.update()
            history.append({"epoch": epoch, "loss": float(np.mean(losses)), "test_accuracy": learner.accuracy()})
            progress.set_postfix(loss=f"{history[-1]['loss']:.3f}", test=f"{history[-1]['test_accuracy']:.1%}")
    return history


# --- the same steps in two layers ------------------------------------------------------------------------------------


def side_by_side(data: Digits, backends: tuple[str, str]) -> dict[str, Any]:
    """Train the same first steps twice, in two layers, and compare the losses.

    Rounding is all that may tell them apart. Each operation rounds by u of its result (2^-53 in float64, 2^-24 in
    float32), and the longest chain of them, from a pixel to the loss, passes `depth` blocks, each with sums over
    T tokens and over D channels; each step of training adds one more passage. So the losses of step n may differ by
    n * depth * (T + D) * u of their size: a generous estimate, since roundings rarely all point one way, but no proof,
    since AdamW can magnify the rounding of a small gradient.

    On the CPU this is float64, because in float32 a real mistake would hide there: with the gates of both directions
    swapped in one layer, these losses differ by 1e-6. The compiled fused layer has float32 only. What neither can see:
    the norm behind the mixer hides a wrong constant factor. The agreement table sees it.
    """
    if "fused" not in backends:
        data = data._replace(x=data.x.double(), x_test=data.x_test.double())
    one, two = (Learner(data, backend=name, steps=SIDE_BY_SIDE_STEPS + 1) for name in backends)
    tokens = (data.x.shape[-1] // CONFIG.patch_size) ** 2
    unit = tolerance.UNIT[data.x.dtype] * CONFIG.depth * (tokens + CONFIG.dim)
    batches = zip(one.batches(), two.batches(), strict=True)
    steps = []
    for n, (batch, same) in zip(range(1, SIDE_BY_SIDE_STEPS + 1), batches, strict=False):
        with torch.backends.cudnn.flags(allow_tf32=False):  # PyTorch lets convolutions use tf32 unless told otherwise
            losses = one.step(batch), two.step(same)
        steps.append({"losses": losses, "difference": abs(losses[0] - losses[1]), "bound": n * unit * losses[0]})
    agree = all(step["difference"] <= step["bound"] for step in steps)
    return {"backends": backends, "dtype": str(data.x.dtype).removeprefix("torch."), "agree": agree, "steps": steps}


def side_by_side_table(result: dict[str, Any]) -> str:
    one, two = result["backends"]
    lines = [
        f"The same first steps of training in two layers, {result['dtype']}: the loss before each step\n",
        f"  step{one:>12}{two:>12}   difference       bound",
    ]
    for n, step in enumerate(result["steps"], 1):
        a, b = step["losses"]
        lines.append(f"  {n:>4}{a:12.6f}{b:12.6f}{step['difference']:13.1e}{step['bound']:12.1e}")
    return "\n".join(lines)


# --- pictures --------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no screen: made without pyplot, it opens no window anywhere."""
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    """Training loss above, held-out accuracy below: two quantities, two axes, one time."""
    epochs = [h["epoch"] for h in history]
    accuracy = [100 * h["test_accuracy"] for h in history]
    required = 100 * REQUIRED_ACCURACY
    figure = new_figure(7, 5.5)
    figure.suptitle(f"A small ViG learns handwritten digits: {accuracy[-1]:.1f} % of the held-out ones read rightly")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.semilogy(epochs, [h["loss"] for h in history], ".-", color=BLUE)
    top.set_ylabel("training loss\n(cross-entropy, nats)")
    bottom.plot(epochs, accuracy, ".-", color=ORANGE)
    bottom.axhline(required, color="0.4", linewidth=1, linestyle="--")
    bottom.annotate(f"required: {required:.0f} %", (epochs[-1], required - 2), ha="right", va="top")
    bottom.set(xlabel="epoch", ylabel="held-out accuracy (%)", ylim=(min(90, *accuracy) - 2, 102))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_answers(data: Digits, answers: Tensor, path: Path, rows: int = 5, columns: int = 10) -> None:
    """Held-out digits under the model's answers: the wrong ones first and marked, then right ones in test order."""
    answers, truth = answers.cpu(), data.y_test.cpu()
    order = (answers == truth).int().argsort(stable=True)
    figure = new_figure(columns, rows * 1.25)
    figure.suptitle(
        f"Held-out digits under the model's answers: {(answers == truth).sum()} of {len(truth)} right; "
        "wrong ones come first, framed",
        fontsize=13,
    )
    for axes, n in zip(figure.subplots(rows, columns).flat, order.tolist(), strict=False):
        right = bool(answers[n] == truth[n])
        axes.imshow(data.x_test[n, 0].numpy(force=True), cmap="gray_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            f"{answers[n]}" if right else f"{answers[n]} (is {truth[n]})",
            color="black" if right else ORANGE, weight="normal" if right else "bold",
        )  # fmt: skip
        axes.spines[:].set(color="0.8" if right else ORANGE, linewidth=1 if right else 4)
    figure.savefig(path)


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs the fused layer compiled")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for what is written (out/demo)")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, help=f"under {EPOCHS}, no accuracy is required")


def run(options: argparse.Namespace) -> int:
    """The whole demo; 1 if a layer disagrees or too few digits are read, else 0."""
    start = time.perf_counter()
    device, out = options.device, options.out
    prepare("vig-ref demo", device)
    if device == "cuda" and agreement.fused_mode(device) == agreement.INTERPRETER:
        raise SystemExit("vig-ref demo: --device cuda compiles the kernels; unset TRITON_INTERPRET")
    make_folders("vig-ref demo", out)
    agreed = agreement.compare_all(device)
    print(agreement.table(agreed), end="\n\n", flush=True)

    data = load(device)
    backend = resolve_backend("auto", device)
    first_steps = side_by_side(data, ("naive", backend))
    print(side_by_side_table(first_steps), end="\n\n", flush=True)

    learner = Learner(data, backend=backend, steps=options.epochs * (len(data.x) // BATCH))
    history = train(learner, options.epochs)

    draw_curve(history, out / "training.png")
    draw_answers(data, learner.answers(), out / "digits.png")
    command = f"vig-ref demo --device {device} --out {out} --epochs {options.epochs}"
    summary = {
        "test_accuracy": learner.accuracy(), "seconds": round(time.perf_counter() - start, 1),
        "test_accuracy_without_global_branch": learner.accuracy_without_global_branch(),
        "agreement": agreed, "first_steps": first_steps, "history": history, "backend": backend,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        **circumstances(command, device, ("scikit-learn", "matplotlib")),
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return report(summary, options)


def report(summary: dict[str, Any], options: argparse.Namespace) -> int:
    """The last lines on the terminal and the exit code: 1 for a promise that was not kept, in words, else 0."""
    print(f"\n{summary['test_accuracy']:.2%} of the held-out digits read rightly", end="")
    print(f" ({summary['test_accuracy_without_global_branch']:.2%} without the global branch)")
    print(f"{summary['seconds']:.0f} s on {summary['device']}")
    print(f"see {options.out / 'summary.json'}, training.png and digits.png beside it")
    failures = []
    if not summary["agreement"]["agree"]:
        failures.append("a layer is further from the float64 oracle than its arithmetic allows; see the table")
    if not summary["first_steps"]["agree"]:
        failures.append("two layers trained alike have losses further apart than rounding explains")
    if options.epochs >= EPOCHS and summary["test_accuracy"] < REQUIRED_ACCURACY:
        failures.append(f"the accuracy is under {REQUIRED_ACCURACY:.0%}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
