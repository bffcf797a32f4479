"""vig_ref: ViG (arXiv 2405.18425) and bidirectional gated linear attention in three layers that agree."""

from vig_ref.model import PRESETS, HierarchicalConfig, HierarchicalViG, ViG, ViGConfig, create_model, wake
from vig_ref.ops import BACKENDS, bidirectional_gla, gla, resolve_backend
from vig_ref.released import load_released

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "PRESETS",
    "HierarchicalConfig",
    "HierarchicalViG",
    "ViG",
    "ViGConfig",
    "bidirectional_gla",
    "create_model",
    "gla",
    "load_released",
    "resolve_backend",
    "wake",
]
