"""What TensorRT says: errors are kept for the evidence of ours, the rest goes to Python's logging.

TensorRT keeps one logger for a whole process and only warns when it is given a second, so all share
one, which passes each error on to every Log that is alive. Imported with TensorRT there.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any
from weakref import WeakSet

KEPT = 8
"""The last words of an engine that fails are the ones that explain it."""

_alive: WeakSet[Log] = WeakSet()
_shared: list[tuple[Any, Any]] = []
"""The TensorRT module and the logger that was made of its base class; one pair at most."""


class Log:
    """The errors since it was made. `logger` is the object that TensorRT takes."""

    def __init__(self) -> None:
        """Begin to listen."""
        self.logger = _listener()
        self._lines: deque[str] = deque(maxlen=KEPT)
        _alive.add(self)

    def hear(self, text: str) -> None:
        """Keep an error.

        Args:
            text: a line of TensorRT's.
        """
        self._lines.append(text)

    def text(self) -> str:
        """The last errors, a line each, each once."""
        return "\n".join(dict.fromkeys(self._lines))


def _listener() -> Any:
    import tensorrt as trt

    if _shared and _shared[0][0] is trt:
        return _shared[0][1]
    python_log = logging.getLogger("jexport.targets.trt")

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 crashes without it

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                for one in list(_alive):
                    one.hear(msg.strip())
            python_log.debug(msg)

    _shared[:] = [(trt, Listener())]
    return _shared[0][1]
