"""An ELF shared library of functions that do nothing, written without a compiler.

TensorRT's Python bindings on PyPI are an extension module that needs NVIDIA's libraries only for
nine functions. With libraries of that name that have them, the bindings load, and every class,
enum, method and signature can be asked for; calling any of those functions gives 0.
"""

from __future__ import annotations

import platform
import struct

MACHINES = {"x86_64": 62, "aarch64": 183}
RETURN_ZERO = {
    "x86_64": b"\x31\xc0\xc3",  # xor eax, eax; ret
    "aarch64": struct.pack("<II", 0xD2800000, 0xD65F03C0),  # mov x0, #0; ret
}
FILE_HEADER, PROGRAM_HEADER, SYMBOL = 64, 56, 24
LOAD, DYNAMIC, STACK = 1, 2, 0x6474E551
HASH, STRTAB, SYMTAB, STRSZ, SYMENT, SONAME = 4, 5, 6, 10, 11, 14
"""Tags of the dynamic section (the ELF-64 object file format, versions of 1998 on)."""


def library(name: str, functions: list[str]) -> bytes:
    """The bytes of a library of that soname, which exports these functions; each returns 0."""
    machine = platform.machine()
    code = RETURN_ZERO[machine]
    strings, at = b"\0", {}
    for text in (name, *functions):
        at[text] = len(strings)
        strings += text.encode() + b"\0"
    count = len(functions) + 1  # the first symbol is the empty one
    # One bucket: a chain through every symbol.
    chain = [0, *range(2, count), 0] if functions else [0]
    table = struct.pack(f"<{3 + count}I", 1, count, min(1, len(functions)), *chain)
    parts = {
        "header": b"\0" * (FILE_HEADER + 3 * PROGRAM_HEADER),
        "code": code,
        "strings": strings,
        "table": table,
        "symbols": b"\0" * (SYMBOL * count),
        "dynamic": b"\0" * 16 * 7,
    }
    places, end = {}, 0
    for key, blob in parts.items():
        places[key] = end
        end = -(-(end + len(blob)) // 8) * 8
    parts["symbols"] = b"\0" * SYMBOL + b"".join(
        # global function, default visibility, in section 1 (any defined one)
        struct.pack("<IBBHQQ", at[text], 0x12, 0, 1, places["code"], len(code))
        for text in functions
    )
    entries = [
        (SONAME, at[name]),
        (HASH, places["table"]),
        (STRTAB, places["strings"]),
        (SYMTAB, places["symbols"]),
        (STRSZ, len(strings)),
        (SYMENT, SYMBOL),
        (0, 0),
    ]
    parts["dynamic"] = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    dynamic = places["dynamic"], len(parts["dynamic"])
    parts["header"] = b"".join(
        [
            b"\x7fELF",
            bytes([2, 1, 1]),
            b"\0" * 9,
            struct.pack(
                "<HHIQQQIHHHHHH",
                3,
                MACHINES[machine],
                1,
                0,
                FILE_HEADER,
                0,
                0,
                FILE_HEADER,
                PROGRAM_HEADER,
                3,
                64,
                0,
                0,
            ),
            # Readable, writable and executable: the loader relocates the dynamic section.
            struct.pack("<IIQQQQQQ", LOAD, 7, 0, 0, 0, end, end, 0x10000),
            struct.pack(
                "<IIQQQQQQ",
                DYNAMIC,
                6,
                dynamic[0],
                dynamic[0],
                dynamic[0],
                dynamic[1],
                dynamic[1],
                8,
            ),
            struct.pack("<IIQQQQQQ", STACK, 6, 0, 0, 0, 0, 0, 16),
        ]
    )
    whole = bytearray(end)
    for key, blob in parts.items():
        whole[places[key] : places[key] + len(blob)] = blob
    return bytes(whole)
