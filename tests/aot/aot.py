"""Compiles a launch for a GPU that is not there, and reads what came out: limits, registers, the loop's instructions.

Triton needs neither driver nor GPU for this, and brings NVIDIA's assembler and disassembler along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autoplan.kernels.cuda.launch import Call, Launch, TritonKernel
from autoplan.kernels.cuda.space import Config

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


def launches(kernel: TritonKernel, config: Config, m: int, n: int, k: int, dtype: torch.dtype,
             group_size: int | None = None) -> Iterator[Launch]:  # fmt: skip
    """The launches of one call, with bias, on tensors that have shapes and nothing else."""
    if kernel.weight == "int4":
        groups = k // (group_size or 32)
        stored = {
            "codes": torch.empty(n, k // 2, dtype=torch.uint8, device="meta"),
            "scale": torch.empty(n, groups, dtype=torch.bfloat16, device="meta"),
            "zero_point": torch.empty(n, groups, dtype=torch.uint8, device="meta"),
        }
    else:
        codes = torch.int8 if kernel.weight == "int8" else torch.float8_e4m3fn
        stored = {"codes": torch.empty(n, k, dtype=codes, device="meta"), "scale": torch.empty(n, device="meta")}
    x = torch.empty(m, k, dtype=dtype, device="meta")
    bias = torch.empty(n, dtype=dtype, device="meta")
    y = torch.empty(m, n, dtype=dtype, device="meta")
    yield from kernel.launches(Call(x, kernel.layout.pack(stored), bias, y), config)


@dataclass(frozen=True)
class Compiled:
    """What a launch became."""

    launch: Launch
    architecture: int
    binary: bytes
    ptx: str
    shared_bytes: int

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK (spills) and LOCAL of a thread, as the assembler reports them."""
        report = self._tool("cuobjdump", "--dump-resource-usage")
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}

    @cached_property
    def instructions(self) -> list[str]:
        return self._listing[0]

    def contains(self, *names: str) -> bool:
        """Whether one of these instructions is among the machine code."""
        return any(operation(line).startswith(names) for line in self.instructions)

    @cached_property
    def loop(self) -> Counter[str]:
        """The instructions of the innermost loop that reads memory and multiplies most: the main loop."""
        lines, labels = self._listing
        loops = []
        for end, line in enumerate(lines):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if operation(line).startswith("BRA") and target and labels.get(target[1], end) < end - 2:
                loops.append((labels[target[1]], end))
        inner = [
            (start, end)
            for start, end in loops
            if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
        ]
        counts = [Counter(map(operation, lines[start : end + 1])) for start, end in inner]
        work = ("LDG", "UTMALDG", "HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTC")
        return max(counts, key=lambda count: sum(n for name, n in count.items() if name.startswith(work)))

    @property
    def loads_16_bytes(self) -> bool:
        """Whether it reads memory 16 bytes at a time, and nowhere byte by byte."""
        loads = [line for line in self.ptx.splitlines() if "ld.global" in line or "cp.async.c" in line]
        wide = any(".v4.b32" in line or re.search(r"cp\.async\.cg.*0x10", line) for line in loads)
        return wide and not any(re.search(r"ld\.global\S*\.b8\b", line) for line in loads)

    @property
    def instructions_per_weight(self) -> float:
        """Instructions that a thread executes in the main loop for each weight the program reads there."""
        return sum(self.loop.values()) * 32 * self.launch.warps / self.launch.step_weights

    @cached_property
    def _listing(self) -> tuple[list[str], dict[str, int]]:
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in self._tool("nvdisasm", "-c").splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(found[1].strip())
        return lines, labels

    def _tool(self, name: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary)
            file.flush()
            return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def operation(line: str) -> str:
    """The opcode of a line of machine code, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile as the runtime would: pointers aligned to 16 bytes, multiples of 16 known as such."""
    function = launch.function
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values: dict[str, Any] = {**launch.arguments, **launch.constants}
    for parameter in function.params:
        name, place, value = parameter.name, (parameter.num,), values[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[place] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[place] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(launch, architecture, done.asm["cubin"], done.asm["ptx"], done.metadata.shared)


def summary(one: Compiled) -> str:
    """A line for people."""
    per_weight = f", {one.instructions_per_weight:.2f} instructions per weight" if one.launch.step_weights else ""
    registers = one.resources["REG"]
    return f"{one.launch.function.__name__}: {registers} registers, {one.shared_bytes} bytes shared{per_weight}"
