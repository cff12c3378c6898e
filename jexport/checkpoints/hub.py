"""From a hub id to a local folder and the 40-hex commit that it holds.

Fetches safetensors, JSON and tokenizer files; pytorch_model.bin only where there is no safetensors,
and no code (that is asked for apart).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jexport.errors import DependencyError, HubError, RemoteCodeError

WEIGHTS_AND_CONFIG = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")
PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
"""Fetched only where a repository has no safetensors."""

CODE = ("*.py",)
NEVER = ("onnx/*", "openvino/*", "*.bin", "*.pt")
HEX = frozenset("0123456789abcdef")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's 40 hex digits, and so can never mean something else."""
    return len(revision) == 40 and set(revision) <= HEX


def check_pinned(revision: str, *, what: str, key: str) -> None:
    """Raise RemoteCodeError unless code would run from one commit, not from whatever is newest."""
    if not is_commit(revision):
        raise RemoteCodeError(
            "remote code runs from a pinned revision only",
            evidence=f"{what}: {key} is {revision!r}",
            fix=f"set {key} in the recipe (or the flag of that name) to the 40-hex commit that you "
            "read, or put the .py files beside the weights and name them in auto_map",
        )


def fetch(model_id: str, revision: str, patterns: tuple[str, ...]) -> tuple[Path, str]:
    """Download (or find in the local cache) a snapshot; returns its folder and commit.

    revision: '' takes the newest. Raises HubError when the hub cannot be reached and nothing is
    cached, DependencyError without huggingface_hub.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            "reading from a model hub needs huggingface_hub",
            evidence=str(error),
            fix='pip install "jexport[build]", or give --model FOLDER',
        ) from error

    def download(commit: str, patterns: tuple[str, ...]) -> str:
        return str(
            huggingface_hub.snapshot_download(
                model_id,
                revision=commit or None,
                allow_patterns=list(patterns),
                ignore_patterns=[one for one in NEVER if one != "*.bin" or patterns != PICKLED],
            )
        )

    try:
        with _no_bars():
            folder = download(revision, patterns)
            weights = "*.safetensors" in patterns
            if weights and not any(Path(folder).rglob("*.safetensors")):
                download(Path(folder).name, PICKLED)
    except Exception as error:  # httpx, requests and hub errors share no base class
        first_line = next(iter(str(error).splitlines()), "")
        raise HubError(
            f"cannot get '{model_id}' from the model hub",
            evidence=f"{type(error).__name__}: {first_line}",
            fix="check the id and the network, or give a local folder with --model FOLDER",
        ) from error
    commit = Path(folder).name
    if not is_commit(commit):
        raise HubError(
            f"the hub's cache does not say which commit of '{model_id}' it holds",
            evidence=str(folder),
            fix="remove that folder from the cache, or give a local folder with --model FOLDER",
        )
    return Path(folder), commit


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """One run has one progress line, and with --quiet none: not a second one of the hub's."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
