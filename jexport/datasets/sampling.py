"""Which texts of a set are taken: of every language, and of the lengths that are wanted.

Knows no tokenizer: lengths are measured by the function it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from jexport.types import CalibrationSet, Sample

LENGTH_TARGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper borders of the length buckets, in tokens."""

MIXED = "mixed"
"""Language of a text that was joined from several to reach a length."""

Tokenize = Callable[[list[str]], list[list[int]]]


def by_language(samples: Sequence[Sample]) -> list[Sample]:
    """Round robin over the languages and kinds, each in the order it came.

    Args:
        samples: of any languages; those of a kind are in its turn, not in their language's.

    Returns:
        All of them.
    """
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(f"kind {sample.kind}" if sample.kind else sample.language, []).append(
            sample
        )
    turns = itertools.zip_longest(*queues.values())
    return [sample for turn in turns for sample in turn if sample is not None]


def sample(
    full: CalibrationSet, tokenize: Tokenize, *, count: int, max_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of some texts, round robin over the languages and kinds.

    Args:
        full: the texts.
        tokenize: gives each text's ids; a text without any is left out.
        count: the most texts.
        max_tokens: a longer text is cut as `cut_ids` does.

    Returns:
        The ids of each text, and how many texts were cut.

    Raises:
        ValueError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, not at least 1")
    waiting = iter(by_language(full.samples))
    drawn: list[list[int]] = []
    while batch := [one.text for one in itertools.islice(waiting, max(count - len(drawn), 0))]:
        drawn += [ids for ids in tokenize(batch) if ids]
    cut = [cut_ids(ids, max_tokens) for ids in drawn]
    return cut, sum(len(ids) > max_tokens for ids in drawn)


def cut_ids(ids: list[int], max_tokens: int) -> list[int]:
    """Cut a text that is too long: the ids before its last go, for that one is a special token.

    Args:
        ids: of one text.
        max_tokens: at least 1.

    Returns:
        At most `max_tokens` ids.
    """
    return ids[: max_tokens - 1] + ids[-1:] if len(ids) > max_tokens else ids


def within_budget(
    full: CalibrationSet, tokenize: Tokenize, *, budget_tokens: int, max_tokens: int
) -> tuple[Sample, ...]:
    """Samples of every language and of every length.

    First comes one text at each of LENGTH_TARGETS up to `max_tokens` (less than twice `max_tokens`
    together): the longest always, another as long as the budget lasts. Then texts round robin over
    the languages, shortest first, for what is left of the budget and at least half of it; one of
    each language always, cut when even the shortest is longer than `max_tokens`.

    Args:
        full: the texts.
        tokenize: gives each text's ids; a text without any is left out.
        budget_tokens: of all samples together, about.
        max_tokens: of one sample; one that no cutting brings so low is left out.

    Returns:
        The samples, those of the languages first.
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
        size = max(2 * target, 2 * len(text))
        while len(text) < size:
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
