"""vig_ref: ViG (arXiv 2405.18425) and bidirectional gated linear attention in three layers that agree."""

from vig_ref.model import PRESETS, ViG, ViGConfig, create_model
from vig_ref.ops import BACKENDS, bidirectional_gla, gla, resolve_backend
from vig_ref.released import load_released

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "PRESETS",
    "ViG",
    "ViGConfig",
    "bidirectional_gla",
    "create_model",
    "gla",
    "load_released",
    "resolve_backend",
]
