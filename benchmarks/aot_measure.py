"""Compile recorded launches and read off what they use; no GPU is needed.

A cubin is read with the tools inside the Triton package: registers and stack from its resource table, spills and
tensor-core instructions from its disassembly. On AMD the same stands in the assembly that Triton prints. Nothing here
knows an operation of ours, nor what is allowed.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

import triton
from aot_capture import Launch, Target
from aot_rules import TENSOR_CORE, Measured
from aot_ttir import dots, narrow_offsets
from triton.compiler import ASTSource

__all__ = ["compile_launch", "read_instructions"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)


def compile_launch(launch: Launch, target: Target) -> tuple[Measured, bytes]:
    """What `launch` uses on `target` and, for NVIDIA, its machine code, which `read_instructions` takes."""
    seconds: dict[str, float] = {}

    def listen(*, times: Any, **_: Any) -> None:
        seconds["frontend"] = times.ir_initialization / 1e6
        seconds.update({stage: micros / 1e6 for stage, micros in times.lowering_stages})

    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    triton.knobs.compilation.listener = listen
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        try:
            with _told_to(said):
                compiled = triton.compile(source, target=target.triton, options=launch.options)
        except Exception as error:  # whatever a stage of the compiler raises is the answer
            said.seek(0)
            return Measured(error=_why(error, said.read()), seconds={"failed": time.perf_counter() - start}), b""
    start = time.perf_counter()
    code = b""
    if target.triton.backend == "cuda":
        measured, code = _read_cubin(compiled.asm["cubin"])
    elif compiled.metadata.shared > target.shared_limit:
        return Measured(error=f"OutOfResources: shared memory, {compiled.metadata.shared}", seconds=seconds), b""
    else:
        measured = _read_amdgcn(compiled.asm["amdgcn"])
    measured.shared = compiled.metadata.shared
    measured.warps = compiled.metadata.num_warps
    measured.dots = dots(compiled.asm["ttir"])
    measured.narrow = narrow_offsets(compiled.asm["ttir"])
    measured.seconds = {**seconds, "reading": time.perf_counter() - start}
    return measured, code


def read_instructions(measured: Sequence[Measured], codes: Sequence[bytes], target: Target) -> None:
    """Disassemble the machine codes of one NVIDIA target and note each one's spills and tensor-core instructions.

    All in one go, end to end: the disassembler takes longer to start than to read dozens of kernels.
    """
    ends = list(accumulate(map(len, codes)))
    counts: list[Counter[str]] = [Counter() for _ in codes]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = _tool("nvdisasm", "--binary", f"SM{target.triton.arch}", file.name)
    for address, opcode in _INSTRUCTION.findall(text):
        counts[bisect_right(ends, int(address, 16))][opcode] += 1
    for each, code, count in zip(measured, codes, counts, strict=True):
        if code:
            if not count["EXIT"]:
                raise RuntimeError(f"expected the instructions of a kernel from nvdisasm, got {dict(count)}")
            each.spills = count["STL"] + count["LDL"]
            each.tensor_core = {kind: count[kind] for kind in TENSOR_CORE if count[kind]}


@contextlib.contextmanager
def _told_to(file: TextIO) -> Iterator[None]:
    """What compilers print goes to `file`: when one fails, the whole program and more."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _why(error: Exception, said: str) -> str:
    """One line: what was raised and, since that often says little, what was printed of the pass that failed."""
    told = re.search(r"failed while executing \[`(\w+)`", said) or re.search(r"\berror: *(.+)", said)
    raised = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {raised[:200]}" + (f" ({told.group(1)[:200]})" if told else "")


def _read_cubin(cubin: bytes) -> tuple[Measured, bytes]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"expected the resources of a kernel from cuobjdump, got {usage!r}")
    return Measured(registers=int(found.group(1)), stack=int(found.group(2))), _machine_code(cubin)


def _machine_code(elf: bytes) -> bytes:
    """The sections .text.* of a 64-bit little-endian ELF file, end to end."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * number) for number in range(count)]
    start = headers[names][4]
    sections = [(elf[start + name :], elf[offset : offset + length]) for name, _, _, _, offset, length in headers]
    return b"".join(code for name, code in sections if name.startswith(b".text."))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def _read_amdgcn(text: str) -> Measured:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"expected .{name} in the AMD assembly, got none")
        return int(found.group(1))

    matrix = len(re.findall(r"^\s+v_mfma", text, re.MULTILINE))
    return Measured(
        registers=figure("vgpr_count"),
        stack=figure("private_segment_fixed_size"),
        spills=figure("vgpr_spill_count"),
        tensor_core={"MFMA": matrix} if matrix else {},
    )
