"""Ahead-of-time compilation, without a GPU: every tile, arithmetic and direction, on tensors laid out as a ViG's are.

The interpreter accepts what the compiler refuses (small tiles, types that change in a loop). So each entry of
`vig_ref.fused.launch.TILES`, in every arithmetic, direction and gate dtype, is compiled to machine code here, in a
process where Triton compiles, and its shared memory is held against the smallest limit among those GPUs. On Hopper it
must wait for the kernel ahead of it before it reads anything. For the heads of ViG in bfloat16, loops must fetch all
that they load ahead. The kernels of `vig_ref.parts` are compiled, too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from packaging.version import Version

from vig_ref import parts
from vig_ref.fused.launch import MAX_K, TILES

ROOT = Path(__file__).parent.parent
#: Bytes of shared memory that one program may use on compute capability 8.6 and 8.9; 8.0 and 9.0 have more.
SHARED_MEMORY = 99 * 1024
#: dtype of q, k, v; arithmetic of the products. Gates are float32, or have the dtype of q.
ARITHMETIC = [("fp32", "ieee"), ("fp32", "tf32"), ("fp16", "tf32"), ("bf16", "bf16")]
BOTH, FWD, REV = (True, True), (True, False), (False, True)


class Launch(NamedTuple):
    """One kernel as the launcher may ask for it."""

    kernel: str
    gates: str = "fp32"
    directions: tuple[bool, bool] = BOTH
    sm: int = 90
    segments: bool = False  # T beyond one segment: states enter, and two more kernels run
    halves: bool = False  # T beyond one segment: two programs walk towards each other
    few: bool = False  # programs
    second: bool = True  # the second of two walks
    strided: bool = False  # features apart from each other, and strides beyond 32 bits
    far: bool = False  # offsets beyond 32 bits
    parts: bool = False  # V in several blocks: dq, dk and dg of each in float32
    own: bool = False  # of the kernels for segments: the gradients of the states, not the states


def launches(dtype: str, dot: str) -> list[Launch]:
    """With bfloat16 products all kernels, and each option of a launch by itself; with others, which compile for long,
    the main ones."""
    walks = [dict(second=False), dict(second=True)]
    one = [Launch("forward_kernel"), *(Launch("backward_kernel", **walk) for walk in walks)]
    segment = Launch("segment_kernel", own=True)
    half = [launch._replace(gates=dtype) for launch in one if dtype != "fp32"]
    both = [Launch(name, halves=True, **walk) for name in ("half_kernel", "backward_kernel") for walk in walks]
    ways = [dict(sm=80)]
    if dot == "bf16":
        ways += [dict(directions=FWD, gates=dtype), dict(directions=REV), dict(segments=True), dict(far=True)]
        ways += [dict(strided=True, far=True, gates=dtype)]  # gates of 16 bits: scratch memory for states
        both_there = [way for way in ways if not {"directions", "segments"} & set(way)]
        both += [launch._replace(**way) for launch in both for way in both_there]
        one += [Launch("backward_kernel", parts=True), Launch("segment_kernel"), Launch("combine_kernel")]
        few = [Launch("segment_kernel", own=own, few=True) for own in (False, True)]
        one += [*few, *(few[0]._replace(**way) for way in (*both_there, dict(directions=REV)))]
        early = [Launch("half_kernel", halves=True, few=True, **walk) for walk in walks]
        both += [launch._replace(**way) for launch in early for way in ({}, *both_there)]
    every = [launch._replace(**way) for launch in (*one[:3], segment) for way in ways]
    return [*half, *one, segment, *both, *every]


def where_triton_compiles(name: str, *arguments):
    """What a function of this file returns in a process of its own: here Triton interprets."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, json.dumps([name, *arguments])]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("dtype", "dot"), ARITHMETIC)
@pytest.mark.parametrize("tile", TILES)
def test_every_launch_compiles(tile, dtype, dot):
    wanted = launches(dtype, dot)
    compiled = where_triton_compiles("compile_all", tile, dtype, dot, wanted)
    assert len(compiled) == len(wanted)
    for launch, (shared, tensor_cores, dependent, waiting, fetching, waits) in zip(wanted, compiled, strict=True):
        assert dependent == waiting == (launch.sm >= 90), launch
        assert shared <= SHARED_MEMORY, launch
        assert fetching == 1 or launch.kernel != "combine_kernel", launch
        if dot == "bf16" and tile[0] < MAX_K and launch.kernel != "combine_kernel" and not launch.strided:
            walks = sum(launch.directions) if launch.kernel == "forward_kernel" else 1
            assert fetching == walks, launch
            if Version(triton.__version__) >= Version("3.9"):  # all but this: docs/lab_notebook.md, "Triton"
                waits = [name for name in waits if not name.startswith("%b_dS")]
            assert launch.sm < 90 or not waits, (launch, waits)  # see `gradients_anchored`
        assert tensor_cores == (dot != "ieee" and launch.kernel != "combine_kernel"), launch


@pytest.mark.parametrize("tile", list(TILES)[:2])
def test_bare_walks_compile_to_the_same_loads_and_stores(tile):
    """`vig-ref bench limits` says what the fused layer takes without its arithmetic. The compiler leaves out loads that
    nothing depends on, and fetches ahead only what it thinks worth it."""
    walks = [dict(second=False), dict(second=True)]
    wanted = [Launch("forward_kernel"), *(Launch("backward_kernel", **walk) for walk in walks)]
    both = ("half_kernel", "backward_kernel")
    wanted += [Launch(name, halves=True, few=tile[0] < 32, **walk) for name in both for walk in walks]
    compiled = where_triton_compiles("compile_bare", tile, wanted)
    assert len(compiled) == len(wanted)
    for launch, (own, bare) in zip(wanted, compiled, strict=True):
        assert own
        assert own == bare, launch


def test_the_heads_of_vig_have_tiles_of_their_own():
    assert list(TILES)[:2] == [(16, 32), (32, 64)]


#: The kernels of `parts` and their constants. V is 64 in a plain ViG, 32 in a ViG-H, and 256 at most: twice MAX_K.
PARTS = [
    ("log_gates_kernel", dict(parts.GATES, BR=16, TAU=16.0)),
    ("swiglu_kernel", parts.SWIGLU),
    ("swiglu_backward_kernel", parts.SWIGLU),
    *(("weigh_kernel", dict(parts.WEIGH, BV=BV, SILU=BV == 64)) for BV in (32, 64, 256)),
    *(("weigh_backward_kernel", dict(parts.WEIGH, BV=BV, SILU=BV == 64)) for BV in (32, 64, 256)),
]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])  # the model takes them in no other
def test_every_part_compiles(dtype, sm):
    compiled = where_triton_compiles("compile_parts", dtype, sm)
    assert len(compiled) == len(PARTS)
    for (kernel, _), (shared, tensor_cores) in zip(PARTS, compiled, strict=True):
        assert shared <= SHARED_MEMORY, kernel
        assert tensor_cores == ("weigh" not in kernel), kernel


def compile_parts(dtype, sm):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = []
    for name, options in PARTS:
        kernel, options = getattr(parts, name), dict(options, FAST=True)
        if "weigh" not in name:
            options["DOT"] = {"bf16": parts.tl.bfloat16, "fp16": parts.tl.float16}[dtype]
        compiler = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
        compiler["ptx_options"] = "-O1"
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            number = "i32" if argument in "MDRNV" else "fp32" if argument.startswith("eps") else None
            wide = argument == "g" or (argument.startswith(("w_", "dw")) and "weigh" in name)
            pointer = "*fp32" if wide else f"*{dtype}"
            signature[argument] = "constexpr" if argument in options else number or pointer
            if signature[argument] not in ("constexpr", "fp32") and argument != "M":
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=attributes)
        done = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=compiler)
        compiled.append((done.metadata.shared, "mma" in done.asm["ptx"]))
    return compiled


def compile_all(tile, dtype, dot, wanted):
    from vig_ref.fused import kernels

    compiled = []
    for kind in (Launch(*each) for each in wanted):
        done = compile_one(kernels, tile, dtype, dot, kind)
        ptx, fetching = done.asm["ptx"], fetching_ahead(done.asm["ttgir"])
        compiled.append((done.metadata.shared, "mma" in ptx, done.metadata.launch_pdl, waits_first(ptx), *fetching))
    return compiled


def compile_bare(tile, wanted):
    """What loops of the fused layer's walks read and write, and the same of `bench_bare.py`."""
    from vig_ref import bench_bare
    from vig_ref.fused import kernels

    both = []
    for kind in (Launch(*each) for each in wanted):
        modules = kernels, bench_bare.bare_kernels()
        both.append([memory_of_loops(compile_one(of, tile, "bf16", "bf16", kind).asm["ttgir"]) for of in modules])
    return both


def compile_one(kernels, tile, dtype, dot, kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vig_ref.fused import launch

    kernel = getattr(kernels, kind.kernel)
    backward = kind.kernel == "backward_kernel"
    options = launch.constants(
        tuple(tile), dot, backward=backward, far=kind.far, dependent=kind.sm >= 90
    )
    if kind.kernel == "half_kernel":
        options = launch.half_constants(options, dense=not kind.strided, few=kind.few, second=kind.second)
    if backward:
        options = launch.backward_constants(options, halves=kind.halves, dense=not kind.strided, second=kind.second)
    if kind.kernel == "segment_kernel":
        options = launch.segment_constants(options, kind.own, kind.few)
    if kind.kernel == "combine_kernel":
        options = launch.combine_constants(options, kind.directions[0], kind.own)
    compiler = {key: options.pop(key, None) for key in ("num_warps", "num_stages", "maxnreg", "launch_pdl")}
    signature, constants, attributes = specialise(kernel.arg_names, dtype, kind, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiler = {key: value for key, value in compiler.items() if value is not None}
    compiler["ptx_options"] = "-O1"  # does it compile, and does it fit? Its speed is for a GPU to say
    return triton.compile(source, target=GPUTarget("cuda", kind.sm, 32), options=compiler)


def waits_first(ptx: str) -> bool:
    """Whether the kernel waits for the one ahead, wherever it branches, before it reads or writes any memory but its
    arguments."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    memory = r"(ld(?!\.param)|st|ldu|cp|red|atom|prefetch\w*|multimem|tensormap|call|bra|brx)\b"
    return bool(wait) and not re.search(rf"(?m)^\s*(@!?%\w+\s+)?{memory}", before)


def fetching_ahead(ttgir: str) -> tuple[int, list[str]]:
    """The number of loops that fetch ahead, and the loads that they wait for all the same."""
    loops = loops_ahead(ttgir)
    return len(loops), re.findall(r"(%\S+) = tt\.load", "".join(loops))


def memory_of_loops(ttgir: str) -> list[list[str]]:
    """Of each loop that fetches ahead, in any order: its fetches, waits for them, loads and stores, and their types."""
    operations = r"(?:ttg\.async_(?:copy_global_to_local|wait)|tt\.(?:load|store)) .*"
    return [sorted(map(signature_of, re.findall(operations, loop))) for loop in loops_ahead(ttgir)]


def signature_of(operation: str) -> str:
    """Of a wait how much may still be on its way, of the others the shape and dtype of what they move."""
    what = re.search(r"num = \d+|tensor<[0-9x]+x!tt.ptr<[a-z0-9]+>", operation)
    assert what, operation
    return f"{operation.split()[0]} {what[0]}"


def loops_ahead(ttgir: str) -> list[str]:
    loops = re.finditer(r"^( +)(?:%\S+ = )?scf\.for .*?^\1}", ttgir, re.MULTILINE | re.DOTALL)
    return [loop[0] for loop in loops if "async_copy" in loop[0]]


def specialise(names, dtype, kind, options):
    """The types of a launch as a ViG makes it: features contiguous, everything else and their number aligned to 16."""
    signature, constants, attributes = {}, {name: options[name] for name in names if name in options}, {}
    ends = [end for end, there in zip(("fwd", "rev"), kind.directions, strict=True) if not there]
    absent = {f"{gate}_{end}" for end in ends for gate in ("g", "dg")}
    if not kind.segments and not kind.halves:
        absent |= {"p_S_enter", "p_dS_enter"}
    if (dtype, kind.gates) == ("bf16", "fp32") and not kind.parts:
        absent |= {"p_S", "p_dS"}  # no scratch memory for states: they are kept where the gradients go
    for i, name in enumerate(names):
        if name in options:
            signature[name] = "constexpr"
        elif name in absent:
            signature[name], constants[name] = "constexpr", None
        elif name in ("scale", "H", "T", "K", "V", "SEGMENT", "SEGMENTS"):
            signature[name] = "fp32" if name == "scale" else "i32"
            if name in ("K", "V") and not kind.strided:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name == "p_exact":
            signature[name] = "*i32"
        elif name.startswith("p_"):
            rounded = options.get("DOT") == "bf16" and name in ("p_S", "p_dS")
            signature[name], attributes[(i,)] = "*bf16" if rounded else "*fp32", [["tt.divisibility", 16]]
        else:
            pointer = kind.gates if name.startswith(("g_", "dg_")) else dtype
            pointer = "fp32" if kind.parts and name in ("dq", "dk", "dg_fwd", "dg_rev") else pointer
            pointer = "fp32" if (name, dtype) == ("share", "fp16") else pointer
            if kind.strided:
                signature[name] = (f"*{pointer}", "i64", "i64", "i64", "i64")
            else:
                signature[name] = (f"*{pointer}", "i32", "i32", "i32", "constexpr")
                constants[(i, 4)] = 1
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(4)}
    return signature, constants, attributes


if __name__ == "__main__":
    name, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[name](*arguments)))
