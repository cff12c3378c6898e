"""One pickled weight file to one safetensors file: what runs in a process of its own.

`python -m jexport.checkpoints.conversion_worker SOURCE TARGET`. Before the file is opened the
process gives up the network and, from the file's size, memory and disk. Its one line on stdout is
JSON: what was written, or an error's parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.errors import CheckpointError

if TYPE_CHECKING:
    import torch

NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
"""CLONE_NEWNET and CLONE_NEWUSER (linux/sched.h)."""

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG (linux/prctl.h)."""

LARGEST_FACTOR = 4
"""Tensors that need more than this many times their file's size are no weights: a view of one
number can claim to be a million of them."""

SLACK_BYTES = 512 << 20
"""Addresses beyond the file, its largest tensor and what was mapped before it was opened."""


def main() -> None:
    """Convert the file that the first word names into the one that the second names."""
    source, target = map(Path, sys.argv[1:])
    _die_with_parent()
    isolated = leave_network()
    import numpy  # noqa: F401  (before addresses are limited)
    import torch  # noqa: F401

    from jexport.checkpoints import shard_writer, shards

    result: dict[str, Any] = {"isolated": isolated}
    try:
        size = source.stat().st_size
        result["limited"] = limit_memory(2 * size + SLACK_BYTES)
        tensors = shards.unpickled(source, source.stat().st_mtime_ns)
        result["repeated"] = check(source.name, size, tensors)
        shard_writer.write_unchanged(target, tensors)
        result["tensors"] = len(tensors)
    except CheckpointError as error:
        result["error"] = {"what": error.what, "evidence": error.evidence, "fix": error.fix}
    except OSError as error:
        result["errno"], result["evidence"] = error.errno, str(error)
    except MemoryError:
        result["error"] = {
            "what": f"weight file {source.name} needs more memory than weights of its size do",
            "evidence": f"{size:,} bytes on the disk; twice that and {SLACK_BYTES >> 20} MiB were "
            "allowed",
            "fix": "get the checkpoint from a source that you trust, or as safetensors",
        }
    sys.stdout.write(json.dumps(result) + "\n")


def leave_network() -> bool:
    """Move this process into a network namespace of its own, in which there is no way out.

    Returns:
        False where the system has no such thing, or does not allow it.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # A namespace of users as well lets whoever is not root do it, where the system allows that.
    return any(libc.unshare(flags) == 0 for flags in (NEW_NETWORK, NEW_USER | NEW_NETWORK))


def limit_memory(more_bytes: int) -> bool:
    """Limit the addresses that this process may take from now on.

    Args:
        more_bytes: than it has mapped already.

    Returns:
        False where the system does not say how many those are.
    """
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return False
    limit = pages * resource.getpagesize() + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return True


def check(file: str, size: int, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Refuse what safetensors cannot hold, and what is no weight.

    Args:
        file: its name, for the message.
        size: of the file in bytes.
        tensors: its content.

    Returns:
        Names whose memory another name before them has, too: each is written in full.

    Raises:
        CheckpointError: a dtype, layout or size that no weight has.
    """
    import torch

    from jexport.checkpoints.shards import DTYPE_NAMES, describe

    odd = {
        f"{name} ({str(one.dtype).removeprefix('torch.')}, "
        f"{str(one.layout).removeprefix('torch.')})"
        for name, one in tensors.items()
        if str(one.dtype) not in DTYPE_NAMES or one.layout is not torch.strided
    }
    if odd:
        raise CheckpointError(
            f"weight file {file} holds tensors that safetensors has no form for",
            evidence=describe(odd),
            fix="save the float checkpoint, with dense tensors",
        )
    total = sum(one.numel() * one.element_size() for one in tensors.values())
    if total > LARGEST_FACTOR * size:
        raise CheckpointError(
            f"weight file {file} claims to hold more than it does",
            evidence=f"{size:,} bytes on the disk, {total:,} when written out",
            fix="get the checkpoint from a source that you trust, or as safetensors",
        )
    owners: dict[int, str] = {}
    repeated = []
    for name in sorted(tensors):
        one = tensors[name]
        place = one.untyped_storage().data_ptr()
        if one.numel() and owners.setdefault(place, name) != name:
            repeated.append(name)
    return repeated


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() == 1:  # gone before the line above
                raise SystemExit(1)


if __name__ == "__main__":
    main()
