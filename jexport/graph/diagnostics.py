"""Diagnostics of a lint, and the error made of them; knows no engine and no rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jexport.errors import UnsupportedGraphError

ERROR, WARNING = "error", "warning"
SHOWN_NODES = 4
SHOWN_DIAGNOSTICS = 10


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One kind of trouble: where it is first, what shows it, and the way out.

    Args:
        rule: name of the rule that it breaks.
        severity: 'error' (the engine refuses the graph, or would compute something else) or
            'warning'.
        node: the first node it was found at, '' for the graph itself.
        operator: of that node.
        what: happened.
        evidence: that shows it.
        fix: the way out.
        count: at how many nodes.
    """

    rule: str
    severity: str
    node: str
    operator: str
    what: str
    evidence: str
    fix: str
    count: int = 1

    def to_text(self) -> str:
        """Three parts: what happened, the evidence, the way out."""
        lines = [f"{self.severity}: {self.headline()} [{self.rule}]"]
        lines += [f"  {line}" for line in self.evidence.splitlines()]
        return "\n".join([*lines, f"  fix: {self.fix}"])

    def headline(self) -> str:
        """What happened, with the first node."""
        return f"{self.what} (node {self.node})" if self.node else self.what


def errors(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Those for which a graph is refused.

    Args:
        diagnostics: of a lint.

    Returns:
        Those of the severity 'error', in the same order.
    """
    return [one for one in diagnostics if one.severity == ERROR]


def merge_by_kind(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """One of each kind, with its count and first nodes.

    Args:
        diagnostics: of a lint, one per node.

    Returns:
        Errors first, then by rule and text.
    """
    kinds: dict[tuple[str, ...], list[Diagnostic]] = {}
    for one in diagnostics:
        kinds.setdefault((one.severity, one.rule, one.what, one.operator, one.fix), []).append(one)
    return [_merge(kinds[key]) for key in sorted(kinds)]


def _merge(same: Sequence[Diagnostic]) -> Diagnostic:
    first, count = same[0], sum(one.count for one in same)
    others = list(dict.fromkeys(one.node for one in same if one.node and one.node != first.node))
    if not others:
        return replace(first, count=count)
    shown = ", ".join(others[: SHOWN_NODES - 1])
    rest = len(others) - len(others[: SHOWN_NODES - 1])
    more = f" and {rest} more" if rest else ""
    evidence = f"{first.evidence}\n{len(others) + 1} nodes; also {shown}{more}"
    return replace(first, count=count, evidence=evidence)


def raise_for_errors(diagnostics: Sequence[Diagnostic], *, shown: int = SHOWN_DIAGNOSTICS) -> None:
    """Refuse a graph with an error.

    Args:
        diagnostics: of a lint.
        shown: how many kinds the message tells; it has the count of all.

    Raises:
        UnsupportedGraphError: one of them is an error.
    """
    bad = errors(diagnostics)
    if not bad:
        return
    first, rest = bad[0], bad[1:]
    what = first.headline()
    if rest:
        what += f", and {len(rest)} more kind{'s' if len(rest) > 1 else ''} of trouble"
    lines = [first.evidence]
    for one in rest[: shown - 1]:
        times = f", {one.count} times" if one.count > 1 else ""
        lines.append(f"{one.headline()}{times}\n  {one.evidence.splitlines()[0]}")
    if len(bad) > shown:
        lines.append(f"and {len(bad) - shown} more kinds")
    raise UnsupportedGraphError(what, evidence="\n".join(lines), fix=first.fix)
