"""The measurements of a search, on disk, so that a build that was killed goes on from there.

One JSON line a measurement, under a key that the caller makes. Knows no graph and no text: whoever
opens a log names the file after everything that decides its numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrialLog:
    """Measurements by key."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what is there; a line that a killed run left unfinished is not a measurement.

        Args:
            path: of the log, created with the first measurement; None keeps them in memory only.
        """
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                self._entries[str(entry["key"])] = dict(entry["value"])
            except (ValueError, KeyError, TypeError):
                continue

    def __len__(self) -> int:
        """How many measurements there are."""
        return len(self._entries)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What was measured under a key.

        Args:
            key: as it was given to `append`.

        Returns:
            The measurement, or None.
        """
        return self._entries.get(key)

    def append(self, key: str, value: Mapping[str, Any]) -> None:
        """Add one measurement; it is on the disk when this returns.

        Args:
            key: of the trial; a later measurement takes the place of an earlier one.
            value: JSON-ready.
        """
        self._entries[key] = dict(value)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "value": dict(value)}).encode()
        # The leading newline ends a line that a killed run may have left without one.
        with open(self._path, "ab") as stream:
            stream.write(b"\n" + line + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def delete(self) -> None:
        """Remove the file: the search is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        try:
            text = self._path.read_bytes() if self._path is not None else b""
        except OSError:
            return []
        return text.decode("utf-8", errors="replace").splitlines()
