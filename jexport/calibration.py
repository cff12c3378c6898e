"""calibration_data/ -> CalibrationSet: texts by task and language, and texts of a wanted length.

A set is a folder with set.toml and one <task>.jsonl a task; any.jsonl serves the tasks without a
file of their own. Each line is {"language": ..., "text": ...}. Knows no tokenizer: lengths are
measured by the function it is given.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from jexport.errors import CalibrationError, nearest
from jexport.flow import CalibrationSet, Sample
from jexport.manifest import file_digest, sha256_of

LENGTH_TARGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper borders of the length buckets, in tokens."""

MIXED = "mixed"
"""Language of a text that was joined from several to reach a length."""

Tokenize = Callable[[list[str]], list[list[int]]]


def data_folder() -> Path:
    """Where the shipped sets are: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "calibration_data"
    return inside if inside.is_dir() else package.parent / "calibration_data"


def read(name: str, task: str) -> CalibrationSet:
    """Read the texts of a shipped set for one task. Raises CalibrationError."""
    folder = data_folder() / name
    about = folder / "set.toml"
    if not about.is_file():
        known = sorted(p.parent.name for p in data_folder().glob("*/set.toml"))
        raise CalibrationError(
            f"no text set '{name}'", evidence=f"looked in {folder}", fix=nearest(name, known)
        )
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        path = folder / "any.jsonl"
    languages = set(tomllib.loads(about.read_text(encoding="utf-8"))["languages"])
    samples = _samples(path)
    found = {sample.language for sample in samples}
    if not samples or found != languages:
        raise CalibrationError(
            f"text set '{name}' is not complete",
            evidence=f"{path.name}: {len(samples)} texts; languages that differ from set.toml: "
            f"{sorted(found ^ languages)}",
            fix="mend the file or the list of languages in set.toml",
        )
    return CalibrationSet(name=name, samples=samples, sha256=_digest(folder, [about, path]))


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


def within_budget(
    full: CalibrationSet, tokenize: Tokenize, *, budget_tokens: int, max_tokens: int
) -> tuple[Sample, ...]:
    """Samples of every language and of every length, of about `budget_tokens` tokens in all.

    First comes one text at each of LENGTH_TARGETS up to `max_tokens` (less than twice `max_tokens`
    together): the longest always, another as long as the budget lasts. Then texts round robin over
    the languages, shortest first, for what is left of the budget and at least half of it; one of
    each language always, cut when even the shortest is longer than `max_tokens`.
    A sample without any token, or that no cutting brings below `max_tokens`, is left out.
    """
    if not full.samples:
        return ()
    tallies = [len(ids) for ids in tokenize([sample.text for sample in full.samples])]
    long = _of_lengths(full, tokenize, max_tokens=max_tokens, budget_tokens=budget_tokens)
    spent = sum(len(ids) for ids in tokenize([sample.text for sample in long])) if long else 0
    left = max(budget_tokens - spent, budget_tokens // 2)
    queues: dict[str, list[tuple[int, Sample]]] = {}
    for tokens, sample in zip(tallies, full.samples, strict=True):
        queues.setdefault(sample.language, []).append((tokens, sample))
    chosen: list[Sample] = []
    for language, queue in queues.items():
        queue.sort(key=lambda entry: entry[0])
        queues[language] = [entry for entry in queue if 0 < entry[0] <= max_tokens]
        if not queues[language]:
            cut = _cut(queue[0][1].text, tokenize, max_tokens)
            chosen += [Sample(text=cut, language=language)] if cut else []
    first_round = True
    while any(queues.values()):
        for queue in queues.values():
            if queue and (first_round or queue[0][0] <= left):
                tokens, sample = queue.pop(0)
                left -= tokens
                chosen.append(sample)
            else:
                queue.clear()
        first_round = False
    return tuple(chosen) + tuple(long)


def _of_lengths(
    full: CalibrationSet, tokenize: Tokenize, *, max_tokens: int, budget_tokens: int
) -> list[Sample]:
    targets = sorted({min(t, max_tokens) for t in LENGTH_TARGETS if t // 2 < max_tokens})
    left = budget_tokens
    samples = []
    if tokenize([""])[0]:
        samples.append(Sample(text="", language=MIXED))
    for rank, target in enumerate(reversed(targets)):
        if rank and target > left:
            continue
        left -= target
        text = _of_length(full, tokenize, target, start=rank)
        if text:
            samples.append(Sample(text=text, language=MIXED))
    return samples


def _of_length(full: CalibrationSet, tokenize: Tokenize, target: int, *, start: int) -> str:
    """A text of at most `target` tokens, as near to it as cutting characters comes, or ''."""
    texts = [sample.text for sample in full.samples if sample.text.strip()]
    if not texts:
        return ""
    turn = start * 7 % len(texts)
    source = itertools.cycle(texts[turn:] + texts[:turn])
    text, tokens = "", 0
    while tokens < target:
        wanted = max(2 * target, 2 * len(text))
        while len(text) < wanted:
            text = f"{text} {next(source)}".lstrip()
        before, tokens = tokens, len(tokenize([text])[0])
        if tokens <= before:
            return ""  # a tokenizer that maps everything to nothing, or cuts below the target
    return _cut(text, tokenize, target)


def _cut(text: str, tokenize: Tokenize, target: int) -> str:
    """The beginning of a text that has at most `target` tokens, '' when there is none."""
    low, high = 0, len(text) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if len(tokenize([text[:middle]])[0]) <= target:
            low = middle
        else:
            high = middle
    cut = text[:low].rstrip()
    return cut if cut and 0 < len(tokenize([cut])[0]) <= target else ""
