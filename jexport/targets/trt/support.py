"""support.json: TensorRT's published operator and type support, read once.

Knows nothing of graphs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Support:
    """The published table.

    Args:
        operators: types of each operator that is taken.
        beyond: further types, which only the reference of the layer behind an operator lists.
        refused: operators that it names as not taken.
        network_types: types that a TensorRT tensor may have.
        value_shaped: operators whose result has a size that depends on values.
        restrictions: by operator, what holds beyond types (operators.check_restrictions).
        opsets: lowest and highest, by TensorRT version, oldest first.
        source: where it was published, for the evidence.
    """

    operators: Mapping[str, frozenset[str]]
    beyond: Mapping[str, frozenset[str]]
    refused: frozenset[str]
    network_types: frozenset[str]
    value_shaped: frozenset[str]
    restrictions: Mapping[str, Mapping[str, Any]]
    opsets: Mapping[str, tuple[int, int]]
    source: str


@functools.cache
def table() -> Support:
    """The file beside this one."""
    content = json.loads(Path(__file__).with_name("support.json").read_text(encoding="utf-8"))
    about = content["about"]
    operators = {
        name: frozenset(content["type_sets"][kind])
        for kind, names in content["supported"].items()
        for name in names
    }
    operators |= {name: frozenset(types) for name, types in content["own_types"].items()}
    beyond = content["beyond_the_table"]["types"]
    return Support(
        operators=operators,
        beyond={name: frozenset(types) for name, types in beyond.items()},
        refused=frozenset(content["unsupported"]),
        network_types=frozenset(content["network_types"]),
        value_shaped=frozenset(content["value_shaped"]),
        restrictions=content["restrictions"],
        opsets={version: (low, high) for version, (low, high) in about["opsets"].items()},
        source=f"{about['table']['project']} {about['table']['file']}, "
        f"TensorRT {about['table']['tensorrt']}",
    )
