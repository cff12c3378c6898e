"""What a layout is: artifacts laid out as one server reads them; the folder is the registry.

To add one: a file here that ends with `LAYOUT = Layout(...)`. A layout copies and describes what is
built; it changes nothing in an artifact and opens no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jexport import plugins
from jexport.errors import LayoutError
from jexport.types import Artifact

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user may say of the serving.

    Args:
        device: one of DEVICES.
        max_batch: texts of one batch; 0 for the layout's own.
        replace: the next version of a model may be of another checkpoint.
    """

    device: str = "auto"
    max_batch: int = 0
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class Written:
    """One artifact as it stands in a layout.

    Args:
        name: the model's, as the server knows it.
        version: its number there.
        path: the folder of that version.
        new: False when it stood there already.
        notes: what the user should know of it.
    """

    name: str
    version: int
    path: Path
    new: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout.

    Args:
        name: as its file's.
        summary: a line of what it is.
        targets: the artifacts it takes.
        write: (artifacts, out, wishes): writes all or none.
    """

    name: str
    summary: str
    targets: tuple[str, ...]
    write: Callable[[Sequence[Artifact], Path, Wishes], list[Written]]


def names() -> list[str]:
    """The layouts there are, without importing any."""
    return plugins.names(__name__)


def load(name: str) -> Layout:
    """Import one layout.

    Args:
        name: one of `names`.

    Returns:
        Its record.

    Raises:
        LayoutError: there is none of that name; names the nearest.
    """
    layout: Layout = plugins.load(__name__, name, record="LAYOUT", kind="layout", error=LayoutError)
    return layout
