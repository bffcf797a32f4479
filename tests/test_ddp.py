"""The fused layer under DistributedDataParallel: two processes with half a batch each.

They share one GPU if there is one; where there are two, each has its own, and NCCL adds up the gradients.

Six tokens, one segment: what is asked here is whether DDP finds the gradients, not whether they are right.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cases import FUSED_DEVICE
from vig_ref import ViG, ViGConfig

ROOT = Path(__file__).parent.parent
PROCESSES = 2
GPU_EACH = torch.cuda.device_count() >= PROCESSES
PATIENCE = datetime.timedelta(seconds=120)


def model_and_images() -> tuple[ViG, Tensor]:
    """The same in every process: 2 x 3 patches."""
    torch.manual_seed(0)
    model = ViG(ViGConfig(dim=32, num_heads=2, depth=2), backend="fused", num_classes=3, img_size=32)
    return model.to(FUSED_DEVICE), torch.randn(2 * PROCESSES, 3, 32, 48).to(FUSED_DEVICE)


def gradients(model: torch.nn.Module, images: Tensor) -> list[Tensor]:
    model(images).square().mean().backward()
    return [p.grad for p in model.parameters()]


def one_process(rank: int, folder: Path) -> None:
    if GPU_EACH:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if GPU_EACH else "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES,
        timeout=PATIENCE,
    )  # fmt: skip
    model, images = model_and_images()
    torch.save(gradients(DistributedDataParallel(model), images.chunk(PROCESSES)[rank]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_every_process_has_the_gradients_of_the_whole_batch(tmp_path):
    """A mean over two halves, in float32: rounded in another order, after some hundred operations."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, __file__, str(rank), tmp_path] for rank in range(PROCESSES)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait() for process in processes] == [0] * PROCESSES  # one that is left alone loses its patience
    expected = gradients(*model_and_images())
    got = [torch.load(tmp_path / f"{rank}.pt", map_location=FUSED_DEVICE) for rank in range(PROCESSES)]
    for p, *of_processes in zip(expected, *got, strict=True):
        assert torch.equal(*of_processes)
        assert (of_processes[0] - p).norm() <= 1e-5 * p.norm()


if __name__ == "__main__":
    one_process(int(sys.argv[1]), Path(sys.argv[2]))
