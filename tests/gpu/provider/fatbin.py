"""CUDA code inside a shared library: keep one compute capability, zero the rest.

nvcc puts a kernel's code for each kind of GPU into containers in the ELF section `.nv_fatbin`. A
driver takes the entry that fits its GPU, so a library that one kind of GPU will use needs one entry
each. Zeroed code leaves every size and offset as it was, and compresses to almost nothing.

Layout (little endian; seen in the library of onnxruntime-gpu 1.30.0): a container is
magic u32, version u16, header bytes u16, bytes of entries u64; an entry is kind u16, version u16,
header bytes u32, bytes of code u64, 12 bytes, compute capability u32 (90 for 9.0), and more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SECTION = ".nv_fatbin"
CONTAINER = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ12xI")
MAGIC = 0xBA55ED50
MACHINE_CODE = 2
"""The kind of an entry that a GPU runs; 1 is PTX, which the driver would have to compile."""

ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class Code:
    """One entry's code: where it lies in the file, and for what."""

    start: int
    size: int
    kind: int
    capability: int


def section(data: bytes, name: str) -> tuple[int, int]:
    """Offset and size of a section of a 64-bit little-endian ELF file. Raises ValueError."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    # Of a section header: its name's place, and at 24 bytes from its start offset and size.
    headers = [
        (struct.unpack_from("<I", data, at)[0], *struct.unpack_from("<QQ", data, at + 24))
        for at in range(table, table + size * count, size)
    ]
    strings = headers[names][1]
    for place, offset, length in headers:
        begin = strings + place
        if data[begin : data.index(b"\0", begin)] == name.encode():
            return offset, length
    raise ValueError(f"there is no section {name}")


def entries(data: bytes, start: int, size: int) -> Iterator[Code]:
    """Every entry of the containers between two places. Raises ValueError on what is neither."""
    at, end = start, start + size
    while at + CONTAINER.size <= end:
        magic, _, header, length = CONTAINER.unpack_from(data, at)
        if magic != MAGIC:
            if any(data[at : at + ALIGNMENT]):
                raise ValueError(f"no container, and no padding, at byte {at}")
            at += ALIGNMENT
            continue
        inner, at = at + header, at + header + length
        while inner < at:
            kind, _, entry_header, code, capability = ENTRY.unpack_from(data, inner)
            yield Code(start=inner + entry_header, size=code, kind=kind, capability=capability)
            inner += entry_header + code
        if inner != at:
            raise ValueError(f"a container's entries do not end where it does, at byte {at}")


def prune(data: bytearray, capability: int) -> tuple[int, int]:
    """Zero in place all code but that for one compute capability; bytes kept and zeroed.

    Raises ValueError when nothing would be left: the GPU could run no kernel.
    """
    kept = zeroed = 0
    for code in list(entries(data, *section(data, SECTION))):
        if code.kind == MACHINE_CODE and code.capability == capability:
            kept += code.size
        else:
            data[code.start : code.start + code.size] = bytes(code.size)
            zeroed += code.size
    if not kept:
        raise ValueError(f"there is no machine code for compute capability {capability / 10}")
    return kept, zeroed
