"""Every decision record has a status, and what superseded one is there."""

from __future__ import annotations

import re
from pathlib import Path

DECISIONS = Path(__file__).parents[2] / "DECISIONS.md"
HEADING = re.compile(r"^## (\d{4}-\d\d-\d\d) · (.+)$", re.MULTILINE)
STATUS = re.compile(r"Status: (accepted|accepted; superseded in part by .+|superseded by .+)")


def test_each_record_has_a_status_and_its_successors_are_records() -> None:
    text = DECISIONS.read_text(encoding="utf-8")
    records = list(HEADING.finditer(text))
    titles = {record[2] for record in records}
    dates = [record[1] for record in records]
    assert len(records) > 30
    assert dates == sorted(dates, reverse=True)
    for record in records:
        line = text[record.end() :].lstrip("\n").split("\n\n", 1)[0].replace("\n", " ")
        assert STATUS.fullmatch(line), f"{record[2]}: {line[:80]}"
        assert set(re.findall(r'"([^"]+)"', line)) <= titles, record[2]
