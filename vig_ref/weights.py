"""A model to and from a folder: `model.safetensors` holds its weights, `config.json` its family and sizes.

    save(model, "my_vig")
    model = load("my_vig", backend="naive")
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vig_ref.model import HierarchicalConfig, HierarchicalViG, ViG, ViGConfig, build

FAMILIES = {"ViG": ViGConfig, "HierarchicalViG": HierarchicalConfig}
#: Attributes of modules that say how a model runs, not what it computes; they are not stored.
HOW_IT_RUNS = ("training", "backend", "grad_checkpointing")


def save(model: ViG | HierarchicalViG, folder: str | os.PathLike) -> None:
    """Write a model's weights, sizes and pooling; its backend is no part of it.

    Raises:
        ValueError: a model that `load` could not make: of another class, with exchanged parts, or with another setting
            of a part, such as the eps of `load_released(..., released_inference=True)`.
    """
    options = {"family": type(model).__name__, **model.options(), "global_pool": model.global_pool}
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    loaded = empty(options, "model")
    check(weights, loaded, "model")
    check_settings(model, loaded)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: str | os.PathLike, *, backend: str = "auto") -> ViG | HierarchicalViG:
    """The model that `save` wrote, on the CPU, in eval mode and in the dtype that it had.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file in place of the folder, a file that `save` did not write or that is damaged, another family,
            or weights that do not fit the sizes.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder}: expected a folder with config.json and model.safetensors, got a file")
    config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    try:
        options = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config}: expected JSON as `save` writes it, got what is none ({error})") from error
    model = empty(options, str(config))
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: expected a safetensors file, got a damaged one or another ({error})") from error
    check(state, model, str(weights))
    model.load_state_dict(state, assign=True)
    model.backend = backend
    return model.eval()


def empty(options: Any, source: str) -> ViG | HierarchicalViG:
    """The model of these options, without storage. JSON has lists where a configuration has tuples."""

    def frozen(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}

    if not isinstance(options, Mapping):
        raise ValueError(f"{source}: expected an object as `save` writes it, got {type(options).__name__}")
    others = frozen(options)
    family, config, pool = others.pop("family", None), others.pop("config", None), others.pop("global_pool", "avg")
    if family not in tuple(FAMILIES) or not isinstance(config, Mapping):
        raise ValueError(f"{source}: expected a family among {tuple(FAMILIES)} and its config, got {family!r}")
    try:
        with torch.device("meta"):
            model = build(FAMILIES[family](**frozen(config)), backend="auto", **others)
            model.reset_classifier(model.num_classes, pool)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: expected the options of a {family} as `save` writes them; {error}") from error
    return model


def check(weights: Mapping[str, Tensor], model: ViG | HierarchicalViG, source: str) -> None:
    """Refuse weights that are not those of the model."""
    expected = {name: x.shape for name, x in model.state_dict().items()}
    shapes = {name: x.shape for name, x in weights.items()}
    problems = sorted(name for name in expected.keys() | shapes if expected.get(name) != shapes.get(name))
    if problems:
        raise ValueError(
            f"{source}: expected the parameters of a {type(model).__name__} of this config; "
            f"missing, unknown or misshapen: {', '.join(problems)}"
        )


def check_settings(model: nn.Module, loaded: nn.Module) -> None:
    """Refuse a model with other parts, or other attributes of its parts, than the one that `load` would make."""
    ours, theirs = dict(model.named_modules()), dict(loaded.named_modules())
    problems = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
    for name in ours.keys() & theirs:
        if type(ours[name]) is not type(theirs[name]):
            problems.append(f"{name} ({type(ours[name]).__name__} for {type(theirs[name]).__name__})")
        elif name:  # what the model itself was made with is in its options
            own = vars(ours[name])
            problems += [
                f"{name}.{key} ({own.get(key)} for {value})" for key, value in vars(theirs[name]).items()
                if not key.startswith("_") and key not in HOW_IT_RUNS and own.get(key) != value
            ]
    if problems:
        raise ValueError(
            f"model: expected the parts of a {type(model).__name__} of this config as they are made, got others, which "
            f"`load` would lose: {', '.join(sorted(problems))}; store its state_dict() and change the model again"
        )
