"""calibration_data/ -> CalibrationSet: texts by task and language.

A set is a folder with set.toml and one <task>.jsonl a task; any.jsonl serves the tasks without a
file of their own, ALIKE says which others do, and every.jsonl has texts for each task beside those.
Each line is {"language": ..., "text": ...}, and in a set for calibration also
{"part": "calibration" | "held_out"}: `parts` keeps the two apart. Texts of a "kind" are a group of
their own, beside their language's. Where set.toml has `sha256`, it is the digest of all the .jsonl
files. Knows no tokenizer: selection.py measures and chooses.
"""

from __future__ import annotations

import itertools
import json
import os
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import file_digest, sha256_of
from jexport.datasets.sampling import by_language
from jexport.errors import CalibrationError, nearest
from jexport.tasks import JINA_V3_PROMPTS, NONE
from jexport.types import CalibrationSet, Sample

LEAST_TO_CALIBRATE_ON = 32
LEAST_HELD_OUT = 8
HOLD_OUT_EVERY = 5
"""Where lines have no part: 40 texts then give the two least numbers above."""

UNKNOWN_LANGUAGE = "und"
"""Language of a text whose line names none (ISO 639-2 for undetermined)."""

LONGEST_LINE_CHARS = 1 << 24
"""No text: a line is read as a whole, so a longer one is refused before it fills the memory."""

CALIBRATION, HELD_OUT = "calibration", "held_out"
EVERY = "every.jsonl"
SUFFIXES = (".jsonl", ".txt")
ALIKE = {"retrieval": ("retrieval.query", "retrieval.passage"), "clustering": ("separation",)}
"""Tasks of jina-embeddings-v5 whose texts are those of other tasks, in a set without their own."""

A_LINE = 'a line is "some text" or {"text": "some text", "language": "en", "part": "calibration"}'


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Texts to calibrate on, and texts that calibration never sees.

    The sha256 of each is that of its texts and languages in order, whatever file they came from.

    Args:
        calibration: at least LEAST_TO_CALIBRATE_ON.
        held_out: at least LEAST_HELD_OUT, none of them among the others.
    """

    calibration: CalibrationSet
    held_out: CalibrationSet


@dataclass(frozen=True, kw_only=True)
class _Line:
    number: int
    sample: Sample
    part: str | None


def data_folder() -> Path:
    """Where the shipped sets are: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "calibration_data"
    return inside if inside.is_dir() else package.parent / "calibration_data"


def read(name: str, task: str) -> CalibrationSet:
    """Read the texts of a shipped set for one task.

    Args:
        name: the set's, as its folder's.
        task: whose file is read; any.jsonl where the set has none for it.

    Returns:
        The texts in the file's order; their sha256 is over set.toml and that file.

    Raises:
        CalibrationError: no such set, or files that are not what set.toml describes.
    """
    folder = data_folder() / name
    about = folder / "set.toml"
    if not about.is_file():
        raise CalibrationError(
            f"no text set '{name}'", evidence=f"looked in {folder}", fix=nearest(name, _shipped())
        )
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        path = folder / "any.jsonl"
    languages = set(_about(folder)["languages"])
    samples = _samples(path)
    present = {sample.language for sample in samples}
    if not samples or present != languages:
        raise CalibrationError(
            f"text set '{name}' is not complete",
            evidence=f"{path.name}: {len(samples)} texts; languages that differ from set.toml: "
            f"{sorted(present ^ languages)}",
            fix="mend the file or the list of languages in set.toml",
        )
    return CalibrationSet(name=name, samples=samples, sha256=_digest(folder, [about, path]))


def _shipped() -> list[str]:
    return sorted(path.parent.name for path in data_folder().glob("*/set.toml"))


def _jsonl(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    return sorted(path for path in paths if os.path.isfile(path))


def _about(folder: Path) -> dict[str, Any]:
    """What set.toml says ({} without one), its sha256 compared with the files beside it."""
    path = folder / "set.toml"
    if not os.path.exists(path):
        return {}
    try:
        about = tomllib.loads(path.read_text(encoding="utf-8"))
        digest = _digest(folder, _jsonl(folder)) if "sha256" in about else None
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"cannot read {path}", evidence=str(error), fix="mend it; in a set of yours, delete it"
        ) from error
    if about.get("sha256") != digest:
        raise CalibrationError(
            f"the files of text set '{folder.name}' are not the ones that set.toml describes",
            evidence=f"sha256 in {path}: {about['sha256']}\n"
            f"of {', '.join(file.name for file in _jsonl(folder)) or 'no file'}: {digest}",
            fix="bring the files back (git checkout, or install jexport again); "
            f'when the change is meant: sha256 = "{digest}"',
        )
    return about


def _digest(folder: Path, files: Sequence[Path]) -> str:
    return sha256_of({path.name: file_digest(path, root=folder).sha256 for path in files})


def _samples(path: Path) -> tuple[Sample, ...]:
    samples = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read {path.name}", evidence=str(error), fix="give a UTF-8 text file"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            samples.append(Sample(text=str(entry["text"]), language=str(entry["language"])))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{path.name}, line {number} is not a sample",
                evidence=f"{error!r}: {line[:80]}",
                fix='each line is {"language": "en", "text": "..."}',
            ) from error
    return tuple(samples)


def parts(source: str, task: str) -> Parts:
    """Texts to calibrate `task` on, and texts held out from it. No text is in both.

    Where no line has a part, every fifth text is held out; not so in a shipped set, where that
    means a set that is not for calibration. A text counts once, blank ones not at all; with several
    files, one that any of them calibrates on is not held out.

    Args:
        source: name of a shipped set (it wins over a folder of that name: write ./name for the
            folder), a folder (<task>.jsonl, else any.jsonl, and every.jsonl; set.toml is optional)
            or one file, .jsonl or .txt.
        task: 'none' takes texts of any task, of all the folder's files in turn unless it has a
            none.jsonl or any.jsonl.

    Returns:
        Both parts.

    Raises:
        CalibrationError: no such source, one that cannot be read or is of another task, or too few
            texts.
    """
    shipped = source in _shipped()
    place = data_folder() / source if shipped else Path(source)
    files = _files(place, task, source)
    divided = {path.name: _divided(path, task, shipped=shipped) for path in files}
    calibration = _distinct(_in_turn({name: part[0] for name, part in divided.items()}))
    seen = {_key(sample.text) for sample in calibration}
    held_out = [
        sample
        for sample in _distinct(_in_turn({name: part[1] for name, part in divided.items()}))
        if _key(sample.text) not in seen
    ]
    if not calibration and not held_out:
        raise CalibrationError(f"no text in '{source}'", evidence="it is empty", fix=A_LINE)
    if len(calibration) < LEAST_TO_CALIBRATE_ON or len(held_out) < LEAST_HELD_OUT:
        raise CalibrationError(
            f"too few texts in '{source}'",
            evidence=f"{len(calibration)} to calibrate on (at least {LEAST_TO_CALIBRATE_ON}), "
            f"{len(held_out)} held out (at least {LEAST_HELD_OUT}); a repeated text counts once",
            fix=f"add texts (where no line has a part, every {HOLD_OUT_EVERY}th is held out)",
        )
    return Parts(calibration=_named(place, calibration), held_out=_named(place, held_out))


def texts(path: Path) -> list[str]:
    """Every text of one .jsonl or .txt file, repeated ones too.

    Args:
        path: in UTF-8.

    Returns:
        The texts in the file's order, blank ones left out.

    Raises:
        CalibrationError: it cannot be read, or a line of it has no text.
    """
    return [line.sample.text for line in _lines(_files(path, NONE, str(path))[0], NONE)]


def _named(place: Path, samples: Sequence[Sample]) -> CalibrationSet:
    digest = sha256_of([[sample.language, sample.text] for sample in samples])
    return CalibrationSet(name=place.resolve().name, samples=tuple(samples), sha256=digest)


def _files(place: Path, task: str, source: str) -> list[Path]:
    """The files with the texts of `task`, known to be of a readable type."""
    # os.path: a name that is too long or has a NUL in it is not there, rather than a traceback.
    if source and os.path.isdir(place):
        return _files_of_folder(place, task)
    if not source or not os.path.exists(place):
        nearby = [path for path in place.parent.glob("*") if path.suffix.lower() in SUFFIXES]
        nearby += {path.parent for path in place.parent.glob("*/*.jsonl")}
        raise CalibrationError(
            f"no text set, folder or file '{source}'",
            evidence=f"not one of the shipped sets ({', '.join(_shipped())}), and not on disk",
            fix=nearest(source, [*_shipped(), *sorted(map(str, nearby))]),
        )
    if place.suffix.lower() not in SUFFIXES:
        raise _not_text(place, f"its type is '{place.suffix}'")
    is_alike = place.stem in ALIKE.get(task, ())
    if place.stem in JINA_V3_PROMPTS and task not in (place.stem, NONE) and not is_alike:
        raise _other_task(place, task, f"it is named for {place.stem}")
    return [place]


def _files_of_folder(folder: Path, task: str) -> list[Path]:
    about, files = _about(folder), _jsonl(folder)
    tasks = about.get("tasks", [task])
    if not isinstance(tasks, list) or (task not in tasks and task != NONE):
        raise _other_task(folder, task, f"set.toml: tasks = {tasks!r}")
    if not files:
        names = sorted(path.name for path in folder.glob("*"))[:10]
        raise _not_text(folder, f"there is no .jsonl file in it, only: {', '.join(names) or '-'}")
    added = [path for path in files if path.name == EVERY]
    for path in (folder / f"{task}.jsonl", folder / "any.jsonl"):
        if path in files:
            return [path, *added]
    alike = [folder / f"{name}.jsonl" for name in ALIKE.get(task, ())]
    if alike and all(path in files for path in alike):
        return [*alike, *added]
    if added == files:
        return files
    if task != NONE:
        raise _other_task(folder, task, f"it has: {', '.join(path.stem for path in files)}")
    return files


def _not_text(path: Path, evidence: str) -> CalibrationError:
    return CalibrationError(
        f"cannot take texts from {path}",
        evidence=evidence,
        fix="text files only, in UTF-8: .jsonl (a JSON string or object a line) or .txt "
        "(a text a line)",
    )


def _other_task(path: Path, task: str, evidence: str) -> CalibrationError:
    return CalibrationError(
        f"the texts of {path} are not for task '{task}'",
        evidence=evidence,
        fix=f"give texts of '{task}' ({task}.jsonl in a folder, or any.jsonl for texts that suit "
        "every task), or a shipped set",
    )


def _divided(path: Path, task: str, *, shipped: bool) -> tuple[list[Sample], list[Sample]]:
    """The distinct texts of one file: to calibrate on, held out."""
    first: dict[str, _Line] = {}
    start: _Line | None = None
    for line in _lines(path, task):
        start = start or line
        if (line.part is None) != (start.part is None):
            raise _bad_line(
                path,
                max(line, start, key=lambda one: one.part is None).number,
                "has no part, others have",
                evidence=f"line {start.number}: part {start.part!r}; "
                f"line {line.number}: part {line.part!r}",
            )
        before = first.setdefault(_key(line.sample.text), line)
        if before.part != line.part:
            raise CalibrationError(
                f"{path.name}: the same text in both parts",
                evidence=f"line {before.number} ({before.part}) and line {line.number} "
                f"({line.part}): {line.sample.text[:80]}",
                fix="take it out of one of them",
            )
    lines = list(first.values())
    if start and start.part is None:
        if shipped:
            raise CalibrationError(
                f"text set '{path.parent.name}' is not for calibration",
                evidence=f"no line of {path.name} has a part; see its set.toml",
                fix="use another shipped set, or a file of your own",
            )
        held = slice(HOLD_OUT_EVERY - 1, None, HOLD_OUT_EVERY)
        held_out = [line.sample for line in lines[held]]
        del lines[held]
        return [line.sample for line in lines], held_out
    return (
        [line.sample for line in lines if line.part == CALIBRATION],
        [line.sample for line in lines if line.part == HELD_OUT],
    )


def _key(text: str) -> str:
    """Equal for texts that tokenizers of the XLM-R kind do not tell apart (NFKC, spaces)."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(_key(sample.text), sample)
    return list(first.values())


def _in_turn(files: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """One text of each task's file in turn, the k-th file's first in turn k; EVERY's come last.

    So each language begins with another task.

    Args:
        files: samples by the name of their file.

    Returns:
        All samples.
    """
    added = list(files.get(EVERY, ()))
    own = [samples for name, samples in files.items() if name != EVERY]
    if len(own) < 2:
        return [*(own[0] if own else ()), *added]
    queues = [by_language(samples) for samples in own]
    merged = []
    for turn in range(max(map(len, queues))):
        start = turn % len(queues)
        merged += [q[turn] for q in queues[start:] + queues[:start] if turn < len(q)]
    return merged + added


def _bad_line(path: Path, number: int, what: str, *, evidence: str) -> CalibrationError:
    return CalibrationError(f"{path.name}, line {number} {what}", evidence=evidence, fix=A_LINE)


def _lines(path: Path, task: str) -> Iterator[_Line]:
    """The lines of a .jsonl or .txt file that have a text; a byte order mark is no text."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for number in itertools.count(1):
                line = stream.readline(LONGEST_LINE_CHARS)
                if not line:
                    return
                if "\0" in line or len(line) == LONGEST_LINE_CHARS:
                    raise _not_text(path, f"line {number} is binary or {LONGEST_LINE_CHARS:,} long")
                if not line.strip():
                    continue
                sample = _line(path, number, line.strip(), task)
                if sample.sample.text.strip():
                    yield sample
    except UnicodeDecodeError as error:
        raise _not_text(path, f"not UTF-8: {error}") from error
    except OSError as error:
        raise CalibrationError(
            f"cannot read {path}", evidence=str(error), fix="give a file that can be read"
        ) from error


def _line(path: Path, number: int, line: str, task: str) -> _Line:
    entry: Any = line
    if path.suffix.lower() != ".txt":
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = f"{error}: {line[:80]}"
            raise _bad_line(path, number, "is not JSON", evidence=shown) from error
    if not isinstance(entry, dict):
        entry = {"text": entry}
    text, language = entry.get("text"), entry.get("language", UNKNOWN_LANGUAGE)
    part, kind = entry.get("part"), entry.get("kind", "")
    for key, value in (("text", text), ("language", language), ("kind", kind)):
        if not isinstance(value, str):
            raise _bad_line(path, number, f"has no string as its {key}", evidence=line[:80])
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _bad_line(path, number, f"has half a character in its {key}", evidence=line[:80])
    if "part" in entry and part not in (CALIBRATION, HELD_OUT):
        raise _bad_line(
            path,
            number,
            f"has an unknown part, {part!r}",
            evidence=f"the parts are {CALIBRATION} and {HELD_OUT}",
        )
    if task != NONE and entry.get("task", task) != task:
        raise _other_task(path, task, f"line {number} is for {entry['task']!r}")
    sample = Sample(text=text, language=language, kind=kind)
    return _Line(number=number, sample=sample, part=part)
