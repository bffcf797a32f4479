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
from safetensors.torch import load_file, save_file
from torch import Tensor

from vig_ref.model import HierarchicalConfig, HierarchicalViG, ViG, ViGConfig, build

FAMILIES = {"ViG": ViGConfig, "HierarchicalViG": HierarchicalConfig}


def save(model: ViG | HierarchicalViG, folder: str | os.PathLike) -> None:
    """Write a model's weights and sizes; its backend is no part of it.

    Raises:
        ValueError: a model that `load` could not make: of another class, or with exchanged parts.
    """
    options = {"family": type(model).__name__, **model.options()}
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    check(weights, empty(options, "model"), "model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: str | os.PathLike, *, backend: str = "auto") -> ViG | HierarchicalViG:
    """The model that `save` wrote, on the CPU, in eval mode and in the dtype that it had.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another family, or weights that do not fit the sizes.
    """
    config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    model = empty(json.loads(config.read_text()), str(config))
    state = load_file(weights)
    check(state, model, str(weights))
    model.load_state_dict(state, assign=True)
    model.backend = backend
    return model.eval()


def empty(options: Mapping[str, Any], source: str) -> ViG | HierarchicalViG:
    """The model of these options, without storage. JSON has lists where a configuration has tuples."""

    def frozen(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}

    others = frozen(options)
    family, config = others.pop("family", None), others.pop("config", None)
    if family not in FAMILIES or config is None:
        raise ValueError(f"{source}: expected a family among {tuple(FAMILIES)} and its config, got {family!r}")
    with torch.device("meta"):
        return build(FAMILIES[family](**frozen(config)), **others)


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
