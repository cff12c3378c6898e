"""Kernel timings kept between builds: one file per GPU, TensorRT version and builder options.

TensorRT checks that a cache is for its device, but not that the file is whole; so each file says in
its first line what it is for and what it contains. A file that does not fit is left out with a
note, never an error: a cache only saves time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.targets.trt.device import Machine

FORMAT = 1
LONGEST_HEADER = 4096


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the timings of one machine and one set of builder options are kept.

    Args:
        path: of the file.
        context: what they are for, as the file's first line says it.
    """

    path: Path
    context: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What a file held.

    Args:
        content: TensorRT's cache; b'' when there was none that fits.
        note: one line for the user.
    """

    content: bytes
    note: str


def place(folder: Path, machine: Machine, options: Mapping[str, Any]) -> Place:
    """The file for this machine and these options.

    The driver's CUDA belongs to the name: kernels are chosen by what was timed under it.

    Args:
        folder: of all such files; it need not exist.
        machine: this one.
        options: of the builder, by name, JSON-ready.

    Returns:
        Where to read and write; nothing is made.
    """
    plain = json.dumps(dict(options), sort_keys=True)
    context = {
        "gpu": machine.gpu.name,
        "capability": machine.gpu.capability,
        "cuda": machine.gpu.driver_cuda,
        "tensorrt": machine.tensorrt,
        "system": machine.system,
        "options": hashlib.sha256(plain.encode()).hexdigest()[:12],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", machine.gpu.name.lower()).strip("-")
    name = (
        f"{slug}-cc{machine.gpu.capability}-cuda{machine.gpu.driver_cuda}-"
        f"trt{machine.tensorrt}-{context['options']}.timings"
    )
    return Place(path=folder / name, context=context)


def read(where: Place) -> Timings:
    """The timings kept there.

    Args:
        where: the file.

    Returns:
        The timings, or none with the reason: new, not readable, another machine's, damaged.
    """
    try:
        raw = where.path.read_bytes()
    except FileNotFoundError:
        return Timings(content=b"", note="timing cache: new")
    except OSError as error:
        return Timings(content=b"", note=f"timing cache not used: {error.strerror}")
    header, newline, content = raw[:LONGEST_HEADER].partition(b"\n")
    content = raw[len(header) + 1 :]
    try:
        stored = json.loads(header) if newline else None
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        return Timings(content=b"", note=f"timing cache not used: {where.path.name} is not one")
    if stored.get("made_for") != dict(where.context):
        return Timings(
            content=b"", note=f"timing cache not used: {where.path.name} is of another machine"
        )
    if stored.get("sha256") != hashlib.sha256(content).hexdigest():
        return Timings(content=b"", note=f"timing cache not used: {where.path.name} is damaged")
    return Timings(content=content, note=f"timing cache: {len(content)} bytes")


def write(where: Place, content: bytes) -> str:
    """Keep these timings; a reader sees the old file or the new one.

    Args:
        where: the file.
        content: TensorRT's cache.

    Returns:
        '' or a note that it failed.
    """
    header = {
        "format": FORMAT,
        "made_for": dict(where.context),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        where.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".timings-", dir=where.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(where.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        return f"timing cache not kept: {error.strerror}"
    return ""
