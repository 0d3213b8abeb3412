"""Compiles every Triton kernel for NVIDIA's sm_80 and sm_90, which takes no GPU, and prints what came out as JSON.

To be run as a process of its own: the interpreter must be off before Triton is imported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from das_ds.kernels import masked_adamw_triton, masked_scale_triton, soft_update_triton, unit_gate_triton
from das_ds.kernels.tiles import tile_elements

INSTRUCTION = re.compile(r"\b(?:div|ld\.local|st\.local|ld\.global|st\.global)[\w.:]*")
TABLES = {"tiles": "*i32", "owners": "*i32", "segments": "*i64", "values": "*fp32"}
SCALARS = ("step_size", "root_correction", "share1", "share2", "eps", "decay")
MULTIPLES_OF_16 = ("start", "stop", "features", "num_units")
"""Sizes that are so in real models; Triton looks at every launch and recompiles where they are not."""
ELEMENTS = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "u8": triton.language.uint8}


def forms() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, types of the arguments, constants, warps) of every form that is launched."""
    tile = {"TILE": tile_elements()}
    for mask, stored in (("none", "fp32"), ("unit", "fp32"), ("parameter", "u8"), ("parameter", "bf16")):
        flags = {"BY_UNIT": mask == "unit", "QUANTIZED": stored == "u8"}
        yield (
            f"masked_adamw {mask} {stored}",
            masked_adamw_triton._masked_adamw,
            dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "grad_scale"), "*fp32")
            | {"importance": f"*{stored}"}
            | TABLES
            | dict.fromkeys(SCALARS, "fp32"),
            {**tile, **flags, "BY_PARAMETER": mask == "parameter", "SCALED": True},
            masked_adamw_triton.NUM_WARPS,
        )
        if mask == "none":
            continue
        yield (
            f"soft_update {mask} {stored}",
            soft_update_triton._soft_update,
            {"param": "*fp32", "old": "*fp32", "importance": f"*{stored}", "start": "i64", "stop": "i64"} | TABLES,
            {**tile, **flags},
            soft_update_triton.NUM_WARPS,
        )
        for element in ("fp32", "bf16"):
            yield (
                f"masked_scale {mask} {stored} {element}",
                masked_scale_triton._masked_scale,
                {"addresses": "*i64", "importance_addresses": "*i64", "numbers": "*i32"} | TABLES,
                {**tile, **flags, "ELEMENT": ELEMENTS[element], "IMPORTANCE": ELEMENTS[stored], "ALIGNED": True},
                masked_scale_triton.NUM_WARPS,
            )
    for element in ("fp32", "bf16", "fp16"):
        pointer = f"*{element}"
        counts = ("num_tokens", "num_positions", "features", "num_units", "first_row", "num_sequences")
        yield (
            f"unit_gate {element}",
            unit_gate_triton._scale_rows,
            {"x": pointer, "gate": "*fp32", "scaled": pointer, **dict.fromkeys(counts[:5], "i32")},
            {
                "FEATURES_PER_UNIT": 64,
                "ONE_GATE": True,
                "BLOCK_TOKENS": unit_gate_triton.BLOCK_TOKENS,
                "BLOCK_FEATURES": unit_gate_triton.BLOCK_FEATURES,
            },
            4,
        )
        yield (
            f"measure_gate {element}",
            unit_gate_triton._measure,
            {"x": pointer, "dy": pointer, "sums": "*fp32", "row_weights": "*fp32", **dict.fromkeys(counts, "i32")},
            {
                "NUM_VIEWS": 2,
                "FEATURES_PER_UNIT": 64,
                "BLOCK_UNITS": 2,
                "BLOCK_FEATURES": 64,
                "BLOCK_POSITIONS": unit_gate_triton.MEASURED_POSITIONS,
            },
            4,
        )


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, num_warps: int) -> Any:
    """Machine code of one form, its pointers aligned to 16 bytes as torch's are."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in MULTIPLES_OF_16]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def main() -> None:
    """Form -> instructions of interest with their number, and the size of the machine code."""
    found: dict[str, Any] = {}
    for capability in (80, 90):
        for name, kernel, types, constants, num_warps in forms():
            code = compiled(kernel, types, constants, capability, num_warps).asm
            instructions = INSTRUCTION.findall(code["ptx"])
            counts = {instruction: instructions.count(instruction) for instruction in set(instructions)}
            found[f"{name} sm_{capability}"] = {"bytes": len(code["cubin"]), "instructions": counts}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
