"""Compile Triton kernels for an H100/H200 (sm_90) without a GPU and read what the machine code says.

Registers and spills come from the cubin by way of the ``cuobjdump`` and ``nvdisasm`` that Triton brings along. Run as a
script, ``python hopper.py``, it prints one JSON object: kernel case -> facts. Tests run it that way, in a process of its own,
because a process in which ``TRITON_INTERPRET`` was set when the kernels were decorated cannot compile them.
"""
from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def compile_for_hopper(kernel, arguments: dict[str, str], constants: dict[str, object], num_warps: int = 4) -> dict[str, int]:
    """Facts about ``kernel`` compiled for sm_90.

    ``arguments``: Triton type of each run-time argument ("*i64", "i32"); pointers are taken as 16-byte aligned, as torch
    allocates them. ``constants``: values of the constexpr arguments. Returns registers, spills (instructions that touch local
    memory), loads of 16 bytes, all loads and stores of global memory, atomics and shared memory in bytes.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else arguments[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind.startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        opcodes = Counter(OPCODE.findall(_run("nvdisasm", "-c", file.name)))

    def count(*prefixes: str, holding: str = "") -> int:
        return sum(n for op, n in opcodes.items() if op.startswith(prefixes) and holding in op)

    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return {
        "registers": int(registers[1]),
        "spills": count("LDL", "STL"),
        "loads_128": count("LDG", holding=".128"),
        "loads": count("LDG"),
        "stores_128": count("STG", holding=".128"),
        "stores": count("STG"),
        "atomics": count("RED", "ATOM"),
        "shared": compiled.metadata.shared,
        "instructions": opcodes.total(),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _forward_cases():
    from tablewright.kernels.embedding.triton_common import tile_rows
    from tablewright.kernels.embedding.triton_forward import forward_kernel

    for dtype, size in ((tl.float32, 4), (tl.float16, 2), (tl.bfloat16, 2)):
        for dim in (64, 128):
            for unroll in (1, 2):
                for weight in (None, dtype):
                    kinds = ((tile_rows(dim), dim, 16 // size, 16 // size, unroll),)
                    constants = {
                        "COUNT": 26, "N_LOOKUPS": 26, "KINDS": kinds, "TABLE_T": dtype, "ID_T": tl.int64, "OFFSET_T": tl.int64,
                        "WEIGHT_T": weight,
                    }  # fmt: skip
                    name = f"forward {dtype} D{dim} {'bags' if unroll > 1 else 'plain'}{' weighted' if weight else ''}"
                    yield name, forward_kernel, {"entries": "*i64", "found": "*i32"}, constants


def main() -> None:
    cases = [*_forward_cases()]
    print(json.dumps({name: compile_for_hopper(kernel, *rest) for name, kernel, *rest in cases}, indent=1))


if __name__ == "__main__":
    main()
