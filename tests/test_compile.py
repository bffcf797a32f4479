"""Ahead-of-time compilation, without a GPU: every tile, arithmetic and direction, on tensors laid out as a ViG's are.

The interpreter accepts what the compiler refuses (small tiles, types that change in a loop). So each entry of
`vig_ref.fused.launch.TILES`, in every arithmetic, direction and gate dtype, is compiled to machine code here, in a
process where Triton compiles, and its shared memory is held against the smallest limit among those GPUs.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vig_ref.fused.launch import TILES

ROOT = Path(__file__).parent.parent
#: Bytes of shared memory that one program may use on compute capability 8.6 and 8.9; 8.0 and 9.0 have more.
SHARED_MEMORY = 99 * 1024
#: dtype of q, k, v; dtype of the gates; arithmetic of the products.
ARITHMETIC = [
    ("fp32", "fp32", "ieee"), ("fp32", "fp32", "tf32"), ("fp16", "fp32", "tf32"), ("fp16", "fp16", "tf32"),
    ("bf16", "fp32", "bf16"), ("bf16", "bf16", "bf16"),
]  # fmt: skip
DIRECTIONS = [(True, True), (True, False), (False, True)]


def targets(gates: str, directions: tuple[bool, bool]) -> list[int]:
    """Everything for Hopper, and what a ViG launches for Ampere too."""
    return [80, 90] if gates == "fp32" and directions == (True, True) else [90]


@pytest.mark.parametrize(("dtype", "gates", "dot"), ARITHMETIC)
@pytest.mark.parametrize("tile", TILES)
def test_every_launch_compiles(tile, dtype, gates, dot):
    kinds = list(itertools.product(("forward_kernel", "backward_kernel"), DIRECTIONS))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(ROOT)
    arguments = json.dumps([tile, dtype, gates, dot, [(k, d, t) for k, d in kinds for t in targets(gates, d)]])
    command = [sys.executable, __file__, arguments]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert len(compiled) == sum(len(targets(gates, d)) for _, d in kinds)
    for kernel in compiled:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["tensor cores"] == (dot != "ieee"), kernel


def test_the_heads_of_vig_have_tiles_of_their_own():
    assert list(TILES)[:2] == [(16, 32), (32, 64)]


def compile_all(tile, dtype, gates, dot, kinds):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vig_ref.fused import kernels, launch

    compiled = []
    for name, directions, target in kinds:
        kernel = getattr(kernels, name)
        options = launch.constants(tuple(tile), dot, *directions)
        launch_options = {key: options.pop(key) for key in ("num_warps", "num_stages")}
        signature, constants, attributes = specialise(kernel.arg_names, dtype, gates, directions, options)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        done = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch_options)
        shared, mma = done.metadata.shared, "mma" in done.asm["ptx"]
        compiled.append({"kernel": name, "directions": directions, "sm": target, "shared": shared, "tensor cores": mma})
    return compiled


def specialise(names, dtype, gates, directions, options):
    """The types of a launch as a ViG makes it: features contiguous, everything else aligned to 16."""
    signature, constants, attributes = {}, dict(options), {}
    absent = {name for name, there in zip(("fwd", "rev"), directions, strict=True) if not there}
    for i, name in enumerate(names):
        if name in options:
            signature[name] = "constexpr"
        elif name.startswith(("g_", "dg_")) and name[-3:] in absent:
            signature[name], constants[name] = "constexpr", None
        elif name in ("scale", "H", "T", "K", "V"):
            signature[name] = "fp32" if name == "scale" else "i32"
        elif name.startswith("p_"):
            signature[name], attributes[(i,)] = "*fp32", [["tt.divisibility", 16]]
        else:
            pointer = gates if name.startswith(("g_", "dg_")) else dtype
            signature[name] = (f"*{pointer}", "i32", "i32", "i32", "constexpr")
            constants[(i, 4)] = 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(4)}
    return signature, constants, attributes


if __name__ == "__main__":
    print(json.dumps(compile_all(*json.loads(sys.argv[1]))))
