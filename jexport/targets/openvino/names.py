"""Names in a graph that are the same in every build: OpenVINO numbers nodes through the process."""

from __future__ import annotations

import re
from typing import Any

NUMBERED = re.compile(r"[A-Za-z]+_\d+(\.\d+)?")


def settle(graph: Any) -> None:
    """Number the nodes that OpenVINO named itself by their place in this graph.

    Names that came with the graph stay.

    Args:
        graph: an openvino.Model, changed in place.
    """
    graph.set_friendly_name("encoder")
    for place, node in enumerate(graph.get_ordered_ops()):
        if NUMBERED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}/{place}")
    for place, port in enumerate(graph.inputs):
        if any(NUMBERED.fullmatch(name) for name in port.names):
            port.get_tensor().set_names({f"input/{place}"})
