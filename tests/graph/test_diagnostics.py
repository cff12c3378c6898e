"""Findings: one a kind, in a fixed order, and the error made of them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jexport.errors import UnsupportedGraphError
from jexport.graph.diagnostics import Diagnostic, errors, merge_by_kind, raise_for_errors


def diagnostic(**changes: Any) -> Diagnostic:
    plain = {
        "rule": "operator",
        "severity": "error",
        "node": "n0",
        "operator": "Det",
        "what": "no Det",
        "evidence": "the table",
        "fix": "do without",
    }
    return Diagnostic(**{**plain, **changes})


def test_one_a_kind_with_count_and_first_nodes() -> None:
    many = [diagnostic(node=f"n{number}", evidence=f"e{number}") for number in range(1000)]
    (one,) = merge_by_kind(many)
    assert (one.count, one.node) == (1000, "n0")
    assert one.evidence == "e0\n1000 nodes; also n1, n2, n3 and 996 more"
    assert one.to_text() == f"error: no Det (node n0) [operator]\n  e0\n  {one.evidence[3:]}\n" + (
        "  fix: do without"
    )
    (two,) = merge_by_kind(many[:2])
    assert two.evidence == "e0\n2 nodes; also n1"
    assert merge_by_kind([many[0], many[0]])[0].evidence == "e0"
    assert merge_by_kind([]) == []


def test_errors_come_first_and_the_order_is_fixed() -> None:
    kinds = [
        diagnostic(rule=rule, severity=severity, what=what)
        for rule in ("a", "b")
        for severity in ("warning", "error")
        for what in ("x", "y")
    ]
    wanted = merge_by_kind(kinds)
    assert [one.severity for one in wanted] == ["error"] * 4 + ["warning"] * 4
    assert [(one.rule, one.what) for one in wanted[:4]] == [
        ("a", "x"),
        ("a", "y"),
        ("b", "x"),
        ("b", "y"),
    ]
    for seed in range(20):
        random.Random(seed).shuffle(kinds)
        assert merge_by_kind(kinds) == wanted
    assert errors(wanted) == wanted[:4]


def test_refusing() -> None:
    raise_for_errors([])
    raise_for_errors([diagnostic(severity="warning")])
    with pytest.raises(UnsupportedGraphError) as caught:
        raise_for_errors([diagnostic(), diagnostic(severity="warning")])
    assert str(caught.value) == "no Det (node n0)\n  the table\n  fix: do without"
    kinds = [diagnostic(what=f"no {n}", node="", count=n + 1) for n in range(15)]
    with pytest.raises(UnsupportedGraphError) as caught:
        raise_for_errors(kinds, shown=3)
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
