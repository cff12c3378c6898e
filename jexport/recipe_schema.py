"""A recipe's tables <-> frozen dataclasses: types checked, unknown keys refused.

Knows dataclasses whose fields are plain values, tuples, mappings and each other; no recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jexport.errors import RecipeError, nearest


def read_table(cls: type, table: Mapping[str, Any], *, origin: str, where: str = "") -> Any:
    """An instance of the dataclass `cls` with the table's values.

    Args:
        cls: the dataclass.
        table: of a recipe, values by key.
        origin: the recipe, in errors.
        where: what stands before a key's own name in errors, such as 'compile.'.

    Returns:
        The instance, its defaults where the table has no key.

    Raises:
        RecipeError: a key is unknown, or its value of another type; names both and `origin`.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, raw in table.items():
        name = f"{where}{key}"
        if key not in fields:
            raise RecipeError(
                f"unknown recipe key '{name}'",
                evidence=f"in {origin}",
                fix=nearest(key, fields),
            )
        values[key] = _convert(hints[key], raw, where=name, origin=origin)
    for key, spec in fields.items():
        needed = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if needed and key not in values:
            raise RecipeError(
                f"recipe key '{where}{key}' is missing", evidence=f"in {origin}", fix="add it"
            )
    return cls(**values)


def _convert(hint: Any, raw: Any, *, where: str, origin: str) -> Any:
    def wrong(expected: str) -> RecipeError:
        return RecipeError(
            f"recipe key '{where}' has the wrong type",
            evidence=f"{origin}: {where} = {raw!r}",
            fix=f"give {expected}",
        )

    origin_type = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(raw, Mapping):
            raise wrong("a table")
        return read_table(hint, raw, origin=origin, where=f"{where}.")  # type: ignore[arg-type]
    if origin_type is tuple:
        if not isinstance(raw, list):
            raise wrong("a list")
        item = get_args(hint)[0]
        numbered = dataclasses.is_dataclass(item)
        return tuple(
            _convert(item, value, where=f"{where}[{n}]" if numbered else where, origin=origin)
            for n, value in enumerate(raw)
        )
    if origin_type is not None and not isinstance(hint, UnionType):  # Mapping[str, ...]
        if not isinstance(raw, Mapping):
            raise wrong("a table")
        item = get_args(hint)[1]
        converted = {
            key: _convert(item, value, where=f"{where}.{key}", origin=origin)
            for key, value in raw.items()
        }
        return MappingProxyType(converted)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is not hint:
        raise wrong(f"a value of type {hint.__name__}")
    return raw


def plain(value: Any) -> Any:
    """What a dataclass could be read from.

    Args:
        value: a dataclass, or a value of one.

    Returns:
        JSON-ready dicts, lists and scalars.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
