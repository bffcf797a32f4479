"""Models on the Hugging Face Hub, by huggingface_hub's mixin. Needs the extra 'hub'.

    HubModel(model).push_to_hub("me/my_vig")
    model = HubModel.from_pretrained("me/my_vig").model
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from vig_ref.model import HierarchicalViG, ViG
from vig_ref.weights import load, save


class HubModel(ModelHubMixin, library_name="vig_ref", paper_url="https://arxiv.org/abs/2405.18425"):
    """A model with `save_pretrained`, `from_pretrained` and `push_to_hub`. The files are those of `vig_ref.weights`.

    `from_pretrained` takes the name of a repository or a folder, and `backend` beside huggingface_hub's arguments.

    Example:
        >>> HubModel(create_model("vig_tiny")).save_pretrained("my_vig")  # doctest: +SKIP
        >>> model = HubModel.from_pretrained("my_vig", backend="naive").model  # doctest: +SKIP
    """

    def __init__(self, model: ViG | HierarchicalViG):
        self.model = model

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, backend: str = "auto", **where: Any) -> "HubModel":
        if os.path.isdir(model_id):
            return cls(load(model_id, backend=backend))
        files = ["config.json", "model.safetensors"]
        return cls(load(snapshot_download(model_id, allow_patterns=files, **where), backend=backend))
