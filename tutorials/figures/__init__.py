"""Figures of the tutorials, one module a chapter: functions that return a matplotlib figure.

The arithmetic that a chapter teaches stays in its cells; here is only the drawing.
"""

import base64
import io

from matplotlib import figure, rcParams

FWD, REV, BOTH, INK, MUTED = "#1f6fb4", "#c8501e", "#6a3d9a", "#222222", "#8a8a8a"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
rcParams.update(STYLE)
LARGEST_PNG = 100_000  # bytes; larger ones hold photographs, which JPEG keeps smaller


class Figure(figure.Figure):
    """A figure that a notebook shows when it is a cell's last value, whatever the backend."""

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        png = self.encoded("png", metadata={"Software": None})  # the same bytes from the same numbers
        if len(png) <= LARGEST_PNG:
            return {"image/png": base64.b64encode(png).decode(), "text/plain": repr(self)}
        jpeg = self.encoded("jpeg", pil_kwargs={"quality": 88})  # photographs
        return {"image/jpeg": base64.b64encode(jpeg).decode(), "text/plain": repr(self)}

    def encoded(self, kind: str, **options) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format=kind, **options)
        return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches; without pyplot, which would show it a second time."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")
