"""What became of a job, wherever it ran, and errors as they go from one process to another."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from jexport import errors
from jexport.errors import JexportError
from jexport.jobs.matrix import Job
from jexport.types import Artifact
from jexport.workspace.run import Event

JobListener: TypeAlias = Callable[[Job, Event], None]
"""Also called with kinds 'begin' and 'end' of an Event, stage '': text says how it ended."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What became of a job.

    Args:
        job: of the matrix.
        artifact: None where there is an error.
        error: a JexportError as it was raised, or a bug with its traceback; None for an artifact.
        seconds: that the job took.
        attempts: how often it was started.
    """

    job: Job
    artifact: Artifact | None
    error: Exception | None
    seconds: float
    attempts: int = 1

    @property
    def summary(self) -> str:
        """The artifact's path, or the first line of the error after 'failed: '."""
        if self.artifact is not None:
            return str(self.artifact.path)
        lines = str(self.error).splitlines() or [type(self.error).__name__]
        return f"failed: {lines[0]}"

    def announce(self, listen: JobListener) -> JobResult:
        """Report to the listener that the job ended.

        Args:
            listen: gets one event, of the kind 'end'.

        Returns:
            The result itself.
        """
        listen(self.job, Event(kind="end", stage="", text=self.summary, seconds=self.seconds))
        return self


def error_to_dict(error: Exception) -> dict[str, Any]:
    """An error as it goes to another process.

    Args:
        error: a JexportError goes by its parts, any other as its traceback.

    Returns:
        JSON-ready, for `error_from_dict`.
    """
    if isinstance(error, JexportError):
        return {
            "kind": type(error).__name__,
            "what": error.what,
            "evidence": error.evidence,
            "fix": error.fix,
            "notes": list(getattr(error, "__notes__", [])),
        }
    return {"what": "".join(traceback.format_exception(error))}


def error_from_dict(value: Mapping[str, Any]) -> Exception:
    """The error that `error_to_dict` was given.

    Args:
        value: what that returned.

    Returns:
        The error, not raised; a RuntimeError for one that is not jexport's.
    """
    kind = getattr(errors, value.get("kind", ""), None)
    if not (isinstance(kind, type) and issubclass(kind, JexportError)):
        return RuntimeError(value["what"])
    error = kind(value["what"], evidence=value["evidence"], fix=value["fix"])
    for note in value["notes"]:
        error.add_note(note)
    return error
