"""Texts to calibrate on and texts held out, of a shipped set, a folder or a file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from jexport.datasets import calibration, sampling
from jexport.errors import CalibrationError
from jexport.tasks import JINA_V3_PROMPTS
from jexport.types import CalibrationSet, Sample

TASKS = tuple(JINA_V3_PROMPTS)
EVERYDAY = calibration.data_folder() / "everyday"


def texts(found: CalibrationSet) -> list[str]:
    return [sample.text for sample in found.samples]


def write(path: Path, entries: Iterable[object]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return str(path)


def words(count: int, *, start: int = 0) -> list[str]:
    return [f"text {number}" for number in range(start, start + count)]


def parted(calibrate: int, held_out: int, *, word: str = "text") -> list[dict[str, str]]:
    marks = ["calibration"] * calibrate + ["held_out"] * held_out
    return [{"text": f"{word} {number}", "part": part} for number, part in enumerate(marks)]


def refused(source: str, task: str = "none") -> str:
    """The error's text, known to have its three parts."""
    with pytest.raises(CalibrationError) as caught:
        calibration.parts(source, task)
    error = caught.value
    assert error.what
    assert error.evidence
    assert error.fix
    assert error.exit_code == 24
    return str(error)


# --- the shipped set ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_own_texts_in_thirty_languages(task: str) -> None:
    found = calibration.parts("everyday", task)
    for part, own, kinds in ((found.calibration, 210, 249), (found.held_out, 90, 83)):
        assert part.name == "everyday"
        assert len([sample for sample in part.samples if not sample.kind]) == own
        assert len([sample for sample in part.samples if sample.kind]) == kinds
        assert len({sample.language for sample in part.samples if not sample.kind}) == 30
    for name in (f"{task}.jsonl", "every.jsonl"):
        lines = [json.loads(line) for line in (EVERYDAY / name).open(encoding="utf-8")]
        held_out = {e["text"] for e in lines if e["part"] == "held_out"}
        assert held_out < set(texts(found.held_out))


def test_no_text_of_any_task_is_held_out_and_calibrated_on_or_compared_with() -> None:
    every = [calibration.parts("everyday", task) for task in TASKS]
    calibrated = {text for found in every for text in texts(found.calibration)}
    held_out = {text for found in every for text in texts(found.held_out)}
    assert len(calibrated) == 5 * 210 + 249
    assert len(held_out) == 5 * 90 + 83
    compared = set(texts(calibration.read("parity", "none")))
    assert not calibrated & held_out
    assert not (calibrated | held_out) & compared


def test_without_a_task_all_files_come_in_turn() -> None:
    task_of = {
        sample.text: "every task" if sample.kind else task
        for task in TASKS
        for part in [calibration.parts("everyday", task)]
        for sample in [*part.calibration.samples, *part.held_out.samples]
    }
    found = calibration.parts("everyday", "none")
    assert len(found.calibration.samples) == 5 * 210 + 249
    assert len(found.held_out.samples) == 5 * 90 + 83
    for length in (5, 30, 100, 333):
        counts = Counter(task_of[text] for text in texts(found.calibration)[:length])
        assert len(counts) == 5
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len({sample.language for sample in found.calibration.samples[:150]}) == 30
    # One text a language, as `sample` takes them, is not of one task either.
    first = {
        sample.language: sample.text
        for sample in reversed(found.calibration.samples)
        if not sample.kind
    }
    assert set(Counter(task_of[text] for text in first.values()).values()) == {6}
    assert found == calibration.parts("everyday", "none")


def test_a_text_a_language_differs_by_task_where_files_list_languages_one_after_another() -> None:
    found = calibration.parts("everyday", "none").calibration
    ids, _ = sampling.sample(
        found, lambda batch: [[hash(text)] for text in batch], count=40, max_tokens=9
    )
    separation = calibration.parts("everyday", "separation").calibration.samples
    own = {hash(sample.text) for sample in separation if not sample.kind}
    assert sum(one[0] in own for one in ids) == 6  # of 30; the other ten are one of each kind


@pytest.mark.parametrize("task", [TASKS[0], "none"])
def test_every_kind_is_calibrated_on_where_not_all_texts_are(task: str) -> None:
    found = calibration.parts("everyday", task).calibration
    kinds = {sample.kind for sample in found.samples if sample.kind}
    taken = Counter(sample.kind for sample in sampling.by_language(found.samples)[:120])
    assert {kind for kind in taken if kind} == kinds
    assert min(taken[kind] for kind in kinds) == 3
    assert taken[""] == 90  # three of each language


def test_texts_for_every_task_come_beside_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    write(folder / "separation.jsonl", parted(32, 8))
    verses = [{**one, "kind": "verse"} for one in parted(4, 4, word="verse")]
    write(folder / "every.jsonl", verses)
    found = calibration.parts(str(folder), "separation")
    assert len(found.calibration.samples) == 36
    assert [sample.kind for sample in found.held_out.samples].count("verse") == 4
    assert calibration.parts(str(folder), "none").calibration.samples
    write(folder / "any.jsonl", parted(40, 8, word="any"))
    assert len(calibration.parts(str(folder), "classification").calibration.samples) == 44
    write(folder / "every.jsonl", [{**one, "kind": 3} for one in verses])
    assert "no string as its kind" in refused(str(folder), "separation")


def test_the_parity_set_is_not_for_calibration() -> None:
    assert "'parity' is not for calibration" in refused("parity")


def test_the_digest_in_set_toml_holds() -> None:
    assert "sha256" in calibration._about(EVERYDAY)  # raises where it does not hold


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EVERYDAY, tmp_path / "everyday"))


@pytest.mark.parametrize("change", ["append", "remove", "add"])
def test_a_changed_file_is_told_with_both_digests(change: str, copy: Path) -> None:
    other = copy / "separation.jsonl"
    if change == "append":
        other.write_bytes(other.read_bytes() + b"\n")
    elif change == "remove":
        other.unlink()
    else:
        write(copy / "more.jsonl", parted(32, 8))
    told = refused(str(copy), "classification")
    stored = calibration._about(EVERYDAY)["sha256"]
    now = calibration._digest(copy, calibration._jsonl(copy))
    assert stored in told
    assert told.count(now) == 2
    about = (copy / "set.toml").read_text(encoding="utf-8")
    (copy / "set.toml").write_text(about.replace(stored, now), encoding="utf-8")
    assert calibration.parts(str(copy), "classification")


def test_read_compares_the_digest_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "data_folder", lambda: copy.parent)
    assert len(calibration.read("everyday", "separation").samples) == 300
    write(copy / "more.jsonl", ["text"])
    with pytest.raises(CalibrationError, match="are not the ones"):
        calibration.read("everyday", "separation")


# --- a file of one's own ------------------------------------------------------------------------


def test_every_fifth_text_is_held_out(tmp_path: Path) -> None:
    found = calibration.parts(write(tmp_path / "mine.jsonl", words(42)), "separation")
    assert texts(found.held_out) == [f"text {number}" for number in range(4, 42, 5)]
    assert texts(found.calibration) == [f"text {n}" for n in range(42) if n % 5 != 4]
    assert found.calibration.name == "mine.jsonl"
    assert {sample.language for sample in found.calibration.samples} == {"und"}


def test_strings_and_objects_may_be_mixed(tmp_path: Path) -> None:
    entries = [*words(39), {"text": "mit Sprache", "language": "de", "id": 7}]
    found = calibration.parts(write(tmp_path / "mine.jsonl", entries), "none")
    assert found.held_out.samples[-1] == Sample(text="mit Sprache", language="de")


def test_a_text_file_has_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.TXT"
    lines = ["{not json}", "  ", *words(39), ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = calibration.parts(str(path), "none")
    assert texts(found.calibration)[:2] == ["{not json}", "text 0"]
    assert len(found.calibration.samples) + len(found.held_out.samples) == 40


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(["one\u2028line\x85only", *words(39)]), encoding="utf-8")
    assert texts(calibration.parts(str(path), "none").calibration)[0] == "one\u2028line\x85only"


def test_the_parts_of_the_lines_are_kept(tmp_path: Path) -> None:
    found = calibration.parts(write(tmp_path / "mine.jsonl", parted(33, 9)), "none")
    assert texts(found.calibration) == [f"text {number}" for number in range(33)]
    assert texts(found.held_out) == [f"text {number}" for number in range(33, 42)]


def test_a_text_counts_once_however_it_is_spaced_or_composed(tmp_path: Path) -> None:
    again = ["text  0", " text 1", "ｔｅｘｔ 2", "text 3"]
    found = calibration.parts(write(tmp_path / "mine.jsonl", [*words(41), *again]), "none")
    whole = calibration.parts(write(tmp_path / "whole.jsonl", words(41)), "none")
    assert found.calibration.samples == whole.calibration.samples
    assert found.held_out.samples == whole.held_out.samples


def test_blank_texts_are_no_texts(tmp_path: Path) -> None:
    entries = ["", " ", {"text": "\n"}, *words(40)]
    found = calibration.parts(write(tmp_path / "mine.jsonl", entries), "none")
    assert len(found.held_out.samples) == 8
    assert "" not in {text.strip() for text in texts(found.calibration)}


def test_the_digest_is_that_of_the_texts(tmp_path: Path) -> None:
    one = calibration.parts(write(tmp_path / "one.jsonl", words(40)), "none")
    plain = tmp_path / "two.txt"
    plain.write_text("\n".join(words(40)), encoding="utf-8")
    two = calibration.parts(str(plain), "none")
    assert one.calibration.sha256 == two.calibration.sha256 != one.held_out.sha256
    assert len(one.calibration.sha256) == 64
    # The other part may change, the order, a text or a language may not.
    changed = [*words(34), "changed", *words(5, start=35)]
    assert changed.index("changed") % 5 == 4
    other = calibration.parts(write(tmp_path / "one.jsonl", changed), "none")
    assert other.calibration.sha256 == one.calibration.sha256
    assert other.held_out.sha256 != one.held_out.sha256
    swapped = ["text 1", "text 0", *words(38, start=2)]
    tagged = [{"text": "text 0", "language": "en"}, *words(39, start=1)]
    for entries in (swapped, tagged):
        found = calibration.parts(write(tmp_path / "one.jsonl", entries), "none")
        assert found.calibration.sha256 != one.calibration.sha256


# --- a folder of one's own ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "mine"
    for name in ("separation", "any"):
        write(place / f"{name}.jsonl", parted(32, 8, word=name))
    return place


@pytest.mark.parametrize(
    ("task", "file"), [("separation", "separation"), ("classification", "any"), ("none", "any")]
)
def test_a_tasks_own_file_wins_over_any(task: str, file: str, folder: Path) -> None:
    found = calibration.parts(str(folder), task).calibration
    assert found.samples[0].text == f"{file} 0"
    assert found.name == "mine"


def test_none_has_a_file_of_its_own(folder: Path) -> None:
    write(folder / "none.jsonl", parted(32, 8, word="plain"))
    assert texts(calibration.parts(str(folder), "none").calibration)[0] == "plain 0"


def test_files_in_turn_until_the_shorter_ends(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 15)):
        write(tmp_path / "mine" / f"{name}.jsonl", parted(count, 4, word=name))
    (tmp_path / "mine" / ".hidden.jsonl").write_bytes(b"\xff")
    found = calibration.parts(str(tmp_path / "mine"), "none")
    begin = texts(found.calibration)[:6]
    assert begin == ["a 0", "b 0", "b 1", "a 1", "a 2", "b 2"]
    assert texts(found.calibration)[-2:] == ["a 18", "a 19"]
    assert len(found.held_out.samples) == 8


def test_what_one_file_calibrates_on_another_does_not_hold_out(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "a.jsonl", parted(32, 9))
    shared = [{"text": "text 32", "part": "calibration"}, {"text": "text 0", "part": "held_out"}]
    write(tmp_path / "mine" / "b.jsonl", shared)
    found = calibration.parts(str(tmp_path / "mine"), "none")
    assert "text 32" in texts(found.calibration)
    assert texts(found.held_out) == [f"text {number}" for number in range(33, 41)]


def test_a_shipped_name_wins_and_a_path_reaches_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.with_name("everyday"))
    monkeypatch.chdir(folder.parent)
    assert len(calibration.parts("everyday", "separation").held_out.samples) == 90 + 83
    assert len(calibration.parts("./everyday", "separation").held_out.samples) == 8
    monkeypatch.chdir("everyday")
    assert calibration.parts(".", "separation").calibration.name == "everyday"


# --- what is refused ----------------------------------------------------------------------------


def test_the_nearest_shipped_set_is_named() -> None:
    assert "did you mean 'everyday'?" in refused("everyday-set")


@pytest.mark.parametrize("wrong", ["mime.txt", "mine.tx", "mine/clasification.jsonl"])
def test_the_nearest_file_or_folder_is_named(
    wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("mine.txt").touch()
    write(folder / "classification.jsonl", [])
    right = "mine/classification.jsonl" if "/" in wrong else "mine.txt"
    assert f"did you mean '{right}'?" in refused(wrong)


@pytest.mark.parametrize("source", ["", "\0", "a\0/b", "x" * 5000, "gone/folder/"])
def test_a_name_that_cannot_be_is_not_there(source: str) -> None:
    assert "no text set, folder or file" in refused(source)


@pytest.mark.parametrize("name", ["texts.csv", "texts.parquet", "texts.json", "texts.txt.gz", "t"])
def test_another_type_of_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n".join(words(40)), encoding="utf-8")
    told = refused(str(tmp_path / name))
    assert "text files only" in told
    assert ".jsonl" in told
    assert f"'{Path(name).suffix}'" in told


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(words(40)).encode("utf-16"),
        "\n".join(words(40)).encode("utf-16-le"),
        "grüß Gott".encode("latin-1"),
        b"PAR1\x15\x04\x15\x90\xff",
        bytes(1000),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_no_text(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(content)
    assert "text files only, in UTF-8" in refused(str(path))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LONGEST_LINE_CHARS", 100)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*words(40), "x" * 98]), encoding="utf-8")
    assert calibration.parts(str(path), "none")
    path.write_text("\n".join([*words(40), "x" * 101]), encoding="utf-8")
    assert "line 41" in refused(str(path))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:  # root, who runs the tests, may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(calibration, "open", denied, raising=False)
    assert "Permission denied" in refused(write(tmp_path / "texts.jsonl", words(40)))


@pytest.mark.parametrize("content", ["", "\n \n", '""\n'])
def test_an_empty_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content, encoding="utf-8")
    assert "it is empty" in refused(str(path))


def test_an_empty_folder_and_one_of_other_files(tmp_path: Path) -> None:
    assert "no .jsonl file" in refused(str(tmp_path))
    (tmp_path / "texts.csv").touch()
    assert "only: texts.csv" in refused(str(tmp_path))


@pytest.mark.parametrize(("calibrate", "held_out"), [(31, 8), (32, 7), (40, 0), (0, 40)])
def test_too_few_texts_are_counted(calibrate: int, held_out: int, tmp_path: Path) -> None:
    told = refused(write(tmp_path / "mine.jsonl", parted(calibrate, held_out)))
    assert f"{calibrate} to calibrate on (at least 32)" in told
    assert f"{held_out} held out (at least 8)" in told


def test_forty_texts_are_enough_and_repetition_is_not(tmp_path: Path) -> None:
    assert calibration.parts(write(tmp_path / "mine.jsonl", words(40)), "none")
    told = refused(write(tmp_path / "mine.jsonl", words(39) * 3))
    assert "32 to calibrate on" in told
    assert "7 held out" in told


def test_a_folder_for_other_tasks_says_which(folder: Path) -> None:
    (folder / "any.jsonl").rename(folder / "text-matching.jsonl")
    told = refused(str(folder), "classification")
    assert "not for task 'classification'" in told
    assert "it has: separation, text-matching" in told


def test_a_file_named_for_another_task(folder: Path) -> None:
    told = refused(str(folder / "separation.jsonl"), "classification")
    assert "named for separation" in told
    for task in ("separation", "none"):
        assert calibration.parts(str(folder / "separation.jsonl"), task)


def test_a_line_for_another_task(tmp_path: Path) -> None:
    entries = [{"text": text, "task": "separation"} for text in words(40)]
    source = write(tmp_path / "mine.jsonl", entries)
    assert "line 1 is for 'separation'" in refused(source, "classification")
    assert calibration.parts(source, "separation")
    assert calibration.parts(source, "none")


@pytest.mark.parametrize("tasks", ['["separation", "text-matching"]', '"separation"', "[]"])
def test_a_set_toml_for_other_tasks(tasks: str, folder: Path) -> None:
    (folder / "set.toml").write_text(f"tasks = {tasks}\n", encoding="utf-8")
    told = refused(str(folder), "classification")
    assert "not for task 'classification'" in told
    assert "set.toml: tasks = " in told
    if "matching" in tasks:
        assert calibration.parts(str(folder), "separation")
        assert calibration.parts(str(folder), "none")


@pytest.mark.parametrize("content", [b"tasks = [", b"\xff"])
def test_a_broken_set_toml(content: bytes, folder: Path) -> None:
    (folder / "set.toml").write_bytes(content)
    assert "set.toml" in refused(str(folder), "separation")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("5", "no string as its text"),
        ("null", "no string as its text"),
        ('["a", "b"]', "no string as its text"),
        ('{"text": 5}', "no string as its text"),
        ('{"texts": "a"}', "no string as its text"),
        ('{"text": "a", "language": null}', "no string as its language"),
        ('{"text": "a \\ud800"}', "half a character in its text"),
        ("a text", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"text": "a", "part": "train"}', "unknown part, 'train'"),
        ('{"text": "a", "part": null}', "unknown part, None"),
        ('{"text": "a", "part": ["held_out"]}', "unknown part, ['held_out']"),
        ('{"text": "a", "part": "held_out"}', "line 1 has no part"),
    ],
)
def test_a_broken_line_is_named(line: str, told: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "mine.jsonl", words(40)))
    content = path.read_text(encoding="utf-8").split("\n", 2)
    path.write_text("\n".join([content[0], "", line, content[2]]), encoding="utf-8")
    found = refused(str(path))
    assert told in found
    assert "line 3" in found
    assert len(found) < 500


def test_a_line_without_a_part_among_others_that_have_one(tmp_path: Path) -> None:
    told = refused(write(tmp_path / "mine.jsonl", [*parted(32, 8), "one more"]))
    assert "line 41 has no part" in told


def test_the_same_text_in_both_parts(tmp_path: Path) -> None:
    entries = [*parted(32, 8), {"text": " text  3", "part": "held_out"}]
    told = refused(write(tmp_path / "mine.jsonl", entries))
    assert "in both parts" in told
    assert "line 4 (calibration) and line 41 (held_out)" in told
