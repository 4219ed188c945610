"""A few PTX instructions in numpy, each register an array of uint32: enough for the kernels' inline assembly.

Semantics are those of the PTX ISA manual (https://docs.nvidia.com/cuda/parallel-thread-execution/).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

Register = np.ndarray


def run_ptx(asm: str, outputs: int, inputs: list[Register]) -> list[Register]:
    """The outputs of a block `{ instruction; ... }` whose operands $0.. are first the outputs, then the inputs."""
    registers = {f"${outputs + index}": value for index, value in enumerate(inputs)}

    def read(operand: str) -> Register:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            return np.full_like(inputs[0], int(operand, 0))
        return registers[operand]

    for statement in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        name, operands = statement.strip().split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = _execute(name, [read(source) for source in sources])
    return [registers[f"${index}"] for index in range(outputs)]


def _execute(name: str, sources: list[Register]) -> Register:
    if name == "mov.b32":
        return sources[0]
    if name == "shr.b32":
        return sources[0] >> sources[1]
    if name == "lop3.b32":
        return _lop3(*sources)
    if name == "prmt.b32":
        return _prmt(*sources)
    found = re.fullmatch(r"(sub|fma)(?:\.rn)?\.(f16|bf16)x2", name)
    if not found:
        raise NotImplementedError(f"this emulator has no {name}: add it")
    return _pairwise(found[1], found[2], sources)


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    """Any function of three bits: bit 4a + 2b + c of the table is the result."""
    result = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Four bytes out of the eight of a and b, each chosen by four bits of the selector."""
    pool = [(source >> np.uint32(8 * index)) & np.uint32(255) for source in (a, b) for index in range(4)]
    result = np.zeros_like(a)
    for index in range(4):
        result |= pool[int(selector.flat[0]) >> 4 * index & 7] << np.uint32(8 * index)
    return result


def _pairwise(operation: str, kind: str, sources: list[Register]) -> Register:
    """Arithmetic on two 16-bit floats a register, rounded once."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    compute: dict[str, Callable[..., torch.Tensor]] = {
        "sub": lambda a, b: a - b,
        "fma": lambda a, b, c: a * b + c,
    }
    values = [torch.from_numpy(np.ascontiguousarray(source).view(np.uint16)).view(dtype).double() for source in sources]
    return compute[operation](*values).to(dtype).view(torch.uint16).numpy().view(np.uint32)
