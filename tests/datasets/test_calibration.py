"""The shipped text sets."""

from __future__ import annotations

import json
import shutil
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from jexport import gates
from jexport.datasets import calibration
from jexport.errors import CalibrationError
from jexport.types import Sample

SETS = sorted(path.parent for path in calibration.data_folder().glob("*/set.toml"))
FILES = sorted(path for folder in SETS for path in folder.glob("*.jsonl"))
EVERYDAY = calibration.data_folder() / "everyday"
FOLDERS = sorted(path for path in calibration.data_folder().iterdir() if path.is_dir())


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what is shipped ----------------------------------------------------------------------------


def test_every_folder_is_a_set() -> None:
    assert SETS == FOLDERS
    assert "parity" in {folder.name for folder in SETS}


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_set_toml_is_complete(folder: Path) -> None:
    about = tomllib.loads((folder / "set.toml").read_text(encoding="utf-8"))
    assert set(about) - {"sha256"} == {"name", "description", "licence", "languages"}
    assert about["name"] == folder.name
    assert about["licence"]
    assert about["description"].endswith(".")
    languages = about["languages"]
    assert len(languages) == len(set(languages)) == 30
    assert all(len(code) == 2 and code.islower() for code in languages)
    assert list(folder.glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_text_is_one_of_its_kind_and_normal(path: Path) -> None:
    entries = lines(path)
    keys = {"language", "text"} if path.parent.name == "parity" else {"language", "part", "text"}
    keys |= {"kind"} if path.name == calibration.EVERY else set()
    texts = [entry["text"] for entry in entries]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    folded = Counter(" ".join(text.casefold().split()) for text in texts)
    assert [text for text, count in folded.items() if count > 1] == []
    for entry in entries:
        assert set(entry) == keys
        text = entry["text"]
        assert unicodedata.normalize("NFC", text) == text
        assert text == text.strip() != ""
        shown = text if "part" not in keys else text.replace("\n", " ")  # posts have paragraphs
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn")]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name != calibration.EVERY],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_language_has_as_many_texts_and_several_lengths(path: Path) -> None:
    about = tomllib.loads((path.parent / "set.toml").read_text(encoding="utf-8"))
    for part in {entry.get("part") for entry in lines(path)}:
        counts = Counter(e["language"] for e in lines(path) if e.get("part") == part)
        assert sorted(counts) == sorted(about["languages"])
        assert len(set(counts.values())) == 1
    # A set of several files has the lengths that its tasks have: paraphrases are never long.
    entries = [entry for file in path.parent.glob("*.jsonl") for entry in lines(file)]
    for language in about["languages"]:
        sizes = [len(e["text"].encode()) for e in entries if e["language"] == language]
        assert max(sizes) > 4 * min(sizes), language


def test_every_kind_has_texts_for_both_parts_in_several_languages() -> None:
    about = tomllib.loads((EVERYDAY / "set.toml").read_text(encoding="utf-8"))
    entries = lines(EVERYDAY / calibration.EVERY)
    assert {entry["language"] for entry in entries} <= set(about["languages"])
    kinds = {entry["kind"] for entry in entries}
    assert kinds >= {"dialogue", "aphorism", "title", "code", "table", "address", "mixed"}
    assert kinds >= {"prose", "verse"}
    for kind in kinds:
        own = [entry for entry in entries if entry["kind"] == kind]
        assert Counter(entry["part"] for entry in own)["calibration"] >= 24, kind
        # enough to be held to the gates of a group
        assert Counter(entry["part"] for entry in own)["held_out"] >= gates.GROUP_TEXTS, kind
        for part in ("calibration", "held_out"):
            languages = {entry["language"] for entry in own if entry["part"] == part}
            assert len(languages) > 3 or kind == "code", (kind, part)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_texts_are_in_the_script_of_their_language(path: Path) -> None:
    scripts = {
        "ar": "ARABIC",
        "ur": "ARABIC",
        "bn": "BENGALI",
        "el": "GREEK",
        "hi": "DEVANAGARI",
        "ja": ("HIRAGANA", "KATAKANA", "CJK"),
        "ka": "GEORGIAN",
        "ko": "HANGUL",
        "ru": "CYRILLIC",
        "uk": "CYRILLIC",
        "th": "THAI",
        "zh": "CJK",
    }
    others = Counter()
    for entry in lines(path):
        names = [unicodedata.name(c, "") for c in entry["text"] if c.isalpha()]
        wanted = scripts.get(entry["language"], "LATIN")
        if sum(name.startswith(wanted) for name in names) <= len(names) / 2:
            others[entry["language"]] += 1  # a query may be a command: "git push ..."
    assert not others or (path.stem != "any" and max(others.values()) == 1), others


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the parity set that `read` takes instead of the shipped one."""
    folder = shutil.copytree(calibration.data_folder() / "parity", tmp_path / "parity")
    monkeypatch.setattr(calibration, "data_folder", lambda: tmp_path)
    return Path(folder)


def test_reading_gives_the_lines_in_order(shelf: Path) -> None:
    found = calibration.read("parity", "retrieval.query")
    wanted = [Sample(text=e["text"], language=e["language"]) for e in lines(shelf / "any.jsonl")]
    assert list(found.samples) == wanted
    assert found.name == "parity"
    assert found == calibration.read("parity", "none")


def test_a_tasks_own_file_wins(shelf: Path) -> None:
    entries = lines(shelf / "any.jsonl")
    own = "\n".join(json.dumps({**entry, "text": f"{entry['text']}!"}) for entry in entries)
    (shelf / "separation.jsonl").write_text(own, encoding="utf-8")
    usual, special = calibration.read("parity", "none"), calibration.read("parity", "separation")
    assert special.samples[0].text == f"{usual.samples[0].text}!"
    assert special.sha256 != usual.sha256


@pytest.mark.parametrize("name", ["any.jsonl", "set.toml"])
def test_the_digest_follows_the_files(name: str, shelf: Path) -> None:
    before = calibration.read("parity", "none").sha256
    assert calibration.read("parity", "none").sha256 == before
    content = (shelf / name).read_text(encoding="utf-8")
    changed = content.replace("Bibliothek", "Bücherei", 1) if name == "any.jsonl" else content + "#"
    if changed == content:
        first, rest = content.split('"text": "', 1)
        changed = f'{first}"text": "x{rest}'
    (shelf / name).write_text(changed, encoding="utf-8")
    assert calibration.read("parity", "none").sha256 != before


def test_the_digest_does_not_follow_another_tasks_file(shelf: Path) -> None:
    before = calibration.read("parity", "none").sha256
    shutil.copy(shelf / "any.jsonl", shelf / "separation.jsonl")
    assert calibration.read("parity", "none").sha256 == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"language": "en"}', "line 2"),
        (b'["en", "text"]', "line 2"),
        (b"{", "line 2"),
        (b"", "line 2"),
        (b'{"language": "en", "text": "\xff"}', "any.jsonl"),
    ],
)
def test_a_broken_line_is_named(line: bytes, told: str, shelf: Path) -> None:
    path = shelf / "any.jsonl"
    content = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([content[0], line, *content[1:]]))
    with pytest.raises(CalibrationError, match=told) as caught:
        calibration.read("parity", "none")
    assert caught.value.exit_code == 24


def test_a_set_without_one_of_its_languages_is_refused(shelf: Path) -> None:
    kept = [
        line
        for line in (shelf / "any.jsonl").read_text(encoding="utf-8").splitlines()
        if '"th"' not in line
    ]
    (shelf / "any.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match="th"):
        calibration.read("parity", "none")


def test_an_unknown_set_names_the_nearest() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'parity'"):
        calibration.read("parrity", "none")
