"""page: every number is there, nothing is trusted, and no figure overlaps itself."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from jexport.artifacts.report import findings, page, plots, sections, text

render, in_terminal = page.render, text.render


def parsed(page: str) -> ElementTree.Element:
    """The page as XML: an unescaped character or an open tag is an error here."""
    start, rest = page.split("\n", 1)
    assert start == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def parts(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {str(part.findtext("h2")): part for part in root.iter("section")}


def words(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def table(element: ElementTree.Element) -> list[list[str]]:
    return [[words(cell) for cell in row] for row in element.iter("tr")]


def figure(element: ElementTree.Element, title: str) -> ElementTree.Element:
    [found] = [svg for svg in element.iter("svg") if svg.findtext("title") == title]
    return found


def rules(page: str, selector: str) -> str:
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert selector in style
    return style.split(selector, 1)[1].split("}", 1)[0]


def test_headline_numbers_against_their_gates(
    quantization: Any, parity: Any, manifest: Any
) -> None:
    rows = table(parts(parsed(render(quantization, parity, manifest)))["Against the gates"])
    assert rows[1:] == [
        ["cosine, mean", "0.99670 (gate 0.996: met)", "0.99712 (gate 0.995: met)"],
        ["cosine, 1st percentile", "0.99270 (gate 0.99: met)", "0.99034 (gate 0.985: met)"],
        ["cosine, lowest", "0.98670", "0.98934"],
        ["shared top-10 neighbours", "0.9250 (gate 0.92: met)", "0.9300"],
        ["Spearman of pairwise similarities", "–", "0.99800"],
        ["largest difference of a component", "–", "0.0123"],
        ["token vectors, lowest cosine", "–", "0.97531"],
        ["alone against in a padded batch, lowest cosine", "–", "0.9864200"],
    ]


def test_a_missed_gate_is_said_in_words(quantization: Any, parity: Any, manifest: Any) -> None:
    quantization.update(reached=False, gates={"cosine_mean": 0.9967001, "spearman": 0.9})
    parity.update(gates={"largest_difference": 0.01}, failures=["language 'th': it is < 0.9"])
    page = render(quantization, parity, manifest)
    told = parts(parsed(page))["Against the gates"]
    assert table(told)[1][1] == "0.99670 (gate 0.9967: missed by 1e-07)"  # though it rounds to it
    assert table(told)[5][1] == "– (gate 0.9: not measured)"
    assert table(told)[6][2] == "0.0123 (gate 0.01: missed by 0.0023)"
    bad = [words(e) for e in told.iter() if e.get("class") == "bad"]
    assert len(bad) == 4
    assert bad[-1] == "language 'th': it is < 0.9"
    assert "NOT reached" in words(parsed(page).find(".//header") or ElementTree.Element("x"))
    assert "NOT reached" in in_terminal(quantization, parity, manifest)


def test_the_kept_try_is_the_one_that_the_matrices_are(
    quantization: Any, parity: Any, manifest: Any
) -> None:
    rows = table(parts(parsed(render(quantization, parity, manifest)))["What was tried"])
    assert [row[0] for row in rows[1:]] == ["all int8", "the worst wide (kept)", "all wide"]
    assert rows[2][1:] == ["1", "25.0 %", "0.99670", "0.99270", "0.98670", "0.9250", "yes"]
    quantization["matrices"] = []  # then the last that passed
    rows = table(parts(parsed(render(quantization, parity, manifest)))["What was tried"])
    assert [row[0] for row in rows[1:]] == ["all int8", "the worst wide", "all wide (kept)"]


def test_what_quantize_says_it_chose_goes_before_all(
    quantization: Any, parity: Any, manifest: Any
) -> None:
    quantization["chosen"] = copy.deepcopy(quantization["tried"][2])
    rows = table(parts(parsed(render(quantization, parity, manifest)))["What was tried"])
    assert [row[0] for row in rows[1:]] == ["all int8", "the worst wide", "all wide (kept)"]
    assert "0.99990 >= 0.996" in in_terminal(quantization, parity, manifest)


def test_copies_of_outliers_are_counted(quantization: Any, parity: Any, manifest: Any) -> None:
    def told() -> str:
        return words(parts(parsed(render(quantization, parity, manifest)))["Layer by layer"])

    assert "copies" not in told()
    quantization["copied"] = []
    assert "copies" not in told()
    quantization["copied"] = [{"activation": "layer/0/Gelu", "channels": {"17": 12, "3": 2}}]
    assert "In one activation, outlier channels are split into copies" in told()
    assert "its row of the next weight: 12 copies in all." in told()
    quantization["copied"] *= 2
    assert "In 2 activations" in told()
    assert "24 copies in all." in told()


def test_neighbours_go_by_either_name(quantization: Any, parity: Any, manifest: Any) -> None:
    before = render(quantization, parity, manifest)
    for found in (quantization["gates"], *quantization["tried"], *quantization["curve"]):
        found["overlap"] = found.pop("top10_overlap")
    assert render(quantization, parity, manifest) == before


def test_quality_by_group(made: Any, quantization: Any, parity: Any, manifest: Any) -> None:
    part = parts(parsed(render(quantization, parity, manifest)))["Quality on the parity texts"]
    for name, names in (
        ("language", made.languages),
        ("length in tokens", made.lengths),
        ("Matryoshka dimension", ("32", "64", "384")),
    ):
        drawn = figure(part, f"Cosine by {name}")
        told = [str(label.text) for label in drawn.iter("text")]
        assert set(names) <= set(told), name
        assert len([e for e in drawn.iter("circle")]) == 2 * len(names)
        gates = [e.get("class") for e in drawn.iter("line") if "gate" in str(e.get("class"))]
        assert gates == ["gate cosine_mean", "gate cosine_p1"]
        [rows] = [t for t in map(table, part.iter("table")) if t[0][0] == name]
        assert sorted(row[0] for row in rows[1:]) == sorted(names)
    rows = table(next(iter(part.iter("table"))))
    assert rows[1] == ["ar", "0.99600", "0.98800", "0.98700", "0.9300", "10"]  # worst first
    assert [row[0] for row in rows[1:]] == made.languages
    assert "lowest 1st percentile 0.98800 (ar)" in str(
        figure(part, "Cosine by language").findtext("desc")
    )


def test_one_dimension_is_not_drawn_again(
    made: Any, quantization: Any, parity: Any, manifest: Any
) -> None:
    parity["metrics"]["by_dimension"] = {"384": made.group(0.997, 0.99)}
    assert "Matryoshka" not in render(quantization, parity, manifest)
    assert "dimensions" not in in_terminal(quantization, parity, manifest)


def test_a_better_dot_lies_further_right(quantization: Any, parity: Any, manifest: Any) -> None:
    root = parsed(render(quantization, parity, manifest))
    dots = [e for e in figure(root, "Cosine by language").iter("circle")]
    by_value = sorted(dots, key=lambda e: float(str(e.findtext("title")).split(": ")[1]))
    places = [float(str(e.get("cx"))) for e in by_value]
    assert places == sorted(places)
    assert places[0] < places[-1]


def test_curve(quantization: Any, parity: Any, manifest: Any) -> None:
    quantization["curve"].reverse()  # in whatever order
    part = parts(parsed(render(quantization, parity, manifest)))[
        "Quality against the share at higher precision"
    ]
    cosine = figure(part, "Cosine against the share at higher precision")
    overlap = figure(part, "Shared top-10 neighbours against the share at higher precision")
    for drawn, lines in ((cosine, 2), (overlap, 1)):
        paths = [str(e.get("points")).split() for e in drawn.iter("polyline")]
        assert [len(path) for path in paths] == [11] * lines
        for path in paths:
            across, down = zip(*(map(float, point.split(",")) for point in path), strict=True)
            assert list(across) == sorted(across)
            assert list(down) == sorted(down, reverse=True)  # better is higher
        assert [e.text for e in drawn.iter("text")].count("kept") == 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_curves(count: int, quantization: Any, parity: Any, manifest: Any) -> None:
    quantization["curve"] = quantization["curve"][:count]
    page = render(quantization, parity, manifest)
    drawn = [e for e in parsed(page).iter("svg") if "share at higher" in str(e.findtext("title"))]
    assert len(drawn) == (2 if count else 0)
    assert ("Not measured in this build." in page) == (count == 0)


@pytest.mark.parametrize("count", [1, 20, 21, 300])
def test_matrices(count: int, made: Any, quantization: Any, parity: Any, manifest: Any) -> None:
    quantization["matrices"] = [made.matrix(n, share=1 / count) for n in range(count)]
    part = parts(parsed(render(quantization, parity, manifest)))["Layer by layer"]
    rows = [row for shown in part.iter("table") for row in table(shown)[1:]]
    numbers = [int(re.sub(r"\D", "", row[0])) for row in rows]
    assert numbers == list(range(count))[::-1]  # worst first, every one
    assert len(list(part.iter("details"))) == (count > sections.FIRST_MATRICES)
    last = rows[-1]
    assert last[1:4] == ["int8", "0.03", "0.004"]
    assert last[5:] == [f"{100 / count:.1f} %", "384 × 1152", "0.85", "0.97"]
    for drawn in part.iter("svg"):
        before, after = [e for e in drawn.iter("circle")]
        assert float(str(before.get("cx"))) >= float(str(after.get("cx"))), "errors went down"
    told = in_terminal(quantization, parity, manifest)
    assert len(told.splitlines()) <= text.LINES


def test_share_of_each_precision(made: Any, quantization: Any, parity: Any, manifest: Any) -> None:
    quantization["matrices"].append(made.matrix(4, "int4", share=0.5))
    assert findings.layer_precisions(quantization) == [
        ("int8", 3, 0.75),
        ("int8x2", 1, 0.25),
        ("int4", 1, 0.5),
    ]
    part = parts(parsed(render(quantization, parity, manifest)))["How the work is done"]
    drawn = figure(part, "Share of the multiply-adds by precision")
    widths = [float(str(e.get("width"))) for e in drawn.iter("rect")]
    assert widths == pytest.approx([plots.WIDTH * x for x in (0.5, 1 / 6, 1 / 3)], abs=0.01)
    assert len([e for e in part.iter("li")]) == 3
    assert "3 layers, 75.0 % of the multiply-adds" in words(part)


def test_size_and_speed(quantization: Any, parity: Any, manifest: Any) -> None:
    part = parts(parsed(render(quantization, parity, manifest)))["Quality, size and speed"]
    assert table(part)[1:] == [
        ["fp32", "90.0 MiB", "103.2 texts/s", "–"],
        ["int8", "23.0 MiB (25.6 % of fp32)", "241.8 texts/s (2.34 times fp32)", "0.99712"],
    ]
    bars = [e for e in figure(part, "Size in MiB by precision").iter("rect")]
    lengths = [float(str(e.get("width"))) for e in bars]
    assert lengths[1] / lengths[0] == pytest.approx(23 / 90, abs=0.01)
    del manifest["speed"]
    page = render(quantization, parity, manifest)
    assert "texts/s" not in page
    assert "Texts per second" not in page
    assert "23.0 MiB (25.6 % of fp32)" in page
    quantization["precision"] = "int8-weights"
    assert "int8-weights     23.0 MiB" in in_terminal(quantization, parity, manifest)


def test_texts_used_and_the_command(quantization: Any, parity: Any, manifest: Any) -> None:
    found = parts(parsed(render(quantization, parity, manifest)))
    assert table(found["Texts used"])[1:] == [
        ["calibration", "none", "300", "20,310", "a" * 64],
        ["held out, to choose by", "none, held out", "60", "4,001", "b" * 64],
        ["parity", "parity", "289", "–", "c" * 64],
    ]
    assert words(found["Build it again"]).endswith(quantization["command"])


EVIL = "</script><script>alert('x')</script>\"&amp;\x1b[31m\x00\ud800"


def poisoned(value: Any) -> Any:
    """The same with markup, quotes and control characters in every string."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_nothing_is_trusted(more: Any, parity: Any, manifest: Any) -> None:
    quantization = more
    metrics = parity["metrics"]
    for key in ("by_language", "by_length", "by_dimension"):
        metrics[key] = {name + EVIL: found for name, found in metrics[key].items()}
    parity["failures"] = ["failure"]
    quantization["bytes"] = {name + EVIL: size for name, size in quantization["bytes"].items()}
    everything = [poisoned(part) for part in (quantization, parity, manifest)]
    page = render(*everything)
    root = parsed(page)
    assert not [e for e in root.iter() if e.tag in ("script", "link", "img", "iframe", "object")]
    assert not [
        k for e in root.iter() for k in e.attrib if k.startswith("on") or k in ("src", "href")
    ]
    assert "<script" not in page
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", in_terminal(*everything))
    page.encode()
    assert "alert('x')" in words(root)  # shown, as text
    collisions(root)


def test_a_text_is_no_template(quantization: Any, parity: Any, manifest: Any) -> None:
    manifest["name"] = "{{ 7 * 7 }}{% raw %}"
    assert "{{ 7 * 7 }}{% raw %}" in words(parsed(render(quantization, parity, manifest)))


def test_it_needs_nothing_from_elsewhere(quantization: Any, parity: Any, manifest: Any) -> None:
    page = render(quantization, parity, manifest)
    assert not re.search(r"https?:|//|url\(|@import|@font-face|<script", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "overflow-x: auto" in rules(page, ".wide {")


def test_who_cannot_see_it(quantization: Any, parity: Any, manifest: Any) -> None:
    root = parsed(render(quantization, parity, manifest))
    assert root.get("lang") == "en"
    for svg in root.iter("svg"):
        if svg.get("aria-hidden") != "true":
            assert svg.get("role") == "img"
            assert [child.tag for child in svg][:2] == ["title", "desc"]
            assert svg.findtext("title")
            assert svg.findtext("desc")
    for shown in root.iter("table"):
        heads, *rows = shown.iter("tr")
        assert all(e.tag == "th" and e.get("scope") == "col" and words(e) for e in heads)
        for row in rows:
            assert len(row) == len(heads)
            assert (row[0].tag, row[0].get("scope")) == ("th", "row")
    for region in root.iter("div"):
        if region.get("class") == "wide":
            assert region.get("aria-label")
            assert region.get("tabindex") == "0"  # the keyboard scrolls it


def test_colours_differ_enough_from_what_they_lie_on(
    quantization: Any, parity: Any, manifest: Any
) -> None:
    """WCAG 2.2 contrast: 4.5 for words, 3 for what is drawn; in light and in dark."""
    [style] = re.findall(r"<style>(.*?)</style>", render(quantization, parity, manifest), re.S)

    def light(colour: str) -> float:
        full = colour * 2 if len(colour) == 3 else colour
        parts = [int(full[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = [dict(re.findall(r"--(\w+): #(\w+)", block)) for block in style.split("@media")[:2]]
    assert all(len(colours) == 11 for colours in found), found
    for colours in found:
        for name, least in (
            ("ink", 4.5),
            ("dim", 4.5),
            ("good", 4.5),
            ("bad", 4.5),
            ("one", 3),
            ("two", 3),
            ("three", 3),
            ("four", 3),
        ):
            bright, dark = sorted((light(colours[name]), light(colours["ground"])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= least, (name, colours[name])


def boxes(svg: ElementTree.Element) -> Iterator[tuple[float, float, float, float, str]]:
    """Left, top, right, bottom and words of every label, at 6.1 units a letter and 10 high."""
    for label in svg.iter("text"):
        told = label.text or ""
        width = 6.1 * sum(2 if ord(letter) > 0x2E7F else 1 for letter in told)
        shift = {"start": 0.0, "middle": width / 2, "end": width}[str(label.get("text-anchor"))]
        left, base = float(str(label.get("x"))) - shift, float(str(label.get("y")))
        yield left, base - 8, left + width, base + 2, told


def collisions(root: ElementTree.Element) -> None:
    """Assert that no label leaves its figure or meets another, and nothing drawn leaves it."""
    for svg in root.iter("svg"):
        _, _, width, height = map(float, str(svg.get("viewBox")).split())
        labels = list(boxes(svg))
        for left, top, right, bottom, told in labels:
            assert left >= 0, told
            assert right <= width + 0.5, told
            assert top >= 0, told
            assert bottom <= height + 0.1, told
        for one, other in combinations(labels, 2):
            apart = (
                one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            )
            assert apart, (svg.findtext("title"), one, other)
        for shape in svg.iter():
            for key, most in (
                ("cx", width),
                ("x1", width),
                ("x2", width),
                ("cy", height),
                ("y1", height),
                ("y2", height),
            ):
                value = float(shape.get(key, 0))
                assert 0 <= value <= most, (svg.findtext("title"), shape.tag, key, value)
            if shape.tag == "rect":
                assert float(shape.get("x", 0)) + float(str(shape.get("width"))) <= width + 0.5


def test_both_sets_of_texts_by_group(more: Any, parity: Any, manifest: Any, made: Any) -> None:
    found = parts(parsed(render(more, parity, manifest)))
    for section, first in (("held-out", "0.99650"), ("parity", "0.99600")):
        part = found[f"Quality on the {section} texts"]
        assert [str(svg.findtext("title")) for svg in part.iter("svg")] == [
            f"Cosine by {by}" for by in ("language", "length in tokens", "Matryoshka dimension")
        ]
        rows = table(next(iter(part.iter("table"))))
        assert (rows[1][0], rows[1][1], len(rows)) == ("ar", first, len(made.languages) + 1)
    gates = figure(found["Quality on the held-out texts"], "Cosine by language")
    assert len([e for e in gates.iter("line") if "gate" in str(e.get("class"))]) == 2
    rows = table(found["Against the gates"])
    [row] = [row for row in rows if row[0].startswith("loss of the worst language")]
    assert row[1:] == ["1.62", "–"]
    assert ["Spearman of pairwise similarities", "0.99800", "0.99800"] in rows


def test_queries_and_passages_together(more: Any, parity: Any, manifest: Any) -> None:
    told = parts(parsed(render(more, parity, manifest)))["Queries and passages together"]
    assert "retrieval.passage" in words(told)
    assert table(told) == [
        ["searched with, and in", "top-10 overlap"],
        ["int8 queries, int8 passages", "0.9541"],
        ["int8 queries, fp32 passages", "0.9612"],
        ["fp32 queries, int8 passages", "0.9603"],
    ]
    more["pair"]["queries_int8_passages_fp32"]["ndcg10"] = 0.875
    told = parts(parsed(render(more, parity, manifest)))["Queries and passages together"]
    assert [row[1:] for row in table(told)] == [
        ["top-10 overlap", "nDCG@10"],
        ["0.9541", "–"],
        ["0.9612", "0.8750"],
        ["0.9603", "–"],
    ]
    more["pair"] = None
    assert "together" not in render(more, parity, manifest)


def test_speed_that_quantize_measured(more: Any, parity: Any, manifest: Any) -> None:
    del manifest["speed"]
    told = parts(parsed(render(more, parity, manifest)))["Quality, size and speed"]
    assert [row[::2] for row in table(told)[1:]] == [
        ["fp32", "100 texts/s"],
        ["fp16", "71.3 texts/s (0.71 times fp32)"],
        ["int8", "300 texts/s (3.00 times fp32)"],
    ]
    assert len(list(figure(told, "Texts per second by precision").iter("rect"))) == 3


def test_techniques_stand_beside_the_curve(more: Any, parity: Any, manifest: Any) -> None:
    part = parts(parsed(render(more, parity, manifest)))[
        "Quality against the share at higher precision"
    ]
    assert table(part)[2] == [
        "2. round to nearest",
        "0.0 %",
        "0.99210",
        "0.98810",
        "0.98210",
        "0.9020",
    ]
    assert len(table(part)) == 5
    for title in ("Cosine", "Shared top-10 neighbours"):
        drawn = figure(part, f"{title} against the share at higher precision")
        diamonds = list(drawn.iter("polygon"))
        told = sorted(str(e.findtext("title")) for e in diamonds)
        assert told[1] == "2: round to nearest"
        numbers = [e for e in drawn.iter("text") if e.get("class") == "mark"]
        assert sorted(str(e.text) for e in numbers) == ["1", "2", "3", "4"]
        heights = {
            str(e.findtext("title"))[0]: float(str(e.get("points")).split(",")[1].split()[0])
            for e in diamonds
        }
        assert heights["1"] > heights["2"] > heights["3"] > heights["4"]  # better is higher
    assert "stretches towards 1" in words(part)
    collisions(part)


@pytest.mark.parametrize("count", [1, 12, 40])
def test_many_techniques_of_one_quality(
    count: int, more: Any, parity: Any, manifest: Any, made: Any
) -> None:
    more["techniques"] = [made.attempt("x" * 200, [], 0.0, 0.99, False) for _ in range(count)]
    root = parsed(render(more, parity, manifest))
    collisions(root)
    drawn = figure(root, "Cosine against the share at higher precision")
    assert len(list(drawn.iter("polygon"))) == count
    more["curve"] = []
    collisions(parsed(render(more, parity, manifest)))


def test_what_is_left_in_float_is_counted(more: Any, parity: Any, manifest: Any) -> None:
    rows = table(parts(parsed(render(more, parity, manifest)))["What was tried"])
    assert rows[0][1:4] == ["layers at higher precision", "in float", "share"]
    assert [row[2] for row in rows[1:]] == ["1", "1", "1"]
    more["matrices"][3]["treatment"] = "int8x2"
    more["matrices"][0].update(treatment="float", name="encoder/layer/9/MatMul")
    rows = table(parts(parsed(render(more, parity, manifest)))["What was tried"])
    assert [row[0] for row in rows[1:]] == ["all int8", "the worst wide (kept)", "all wide"]


SPREADS = (1.0, 0.3, 0.05, 0.011, 0.0011, 3e-5, 1e-12, 0.0)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("top", [1.0, 0.99987, 0.5])
def test_no_label_meets_another(
    spread: float, top: float, made: Any, quantization: Any, parity: Any, manifest: Any
) -> None:
    metrics = parity["metrics"]
    for key in ("by_language", "by_length", "by_dimension"):
        for number, name in enumerate(metrics[key]):
            metrics[key][name] = made.group(top - spread * number / 40, top - spread * number / 31)
    metrics["by_language"]["a-language-of-a-very-long-name"] = made.group(top, top - spread)
    metrics["by_language"]["とても長い名前の言語"] = made.group(top, top - spread)
    for number, row in enumerate(quantization["curve"]):
        row.update(cosine_mean=top - spread / (number + 1), cosine_p1=top - spread)
    parity["gates"] = {}
    for gates in ({}, {"cosine_mean": top - 0.01, "cosine_p1": top - 0.02, "overlap": 0.5}):
        quantization["gates"] = gates
        collisions(parsed(render(quantization, parity, manifest)))


def test_few_groups_with_short_names(
    made: Any, quantization: Any, parity: Any, manifest: Any
) -> None:
    parity["metrics"]["by_language"] = {"x": made.group(0.99, 0.98)}
    parity["metrics"]["by_length"] = {"1": made.group(0.99, 0.99)}
    collisions(parsed(render(quantization, parity, manifest)))


@pytest.mark.parametrize("kept", [0.0, 0.49, 0.5, 1.0])
def test_where_the_kept_line_may_stand(
    kept: float, made: Any, quantization: Any, parity: Any, manifest: Any
) -> None:
    quantization["tried"] = [made.attempt("it", [], kept, 0.997, True)]
    collisions(parsed(render(quantization, parity, manifest)))


def test_any_part_may_be_missing(more: Any, parity: Any, manifest: Any) -> None:
    render({}, {}, {})
    in_terminal({}, {}, {})
    whole = {"quantization": more, "parity": parity, "manifest": manifest}
    whole["metrics"] = parity["metrics"]
    for part, content in whole.items():
        for key in list(content):
            for instead in ("gone", None, [], {}, "?", 0):
                fewer = copy.deepcopy({k: v for k, v in whole.items() if k != "metrics"})
                changed = fewer["parity"]["metrics"] if part == "metrics" else fewer[part]
                changed[key] = instead
                if instead == "gone":
                    del changed[key]
                root = parsed(render(**fewer))
                collisions(root)
                assert len(in_terminal(**fewer).splitlines()) <= text.LINES


def test_any_number_may_be_missing(quantization: Any, parity: Any, manifest: Any) -> None:
    rows = [
        *quantization["tried"],
        *quantization["curve"],
        *quantization["matrices"],
        quantization["calibration"],
        quantization["held_out"],
        *manifest["speed"],
        *parity["metrics"]["by_language"].values(),
        parity["metrics"]["overall"],
    ]
    for key in sorted({key for row in rows for key in row}):
        kept = [(row, row[key]) for row in rows if key in row]
        numbers = all(isinstance(value, int | float) for _, value in kept)
        for instead in (None, True, float("nan")) if numbers else (None, True):
            for row, _ in kept:
                row[key] = instead
            root = parsed(render(quantization, parity, manifest))
            assert "nan" not in words(root)
            in_terminal(quantization, parity, manifest)
        for row, value in kept:
            row[key] = value


def test_errors_of_zero(quantization: Any, parity: Any, manifest: Any) -> None:
    for found in quantization["matrices"]:
        found["error"] = 0.0
    collisions(parsed(render(quantization, parity, manifest)))
    for found in quantization["matrices"]:
        found["error_naive"] = 0.0
    collisions(parsed(render(quantization, parity, manifest)))
