"""Texts of every language and length within a budget, and as token ids in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jexport.datasets import calibration, sampling
from jexport.types import CalibrationSet, Sample

# --- within_budget ------------------------------------------------------------------------------

SPECIAL = 2


def words(texts: list[str]) -> list[list[int]]:
    """One token a word or, in scripts without spaces, a character; and two special ones."""
    found = []
    for text in texts:
        parts = [piece for word in text.split() for piece in _pieces(word)]
        found.append([0, *(len(part) + 3 for part in parts), 2])
    return found


def _pieces(word: str) -> list[str]:
    return [word] if word.isascii() else list(word)


def count(samples: tuple[Sample, ...]) -> list[int]:
    return [len(ids) for ids in words([sample.text for sample in samples])]


@pytest.fixture(scope="module")
def full() -> CalibrationSet:
    return calibration.read("parity", "none")


@pytest.mark.parametrize("max_tokens", [5, 16, 100, 512, 2048, 8192])
@pytest.mark.parametrize("budget_tokens", [1, 500, 16_384])
def test_every_language_and_nothing_too_long(
    max_tokens: int, budget_tokens: int, full: CalibrationSet
) -> None:
    chosen = sampling.within_budget(full, words, budget_tokens=budget_tokens, max_tokens=max_tokens)
    assert {s.language for s in chosen} >= {s.language for s in full.samples}
    lengths = count(chosen)
    assert min(lengths) >= SPECIAL
    assert max(lengths) <= max_tokens
    assert max(lengths) >= 0.9 * max_tokens


@pytest.mark.parametrize("max_tokens", [512, 2048, 8192])
def test_a_text_in_every_bucket_of_length(max_tokens: int, full: CalibrationSet) -> None:
    chosen = sampling.within_budget(full, words, budget_tokens=16_384, max_tokens=max_tokens)
    uppers = {max(2, 1 << (length - 1).bit_length()) for length in count(chosen)}
    assert uppers == {1 << power for power in range(1, max_tokens.bit_length())}


@pytest.mark.parametrize("budget", [2500, 6000, 16_384])
def test_the_budget_is_kept_when_the_lengths_fit(budget: int, full: CalibrationSet) -> None:
    chosen = sampling.within_budget(full, words, budget_tokens=budget, max_tokens=512)
    assert 0.8 * budget <= sum(count(chosen)) <= budget


def test_the_longest_on_request_costs_at_most_half_as_much_again(full: CalibrationSet) -> None:
    chosen = sampling.within_budget(full, words, budget_tokens=16_384, max_tokens=8192)
    assert sum(count(chosen)) <= 1.5 * 16_384
    assert len(chosen) > 100  # ranks need more than a text a language


def test_a_small_budget_costs_little(full: CalibrationSet) -> None:
    chosen = sampling.within_budget(full, words, budget_tokens=1, max_tokens=64)
    assert len(chosen) <= 30 + 2
    assert sum(count(chosen)) < 64 + 30 * 20


def test_a_language_whose_shortest_text_is_too_long_is_cut(full: CalibrationSet) -> None:
    texts = (
        Sample(text="one two three four five six", language="en"),
        Sample(text="eins", language="de"),
    )
    short = CalibrationSet(name="two", samples=texts, sha256="")
    chosen = sampling.within_budget(short, words, budget_tokens=100, max_tokens=5)
    assert Sample(text="one two three", language="en") in chosen
    assert Sample(text="eins", language="de") in chosen


@pytest.mark.parametrize("texts", [(), ("",), (" ", "\n")])
def test_a_set_without_words_gives_nothing_and_ends(texts: tuple[str, ...]) -> None:
    def no_special(found: list[str]) -> list[list[int]]:
        return [ids[1:-1] for ids in words(found)]

    samples = tuple(Sample(text=text, language="en") for text in texts)
    blank = CalibrationSet(name="blank", samples=samples, sha256="")
    assert sampling.within_budget(blank, no_special, budget_tokens=99, max_tokens=64) == ()


def test_the_same_set_gives_the_same_samples(full: CalibrationSet) -> None:
    first, second = (
        sampling.within_budget(full, words, budget_tokens=3000, max_tokens=256) for _ in "ab"
    )
    assert first == second


def test_a_tokenizer_that_cuts_is_no_endless_search(full: CalibrationSet) -> None:
    chosen = sampling.within_budget(
        full, lambda texts: [ids[:40] for ids in words(texts)], budget_tokens=500, max_tokens=512
    )
    assert {sample.language for sample in chosen} >= {sample.language for sample in full.samples}


# --- sample -------------------------------------------------------------------------------------


def letters(batch: list[str]) -> list[list[int]]:
    """An id a character between two special ones; none for a text of spaces."""
    return [[0, *map(ord, text), 2] if text.strip() else [] for text in batch]


@pytest.fixture
def three() -> CalibrationSet:
    samples = [
        ("aa", "en"),
        ("bbbb", "en"),
        (" ", "de"),
        ("cccccc", "de"),
        ("d", "fr"),
        ("e", "en"),
    ]
    return CalibrationSet(
        name="three",
        samples=tuple(Sample(text=text, language=language) for text, language in samples),
        sha256="",
    )


def back(found: list[list[int]]) -> list[str]:
    return ["".join(map(chr, ids[1:-1])) for ids in found]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_languages_take_turns_and_texts_without_ids_are_left_out(
    count: int, three: CalibrationSet
) -> None:
    found, cut = sampling.sample(three, letters, count=count, max_tokens=99)
    assert back(found) == ["aa", "d", "bbbb", "cccccc", "e"][:count]
    assert cut == 0


@pytest.mark.parametrize(("max_tokens", "cut"), [(8, 0), (7, 1), (6, 1), (5, 2), (4, 2), (3, 3)])
def test_a_long_text_is_cut_and_keeps_its_last_id(
    max_tokens: int, cut: int, three: CalibrationSet
) -> None:
    found, tally = sampling.sample(three, letters, count=9, max_tokens=max_tokens)
    assert tally == cut
    assert max(map(len, found)) <= max_tokens
    assert {(ids[0], ids[-1]) for ids in found} == {(0, 2)}
    wanted = ["aa", "d", "bbbb", "cccccc", "e"]
    assert back(found) == [text[: max_tokens - 2] for text in wanted]


def test_only_texts_that_were_taken_count_as_cut(three: CalibrationSet) -> None:
    assert sampling.sample(three, letters, count=2, max_tokens=3)[1] == 1


def test_one_token_is_the_last_and_none_is_refused(three: CalibrationSet) -> None:
    assert sampling.sample(three, letters, count=2, max_tokens=1) == ([[2], [2]], 2)
    with pytest.raises(ValueError, match="at least 1"):
        sampling.sample(three, letters, count=2, max_tokens=0)


def test_texts_beyond_the_count_are_not_tokenised(three: CalibrationSet) -> None:
    seen: list[str] = []

    def counting(batch: list[str]) -> list[list[int]]:
        seen.extend(batch)
        return letters(batch)

    sampling.sample(three, counting, count=2, max_tokens=99)
    assert seen == ["aa", " ", "d"]


def test_a_set_of_nothing_ends(three: CalibrationSet) -> None:
    def nothing(batch: list[str]) -> list[list[int]]:
        return [[] for _ in batch]

    empty: Callable[[list[str]], list[list[int]]] = nothing
    assert sampling.sample(three, empty, count=5, max_tokens=9) == ([], 0)
