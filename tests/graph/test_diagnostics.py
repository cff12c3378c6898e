"""Findings: one a kind, in a fixed order, and the error made of them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jexport.errors import UnsupportedGraphError
from jexport.graph.diagnostics import Finding, errors, merged, refuse


def finding(**changes: Any) -> Finding:
    plain = {
        "rule": "operator",
        "severity": "error",
        "node": "n0",
        "operator": "Det",
        "what": "no Det",
        "evidence": "the table",
        "fix": "do without",
    }
    return Finding(**{**plain, **changes})


def test_one_a_kind_with_count_and_first_nodes() -> None:
    many = [finding(node=f"n{number}", evidence=f"e{number}") for number in range(1000)]
    (one,) = merged(many)
    assert (one.count, one.node) == (1000, "n0")
    assert one.evidence == "e0\n1000 nodes; also n1, n2, n3 and 996 more"
    assert one.text() == f"error: no Det (node n0) [operator]\n  e0\n  {one.evidence[3:]}\n" + (
        "  fix: do without"
    )
    (two,) = merged(many[:2])
    assert two.evidence == "e0\n2 nodes; also n1"
    assert merged([many[0], many[0]])[0].evidence == "e0"
    assert merged([]) == []


def test_errors_come_first_and_the_order_is_fixed() -> None:
    kinds = [
        finding(rule=rule, severity=severity, what=what)
        for rule in ("a", "b")
        for severity in ("warning", "error")
        for what in ("x", "y")
    ]
    wanted = merged(kinds)
    assert [one.severity for one in wanted] == ["error"] * 4 + ["warning"] * 4
    assert [(one.rule, one.what) for one in wanted[:4]] == [
        ("a", "x"),
        ("a", "y"),
        ("b", "x"),
        ("b", "y"),
    ]
    for seed in range(20):
        random.Random(seed).shuffle(kinds)
        assert merged(kinds) == wanted
    assert errors(wanted) == wanted[:4]


def test_refusing() -> None:
    refuse([])
    refuse([finding(severity="warning")])
    with pytest.raises(UnsupportedGraphError) as caught:
        refuse([finding(), finding(severity="warning")])
    assert str(caught.value) == "no Det (node n0)\n  the table\n  fix: do without"
    kinds = [finding(what=f"no {n}", node="", count=n + 1) for n in range(15)]
    with pytest.raises(UnsupportedGraphError) as caught:
        refuse(kinds, shown=3)
    lines = str(caught.value).splitlines()
    assert lines == [
        "no 0, and 14 more kinds of trouble",
        "  the table",
        "  no 1, 2 times",
        "    the table",
        "  no 2, 3 times",
        "    the table",
        "  and 12 more kinds",
        "  fix: do without",
    ]
