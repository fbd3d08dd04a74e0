"""Compile Triton kernels for an H100/H200 (sm_90) without a GPU and read what the machine code says.

Registers and spills come from the cubin by way of the ``cuobjdump`` and ``nvdisasm`` that Triton brings along. Run as a
script, ``python hopper.py``, it prints one JSON object: kernel case -> facts. Tests run it that way, in a process of its own,
because a process in which ``TRITON_INTERPRET`` was set when the kernels were decorated cannot compile them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def compile_for_hopper(
    kernel, arguments: dict[str, str], constants: dict[str, object], num_warps: int = 4, num_stages: int = 3, sm: int = 90,
    maxnreg: int | None = None,
) -> dict[str, int]:
    """Facts about ``kernel`` compiled for sm_90, or another ``sm``, with at most ``maxnreg`` registers.

    ``arguments``: Triton type of each run-time argument ("*i64", "i32"); pointers are taken as 16-byte aligned, as torch
    allocates them, and a pitch as a multiple of 16; "i32:16" is a number that is one too, and "1" one that is 1. ``constants``: values of
    the constexpr arguments. Returns registers, spills (instructions that touch local memory), loads of 16 bytes (asynchronous
    copies among them), all loads and stores of global memory, atomics, tensor core products and shared memory in bytes.
    """
    names = kernel.arg_names
    constants = constants | {name: 1 for name, kind in arguments.items() if kind == "1"}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else arguments[name].removesuffix(":16") for name in names},
        constexprs=constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in arguments.items()
            if kind.startswith("*") or kind.endswith(":16") or name == "pitch"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg})
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
        "loads_128": count("LDG", holding="128"),
        "loads": count("LDG"),
        "stores_128": count("STG", holding=".128"),
        "stores": count("STG"),
        "hgmma": count("HGMMA"),
        "hmma": count("HMMA"),
        "atomics": count("REDG", "RED.", "ATOM"),
        "shared": compiled.metadata.shared,
        "instructions": opcodes.total(),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
LOOKUP_TYPES = {"ID_T": tl.int64, "OFFSET_T": tl.int64}


def embedding_cases():
    """(name, kernel, arguments, constants, warps, stages, sm, registers) of the embedding kernels, with what ``gpu.py`` would choose."""
    from tablewright.kernels.embedding import triton_backward, triton_forward, triton_keys
    from tablewright.kernels.embedding.gpu_launch import most_registers
    from tablewright.kernels.embedding.triton_common import tile_rows

    index = {name: "*i32" for name in ("keys", "before", "starts", "ranks", "counts", "seen_at")} | {
        "total_chunks": "i32",
        "total": "i32",
        "pitch": "i32",
    }
    index |= {name: "*i64" for name in ("entries", "order", "sources")} | {"found": "*i32", "scales": "*fp32", "partials": "*fp32"}

    def case(name, kernel, sm=90, **constants):
        form = {"forward_kernel": "forward", "reduce_kernel": "reduce", "spanning_kernel": "spanning"}.get(kernel.__name__)
        most = most_registers(form, constants["KINDS"], constants.get("TABLE_T") == tl.uint8) if form else None
        return name, kernel, {n: index[n] for n in kernel.arg_names if n not in constants}, constants, 4, 3, sm, most

    for (kind, dtype), dim in [*((each, 128) for each in DTYPES.items()), (("fp16", tl.float16), 64)]:
        vector = 128 // dtype.primitive_bitwidth
        shape = (tile_rows(dim), dim, vector, vector)
        of = f"{kind} D{dim}"
        common = {"COUNT": 26, "TABLE_T": dtype, **LOOKUP_TYPES}
        for form, steps, weight in (("plain", 1, None), ("bags", 4, None), ("weighted bags", 2, dtype)):
            constants = {"N_LOOKUPS": 26, "KINDS": ((*shape, steps),), "WEIGHT_T": weight, "OUT_T": dtype, **common}
            yield case(f"forward {form} {of}", triton_forward.forward_kernel, **constants)
            if kind == "fp32":
                yield case(f"forward {form} {of} sm_80", triton_forward.forward_kernel, sm=80, **constants)
        kernel = triton_forward.weight_grads_kernel
        yield case(f"weight gradients {of}", kernel, KINDS=((*shape, 2),), GRAD_T=dtype, WEIGHT_T=dtype, **common)
        for rule, scaled in (("write", False), ("rowwise_adagrad", False), ("rowwise_adagrad", True), ("adam", False)):
            constants = {"COUNT": 26, "RULE": rule, "TARGET_T": dtype, "STATE_T": tl.float32, "ROUNDED": False}
            kinds, ranked = ((*shape, 2),), rule == "write"
            name, kernel = f"reduce {'scaled ' if scaled else ''}{rule} {of}", triton_backward.reduce_kernel
            yield case(name, kernel, KINDS=kinds, GRAD_T=dtype, SCALED=scaled, RANKED=ranked, **constants)
            if rule == "rowwise_adagrad" and dim == 128 and not scaled:
                yield case(f"{name} sm_80", kernel, sm=80, KINDS=kinds, GRAD_T=dtype, SCALED=scaled, RANKED=ranked, **constants)
            if dim == 128 and not scaled:
                yield case(f"spanning {rule} {of}", triton_backward.spanning_kernel, KINDS=kinds, RANKED=ranked, **constants)
            if dim == 128 and rule == "rowwise_adagrad" and not scaled and kind != "fp32":
                held = constants | {"ROUNDED": True}
                yield case(f"{name} rounded", kernel, KINDS=kinds, GRAD_T=dtype, SCALED=scaled, RANKED=ranked, **held)
            if dim == 128 and rule == "adam":
                yield case(f"update {rule} {of}", triton_backward.update_kernel, KINDS=kinds, GRAD_T=dtype, **constants)
    for form, steps, vector, weight in (("plain", 1, 8, None), ("bags", 4, 8, None), ("bags", 2, 1, None), ("weighted bags", 2, 8, tl.float32), ("weighted bags", 2, 1, tl.float32)):
        kinds = ((tile_rows(128), 128, vector, 4, steps),)  # rows of width 128 begin at multiples of 8 bytes; of odd widths anywhere
        held = {"N_LOOKUPS": 26, "KINDS": kinds, "COUNT": 26, "TABLE_T": tl.uint8, "OUT_T": tl.float32, "WEIGHT_T": weight, **LOOKUP_TYPES}
        yield case(f"int8 rows {form} VEC{vector}", triton_forward.forward_kernel, **held)
    yield from small_table_cases(case)
    for scaled in (False, True):
        constants = {"COUNT": 26, "GRAD_T": tl.float16, "KEY_T": tl.int32, "SCALED": scaled, "TILES": triton_keys.KEY_TILES}
        weight = tl.float16 if scaled else None
        yield case(f"keys{' scaled' if scaled else ''}", triton_keys.keys_kernel, WEIGHT_T=weight, **constants, **LOOKUP_TYPES)
    ahead = {"COUNT": 26, "GRAD_T": tl.float32, "KEY_T": tl.int32, "SCALED": False, "TILES": triton_keys.KEY_TILES, "WEIGHT_T": None}
    yield case("keys alone", triton_keys.keys_kernel, sources=None, scales=None, **ahead, **LOOKUP_TYPES)
    yield case("sources alone", triton_keys.keys_kernel, keys=None, **ahead | {"SCALED": True}, **LOOKUP_TYPES)
    yield case("count", triton_keys.count_kernel)
    yield case("pieces", triton_keys.pieces_kernel, RANKED=True)
    for kind, dtype in (("fp32", tl.float32), ("fp16", tl.float16), ("int8", tl.uint8)):
        coded, vector = dtype == tl.uint8, 4 if dtype == tl.float32 else 8
        out, of = tl.float32 if coded else dtype, f"{kind} D16+D64+D256"
        mixed = lambda steps: tuple((tile_rows(d), d, vector, 4 if coded else vector, steps) for d in (16, 64, 256))  # noqa: B023, E731
        read = {"COUNT": 26, "N_LOOKUPS": 26, "KINDS": mixed(4), "TABLE_T": dtype, "OUT_T": out, "WEIGHT_T": None, **LOOKUP_TYPES}
        yield case(f"{'int8 rows' if coded else 'forward'} bags {of}", triton_forward.forward_kernel, **read)
        if not coded:
            made = {"COUNT": 26, "KINDS": mixed(2), "RULE": "rowwise_adagrad", "TARGET_T": dtype, "STATE_T": tl.float32, "RANKED": False, "ROUNDED": kind == "fp16"}
            yield case(f"reduce rowwise_adagrad {of}", triton_backward.reduce_kernel, GRAD_T=dtype, SCALED=False, **made)
            yield case(f"spanning rowwise_adagrad {of}", triton_backward.spanning_kernel, **made)


def small_table_cases(case):
    """The same of the products that sum the gradients of small tables."""
    from tablewright.kernels.embedding import gpu_small, triton_small
    from tablewright.kernels.embedding.triton_common import tile_rows

    block = gpu_small.BLOCK_ROWS[-1], gpu_small.BLOCK_COLUMNS[-1]
    for kind, dtype in DTYPES.items():
        vector = 128 // dtype.primitive_bitwidth
        for form, plain, scaled in (("plain", True, False), ("bags", False, False), ("weighted bags", False, True)):
            held = {"COUNT": 8, "KINDS": ((*block, vector, plain),), "GRAD_T": dtype, "DOT_T": tl.float32 if scaled else dtype, "SCALED": scaled}
            yield case(f"counts {form} {kind}", triton_small.counts_kernel, WEIGHT_T=dtype if scaled else None, **held, **LOOKUP_TYPES)
        kinds = ((tile_rows(128), 128, vector),)
        for rule, rounded in (("rowwise_adagrad", False), ("adam", False), *([("rowwise_adagrad", True)] if kind != "fp32" else [])):
            held = {"COUNT": 8, "KINDS": kinds, "RULE": rule, "TARGET_T": dtype, "STATE_T": tl.float32, "ROUNDED": rounded}
            yield case(f"finish {rule}{' rounded' if rounded else ''} {kind}", triton_small.finish_kernel, **held)


def interaction_cases():
    """(name, kernel, arguments, constants, warps) of the interaction kernels, with the constants that ``gpu.py`` would choose."""
    import torch
    from tablewright.kernels.interaction import gpu
    from tablewright.kernels.interaction import triton_kernels as k

    pointers = {"where", "first", "second", "starts", "numbers", "partners"}
    for (kind, dtype), (features, dim) in itertools.product(DTYPES.items(), ((27, 128), (100, 64))):
        of = f"{kind} F{features} D{dim}"
        torch_type = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
        square, columns = gpu.square_options(features, dim, torch_type), gpu.column_options(dim)
        products = {"BP": max(1, 1024 // dim), "BD": dim, "num_warps": 4}
        for name, kernel, options in (
            ("dots", k.dots_kernel, square | {"SIDE": True}), ("dots backward", k.dots_backward_kernel, square), ("products", k.products_kernel, products),
            ("products backward", k.products_backward_kernel, columns), ("fm", k.fm_kernel, columns | {"REDUCE": False}),
            ("fm backward", k.fm_backward_kernel, columns),
        ):  # fmt: skip
            constants = {n: v for n, v in options.items() if n not in ("num_warps", "num_stages")}
            kinds = {n: f"*{dtype}" if n in ("x", "out", "grad", "dx", "side") else "*i32" if n in pointers else "i32" for n in kernel.arg_names}
            kinds |= {"scale": "fp32", "dim": "i32:16", "x_batch": "i32:16", "x_feature": "i32:16"} if dim % 16 == 0 else {"scale": "fp32"}
            yield f"{name} {of}", kernel, {n: kinds[n] for n in kernel.arg_names if n not in constants}, constants, options["num_warps"], options.get("num_stages", 3)


def lookup_dots_cases():
    """(name, kernel, arguments, constants, warps, stages, sm) of the interaction that looks its features up."""
    import torch
    from tablewright.kernels.interaction.gpu import square_options
    from tablewright.kernels.lookup_dots import triton_kernels as k

    pointers = {"entries": "*i64", "found": "*i32", "where": "*i32"}
    for (kind, dtype), sm in ((("fp32", tl.float32), 90), (("fp16", tl.float16), 90), (("bf16", tl.bfloat16), 80)):
        options = square_options(27, 128, torch.float32 if kind == "fp32" else torch.float16)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        constants = options | {"VEC": 128 // dtype.primitive_bitwidth, "TABLE_T": dtype, "ID_T": tl.int64}
        for name, kernel, more in (("", k.lookup_dots_kernel, {"SIDE": True}), (" backward", k.lookup_dots_backward_kernel, {})):
            held = constants | more
            kinds = {n: pointers.get(n, f"*{dtype}" if n in ("out", "side", "grad", "dx") else "i32") for n in kernel.arg_names if n not in held}
            kinds["dim"] = "i32:16"
            yield f"lookup dots{name} {kind} sm_{sm}", kernel, kinds, held, warps, stages, sm


def codec_cases():
    """(name, kernel, arguments, constants, warps, stages, sm) of the int8 row codec at width 128."""
    from tablewright.kernels.codecs import gpu
    from tablewright.kernels.codecs import triton_kernels as k

    options = gpu.tile_options(128)
    warps = options.pop("num_warps")
    kinds = {"payload": "*u8", "x_row": "i32:16", "count": "i32", "dim": "i32:16", "width": "i32", "payload_row": "i32"}
    for name, dtype in DTYPES.items():
        vector = 128 // dtype.primitive_bitwidth
        for kernel, values, held in ((k.encode_kernel, "x", {"X_VEC": vector}), (k.decode_kernel, "out", {"OUT_VEC": vector})):
            constants = options | held | {"VEC": 8}
            given = {n: kinds.get(n, f"*{dtype}") for n in kernel.arg_names if n not in constants}
            yield f"{'encode' if values == 'x' else 'decode'} {name}", kernel, given, constants, warps, 3, 90


def mlp_cases():
    """(name, kernel, arguments, constants, warps, stages, sm) of the kernels of the fused multilayer perceptron, as ``gpu.py`` launches them."""
    from tablewright.kernels.mlp import gpu
    from tablewright.kernels.mlp import triton_kernels as k

    numbers = {n: "i32:16" for n in ("m", "n", "k", "rows", "cols", "words", "a_row", "b_inner", "b_col", "grad_row", "count")}
    numbers |= {"layer": "i32", "threshold": "i32", "scale": "fp32", "seed": "*i64", "bits": "*i32", "sums": "*fp32"}

    def case(name, kernel, dtype, options, sm=90, **constants):
        options = dict(options)
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
        kinds = {n: numbers.get(n, f"*{dtype}") for n in kernel.arg_names} | {n: "1" for n in constants.pop("ones", ())}
        constants |= options
        return name, kernel, {n: kinds[n] for n in kernel.arg_names if n not in constants}, constants, warps, stages, sm

    for form, (kind, dtype), sm in (("square", ("bf16", tl.bfloat16), 90), ("wide", ("fp16", tl.float16), 90), ("square", ("fp16", tl.float16), 80)):
        common = {"RELU": True, "BIASED": True, "EVEN": True, "WIDE": False, "sm": sm}
        options, of = gpu.product_options(form), f"{form} {kind} sm_{sm}"
        for drop in (False, True) if form == "square" else (False,):
            name = f"product forward{' dropout' if drop else ''} {of}"
            yield case(name, k.product_kernel, dtype, options, BACKWARD=False, DROP=drop, ones=("b_inner",), **common)
        yield case(f"product backward {of}", k.product_kernel, dtype, options, BACKWARD=True, DROP=True, ones=("b_col",), **common)
    for kind, dtype in DTYPES.items():
        yield case(f"finish dropout {kind}", k.finish_kernel, dtype, gpu.FINISH_TILE, RELU=True, DROP=True)
        yield case(f"masked {kind}", k.masked_kernel, dtype, gpu.MASKED_TILE)
    yield case("keep", k.keep_kernel, tl.float32, {"BLOCK": 256})


CASES = {"--embedding": embedding_cases, "--interactions": interaction_cases, "--mlp": mlp_cases, "--lookup-dots": lookup_dots_cases, "--codecs": codec_cases}


def main() -> None:
    facts = {name: compile_for_hopper(*case) for name, *case in CASES[sys.argv[1]]()}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
