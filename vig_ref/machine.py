"""The machine that a command runs on: is the device there, and what does somebody need to repeat the run?"""

import datetime
import gc
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch


def prepare(command: str, device: str) -> None:
    """Refuse a device that is not there; take one CPU thread.

    Tensors as small as the commands' are computed faster than threads can meet: a second one gains little, and with
    another program on the machine it loses much. One thread also adds up in one order, whatever the number of cores.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit(f"{command}: --device cuda needs an NVIDIA GPU and a CUDA build of torch; leave it out")


def import_timm() -> tuple[Any, str]:
    """timm, or None with the reason and what to do: it is absent, or its torchvision does not fit the torch."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        if getattr(error, "name", None) == "timm":
            reason += "; install the extra 'timm': pip install 'vig_ref[timm]'"
        elif "torchvision" in reason:
            reason += "; install the torchvision that matches your torch build"
        return None, reason
    return timm, ""


def mebibytes(function: Callable[[], Any], device: str) -> float | None:
    """Peak of what a call asks for beyond what is there, its results included; None on a CPU, where nobody counts.

    What the allocator hands out may be more, by what calls before this one left over.
    """
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / 2**20, 2)


def circumstances(command: str, device: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine, date, command and versions, also of `packages`; 'missing' is not installed."""
    versions = {"python": platform.python_version()}
    for name in ("vig_ref", "torch", "triton", "numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions,
    }
