"""Compile every kernel without a GPU and read registers, spills and instructions out of the result.

``compile_all(targets)`` returns one record per kernel and target. Needs Triton, whose wheel holds ptxas and cuobjdump.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Compiled:
    """Figures of one kernel on one target; counts are of instructions in the machine code.

    ``narrow_offsets`` counts accesses to large tensors (bfloat16 here) whose offset is a product or sum of 32 bits.
    """

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_offsets: int


def _cases() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """name -> (function, pointer types, constants, warps)."""
    from .categorical import cut
    from .categorical import triton as cat
    from .guided_step import triton as guided
    from .linear_step import triton as linear
    from .resample_gather import triton as gather

    b = "*bf16"
    state = {"coef": "*fp64", "step": "*i64", "n": "i32", "chunks": "i32", "part": "*fp32"}
    guide = {k: b for k in ("c_ptr", "u_ptr", "x_ptr", "m_ptr")} | state
    more = {k: b for k in ("h1_ptr", "h2_ptr", "h3_ptr", "y_ptr", "x0_ptr", "buffer_ptr", "second_ptr")}
    logits = {"c_ptr": b, "u_ptr": b, "rows_ptr": "*i64", "params": "*fp64", "cut_ptr": "*i64",
              "max_ptr": "*fp32", "sum_ptr": "*fp32",
              "key_ptr": "*fp32", "index_ptr": "*i32", "seed_ptr": "*i64", "keys_ptr": "*i64", "step_ptr": "*i64",
              "token_ptr": "*i64", "logprob_ptr": "*fp32", "lse_ptr": "*fp32", "tiles": "i32"}  # fmt: skip
    row = {"V": 131072, "MASK_ID": -1, "ROWS": False, "CUT": 0}
    limit = {"V": 131072, "MASK_ID": -1, "ROWS": False, "TOP_K": True, "TOP_P": True, "BLOCK": 2048}
    bank = {f"h{k}": b for k in range(6)} | {f"y{k}": b for k in range(6)}
    flat = bank | {"table": "*fp64", "step": "*i64", "n": "i32", "ancestors": "*i64"}
    apply = {"BLOCK": 1024, "CHUNKS": 64, "INTERPRET": False}
    return {
        "linear_step K=5 M=2": (linear.linear_step_kernel, flat, {"K": 5, "M": 2, "BLOCK": 1024, "INTERPRET": False}, 4),  # noqa: E501
        "resample_gather K=3": (gather.resample_gather_kernel, flat, {"K": 3, "BLOCK": 1024}, 4),
        "guide_reduce": (guided.guide_reduce_kernel, guide, {"MOMENTUM": False, "BLOCK": 1024, "ITER": 4}, 4),
        "guide_reduce momentum": (guided.guide_reduce_kernel, guide, {"MOMENTUM": True, "BLOCK": 1024, "ITER": 4}, 4),
        "guide_apply cfg 2M": (guided.guide_apply_kernel, guide | more,
                               apply | {"KIND": 0, "MOMENTUM": False, "HISTORY": 1, "SECOND": False}, 4),
        "guide_apply apg UniPC-2": (guided.guide_apply_kernel, guide | more,
                                    apply | {"KIND": 2, "MOMENTUM": True, "HISTORY": 3, "SECOND": True}, 4),
        "cat_tile": (cat.cat_tile_kernel, logits, row | {"CFG": False, "BLOCK": 4096}, 4),
        "cat_tile cfg": (cat.cat_tile_kernel, logits, row | {"CFG": True, "BLOCK": 4096}, 4),
        "cat_tile cut": (cat.cat_tile_kernel, logits, row | {"CFG": False, "CUT": 17, "BLOCK": 4096}, 4),
        "cat_cut": (cut.cut_kernel, logits, limit | {"CFG": False, "DROP": 16}, 4),
        "cat_cut cfg": (cut.cut_kernel, logits, limit | {"CFG": True, "DROP": 0}, 4),
        "cat_pick": (cat.cat_pick_kernel, logits, row | {"CFG": False, "BLOCK": 4096, "TILES": 32}, 8),
        "cat_race": (cat.cat_race_kernel, logits, row | {"CFG": False, "BLOCK": 2048}, 4),
        "cat_race_final": (cat.cat_race_final_kernel, logits, {"V": 131072, "CFG": False, "ROWS": False, "TILES": 64}, 4),  # noqa: E501
    }  # fmt: skip


def _tool(name: str) -> str:
    import triton

    return str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name)


def _read_cuda(cubin: bytes) -> tuple[int, int, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(
            [_tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
    text = usage.stdout + usage.stderr
    registers = int(re.findall(r"REG:(\d+)", text)[-1])
    local = sum(int(v) for v in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    return registers, local, sass


def compile_one(name: str, target: str) -> Compiled:
    """Compile kernel ``name`` of the list for ``target`` (``sm_NN`` or ``gfx942``)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, types, constants, warps = _cases()[name]
    names = function.arg_names
    signature = {k: "constexpr" if k in constants else types[k] for k in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if k == "n" or signature[k][0] == "*"}
    source = ASTSource(
        function, signature, constexprs={k: constants[k] for k in names if k in constants}, attrs=aligned
    )
    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)
    kernel = triton.compile(source, target=gpu, options={"num_warps": warps})
    shared = kernel.metadata.shared
    narrow = len(re.findall(r"tt\.addptr .*tensor<\d+x!tt\.ptr<bf16>>, tensor<\d+xi32>", kernel.asm["ttir"]))
    if hip:
        text = kernel.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        spilled = sum(int(v) for v in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
        lines = re.findall(r"^\t[a-z]\w+", text, re.M)
        loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
        stores = len(re.findall(r"(?:global|buffer)_store_dwordx4", text))
        return Compiled(name, target, registers, spilled, shared, len(lines), loads, stores, narrow)
    registers, local, text = _read_cuda(kernel.asm["cubin"])
    spilled = local + len(re.findall(r"\b(?:LDL|STL)\b", text))
    return Compiled(
        name, target, registers, spilled, shared, len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+\S", text, re.M)),
        len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", text)), len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128", text)),
        narrow,
    )  # fmt: skip


def compile_all(targets: Iterable[str] = TARGETS, names: Sequence[str] | None = None) -> list[Compiled]:
    """Every kernel (or those of ``names``) for every target."""
    targets = tuple(targets)
    return [compile_one(name, target) for name in (names or _cases()) for target in targets]


def main() -> None:
    """Print the table as Markdown."""
    import triton

    print(f"# Kernels compiled ahead of time (Triton {triton.__version__}, bfloat16 tensors)\n")
    print("No GPU was used. Spilled is bytes of stack and local memory plus spill instructions; wide accesses are 128")
    print(
        "bits; narrow offsets are those of 32 bits into bfloat16 tensors (within a row of logits 32 bits are enough).\n"
    )
    print(
        "| kernel | target | registers | spilled | shared bytes | instructions | wide loads | wide stores | "
        "narrow offsets |"
    )
    print("|" + " --- |" * 9)
    for c in compile_all():
        print(f"| {c.kernel} | {c.target} | {c.registers} | {c.spilled} | {c.shared} | {c.instructions} | {c.wide_loads} "  # noqa: E501
              f"| {c.wide_stores} | {c.narrow_offsets} |")  # fmt: skip
    print("\nFrom `python -m diffsamp_kernels.ahead_of_time`.")


if __name__ == "__main__":
    main()
