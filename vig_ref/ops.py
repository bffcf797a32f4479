"""The operator: its contract, the checks of that contract, and the choice of a layer.

A call goes `model -> ops -> naive | chunked | fused`. Wrong shapes, dtypes, devices and options are refused here, in
Python, before any arithmetic; the three layers below trust what they are given.
"""

import math

import torch
from torch import Tensor

BACKENDS = ("auto", "naive", "chunked", "fused")


def bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Bidirectional gated linear attention: the mean of two scans over the same q, k, v.

        S_fwd[t] = exp(g_fwd[t]) * S_fwd[t-1] + k[t]^T v[t]        S_fwd[-1] = 0
        S_rev[t] = exp(g_rev[t]) * S_rev[t+1] + k[t]^T v[t]        S_rev[T]  = 0
        o[t]     = scale/2 * (q[t] S_fwd[t] + q[t] S_rev[t])

    The gate multiplies the K rows of the state. Both scans meet token t at time t, so a token sees itself
    with weight 1 and every other token with weight 1/2.

    Args:
        q, k: `[B, H, T, K]` queries and keys, any strides; float64, float32, float16 or bfloat16.
        v: `[B, H, T, V]` values, the dtype of q.
        g_fwd, g_rev: `[B, H, T, K]` log forget gates (natural logarithm), from -inf (a full reset) to 0 (keep all);
            float32 or the dtype of q. Positive gates are outside the contract: they are not looked for (that would
            stop a GPU), and the recurrence above is computed as long as it does not overflow.
        scale: a finite number; `None` means `K ** -0.5`, as in the released code.
        backend: one of `BACKENDS`; see `resolve_backend`. "fused" takes K up to 128, and float64 only in Triton's
            interpreter.

    Returns:
        o: `[B, H, T, V]`, the dtype of v.

    Raises:
        TypeError: an argument is not a tensor, or not of a dtype listed above.
        ValueError: shapes, dtypes or devices that do not fit together, an unknown or unavailable backend.

    Source: ViG, section 4.2.1, Eq. 6.

    Example:
        >>> q, k, g_fwd, g_rev = torch.randn(4, 2, 3, 196, 32).unbind()
        >>> v = torch.randn(2, 3, 196, 64)
        >>> bidirectional_gla(q, k, v, -g_fwd.abs(), -g_rev.abs()).shape
        torch.Size([2, 3, 196, 64])
    """
    scale = _check(q, k, v, {"g_fwd": g_fwd, "g_rev": g_rev}, scale)
    layer = load_backend(backend, q.device)
    # The precision is that of the tensors given. (There is no autocast for the meta device.)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        return layer.bidirectional_gla(q, k, v, g_fwd, g_rev, scale=scale)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool = False, scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Gated linear attention in one direction: from the first token, or from the last if `reverse`.

        S[t] = exp(g[t]) * S[t-1] + k[t]^T v[t]        o[t] = scale * q[t] S[t]

    Arguments, result and errors are those of `bidirectional_gla`, with one gate `g: [B, H, T, K]`.

    Source: ViG, section 3, Eq. 5.

    Example:
        >>> q, k, g = torch.randn(3, 2, 3, 196, 32).unbind()
        >>> gla(q, k, torch.randn(2, 3, 196, 64), -g.abs(), reverse=True).shape
        torch.Size([2, 3, 196, 64])
    """
    scale = _check(q, k, v, {"g": g}, scale)
    layer = load_backend(backend, q.device)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        return layer.gla(q, k, v, g, reverse=reverse, scale=scale)


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Name the layer that `backend` stands for on `device`: `auto` is `fused` on NVIDIA GPUs and `chunked` elsewhere.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.

    Example:
        >>> resolve_backend("auto", "cpu")
        'chunked'
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {BACKENDS}")
    if backend == "auto":
        return "fused" if torch.device(device).type == "cuda" and not torch.version.hip else "chunked"
    return backend


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch multiplies matrices of x here: autocast's, where it is on; it leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def load_backend(backend: str, device: torch.device):
    """Import a layer when it is used, so that `import vig_ref` needs neither Triton nor a GPU.

    On the meta device, where there are shapes and no numbers, every layer is `vig_ref.shapes`.
    Spelled out, because torch.compile follows import statements and nothing cleverer.
    """
    backend = resolve_backend(backend, device)
    if device.type == "meta":
        from vig_ref import shapes as layer
    elif backend == "naive":
        from vig_ref import naive as layer
    elif backend == "chunked":
        from vig_ref import chunked as layer
    else:
        from vig_ref import fused as layer
    return layer


def _check(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], scale: float | None) -> float:
    """The contract, checked in one place; returns the scale as a number."""
    tensors = {"q": q, "k": k, "v": v, **gates}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}; convert it first")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; convert it with .to_dense()")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, H, T, {'V' if x is v else 'K'}], got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}; move one of them")
    for name, x in {"k": k, **gates}.items():
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q [B, H, T, K] = {list(q.shape)}, got {list(x.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: expected [B, H, T] = {list(q.shape[:3])} as in q, then V; got {list(v.shape)}")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"expected K and V of at least 1, got K={q.shape[3]} and V={v.shape[3]}")
    for name, x in {"k": k, "v": v}.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}; convert one of them")
    for name, x in gates.items():
        if x.dtype not in (torch.float32, q.dtype) or (q.dtype == torch.float64) != (x.dtype == torch.float64):
            allowed = torch.float64 if q.dtype == torch.float64 else f"torch.float32 or the dtype of q, {q.dtype}"
            raise ValueError(f"{name}: expected {allowed}, got {x.dtype}; convert it with .to()")
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a number or None, got a Tensor; multiply q by it instead")
    if isinstance(scale, (str, complex)):
        raise TypeError(f"scale: expected a real number or None (K ** -0.5), got {scale!r}")
    if scale is None:
        return q.shape[3] ** -0.5
    if not -math.inf < scale < math.inf:  # torch.compile knows no math.isfinite
        raise ValueError(f"scale: expected a finite number or None (K ** -0.5), got {scale}")
    return float(scale)
