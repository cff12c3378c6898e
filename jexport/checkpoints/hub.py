"""From a hub id to a local folder and the 40-hex commit that it holds.

Fetches safetensors, JSON and tokenizer files; pytorch_model.bin only where there is no safetensors,
and no code (that is asked for apart).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jexport.errors import DependencyError, HubError, RemoteCodeError

WEIGHTS_AND_CONFIG = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")
PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
"""Fetched only where a repository has no safetensors."""

CODE = ("*.py",)
NEVER = ("onnx/*", "openvino/*", "*.bin", "*.pt")
CONVERTER = "SFconvertbot"
"""The hub's own account that converts pickled weights, each in a pull request."""

CONVERSION_TITLE = "Adding `safetensors` variant of this model"
HEX = frozenset("0123456789abcdef")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit's 40 hex digits, and so can never mean something else.

    Args:
        revision: a commit, branch or tag, as a recipe has it.

    Returns:
        False also for upper-case or shortened digits.
    """
    return len(revision) == 40 and set(revision) <= HEX


def check_pinned(revision: str, *, what: str, key: str) -> None:
    """Refuse code that would run from whatever is newest, not from one commit.

    Args:
        revision: that the code would be taken from.
        what: whose code it is, for the message.
        key: the recipe's key that pins it.

    Raises:
        RemoteCodeError: the revision is no commit.
    """
    if not is_commit(revision):
        raise RemoteCodeError(
            "remote code runs from a pinned revision only",
            evidence=f"{what}: {key} is {revision!r}",
            fix=f"set {key} in the recipe (or the flag of that name) to the 40-hex commit that you "
            "read, or put the .py files beside the weights and name them in auto_map",
        )


def fetch(model_id: str, revision: str, patterns: tuple[str, ...]) -> tuple[Path, str]:
    """Download a snapshot, or take it from the local cache.

    Args:
        model_id: owner/name on the Hugging Face Hub.
        revision: '' takes the newest.
        patterns: of the files to fetch; with *.safetensors among them, PICKLED where there is none.

    Returns:
        The snapshot's folder in the cache, and its 40-hex commit.

    Raises:
        HubError: the hub cannot be reached and nothing is cached, or the cache names no commit.
        DependencyError: huggingface_hub is missing.
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


@dataclass(frozen=True, kw_only=True)
class HubConversion:
    """A commit with the weights of another one as safetensors.

    Args:
        reference: of the pull request, such as 'refs/pr/5'.
        commit: its 40-hex commit, which `revision` takes.
    """

    reference: str
    commit: str


def conversion(model_id: str, commit: str) -> HubConversion | None:
    """The hub's own conversion of a commit without safetensors.

    As transformers does, only a pull request of CONVERTER counts whose only commit follows the one
    asked for: anybody can open one of the same title, and an old one has old weights.

    Args:
        model_id: owner/name.
        commit: the 40-hex commit that has pickled weights.

    Returns:
        None where there is none, or the hub cannot be asked.
    """
    try:
        import huggingface_hub

        hub = huggingface_hub.HfApi()
        for one in hub.get_repo_discussions(
            model_id, author=CONVERTER, discussion_type="pull_request"
        ):
            if (one.author, one.title) != (CONVERTER, CONVERSION_TITLE):
                continue
            if one.status not in ("open", "merged") or one.git_reference is None:
                continue
            commits = hub.list_repo_commits(model_id, revision=one.git_reference)
            if [commit] == [parent.commit_id for parent in commits[1:2]]:
                return HubConversion(reference=one.git_reference, commit=commits[0].commit_id)
    except Exception:  # no network, no rights, another hub: it is only a hint
        return None
    return None


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
