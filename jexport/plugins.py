"""A folder that is its own registry: each file in it is a member and ends with one record.

Knows neither which packages are kept so nor what a record holds; imports a member only by name.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from jexport.errors import JexportError, nearest


def names(package: str) -> list[str]:
    """The members of a package, none of them imported.

    Args:
        package: its dotted name; it is imported already, for it is the one that asks.

    Returns:
        Names of the modules and packages in its folder, sorted; what begins with '_' is none.
    """
    folder = Path(str(sys.modules[package].__file__)).parent
    members = {path.stem for path in folder.glob("*.py")}
    members |= {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(name for name in members if not name.startswith("_"))


def load(package: str, name: str, *, record: str, kind: str, error: type[JexportError]) -> Any:
    """Import one member.

    Args:
        package: its dotted name.
        name: of the member.
        record: name of the module's attribute that holds the record.
        kind: what a member is called, for the message.
        error: raised for a name that is no file; names the nearest.

    Returns:
        The record.

    Raises:
        JexportError: of the class `error`.
    """
    known = names(package)
    if name not in known:
        raise error(
            f"unknown {kind} '{name}'",
            evidence=f"there are: {', '.join(known)}",
            fix=nearest(name, known),
        )
    return getattr(importlib.import_module(f"{package}.{name}"), record)
