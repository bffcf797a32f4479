"""Step-through animations: pages of their own, with numbers that the library computed and nothing to fetch.

    python tutorials/build.py --animations

`player.html` has the buttons, the keys and the styles; `scan.js` and `chunk.js` draw one step each.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from figures import ch01, ch02

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "docs" / "animations"

#: Each page: its title, what it shows, and the function that computes its numbers.
PAGES: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "scan": (
        "Two scans over an image",
        "196 patches of a photograph, row by row. The forward scan has read every patch up to the framed one, the "
        "reverse scan every patch from it on; each fades what it holds by its gate. Faded to the background means "
        "forgotten.",
        ch01.scan_data,
    ),
    "chunk": (
        "A chunk and its state",
        "24 tokens, three chunks of 8. Row i, column j of the matrix is what token i takes of token j. The four steps "
        "of the chunked layer fill it: pairs inside a chunk by halving, pairs across chunks through a state of 4 × 4 "
        "numbers.",
        ch02.chunk_data,
    ),
}


def page(name: str) -> str:
    """The page as text."""
    title, lead, compute = PAGES[name]
    text = (HERE / "player.html").read_text()
    data = json.dumps({key: plain(value) for key, value in compute().items()}, separators=(",", ":"))
    script = (HERE / f"{name}.js").read_text()
    for mark, content in {"title": title, "lead": lead, "script": script, "data": data}.items():
        text = text.replace(f"{{{{{mark}}}}}", content)
    return text


def plain(value: Any) -> Any:
    """Tensors for JSON: bytes as base64, floats with four digits behind the point."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return base64.b64encode(value.numpy().astype(np.uint8).tobytes()).decode()
    if isinstance(value, Tensor):
        return np.round(value.double().numpy(), 4).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.html").write_text(page(name))
