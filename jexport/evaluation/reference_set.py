"""What the reference library gives for the validation texts, and its file in the stage cache.

One set serves every target and precision of a task: the texts are chosen, and tokenised, by the
library itself. Knows no artifact.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jexport.datasets import sampling
from jexport.errors import ParityError
from jexport.evaluation import edge_texts, reference_library
from jexport.evaluation.edge_texts import EDGE
from jexport.recipe import LoadSpec, ValidateSpec
from jexport.types import CalibrationSet, LoadedModel, ReferenceFiles, Sample

FILE = "reference.safetensors"
COMPARED_USES = (reference_library.QUERY, reference_library.DOCUMENT)
"""Methods of library and runtime that are compared beside `encode`, where their prompts differ."""

USE_TEXTS = 24
"""Texts that are embedded again by encode_query and encode_document, where they differ."""

EDGE_EVERY = 4
"""Of the edge texts, which all have their ids compared, every fourth is embedded as well."""

ADDED_EMBEDDED = 8
LONGEST_EDGE_TOKENS = 512
"""Edge texts of more tokens have their ids compared only: those cost nothing."""

LONGEST_TOKENS = 32_768
"""Edge texts around a length limit are no longer than that: a static embedding has no limit."""

ATTEMPTED_TOKENS = 16_384
"""Longest text that is tried to see whether a limit that the library does not state is there."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSet:
    """Texts and what the library gives for them; those that were embedded come first.

    Args:
        samples: every text with its language; EDGE for edge texts.
        uses: the library's method by which each was tokenised and embedded, see
            reference_library.USES.
        ids: its token ids, prompt and special tokens included.
        vectors: float32 [embedded texts, dimension], as the library returns them.
        tokens: float32 [tokens, hidden] of each embedded text, () where the model has none.
        max_tokens: the library's length limit, 0 for none.
        texts: name and SHA-256 of the set that they were chosen from.
    """

    samples: tuple[Sample, ...]
    uses: tuple[str, ...]
    ids: tuple[list[int], ...]
    vectors: NDArray[np.float32]
    tokens: tuple[NDArray[np.float32], ...]
    max_tokens: int
    texts: Mapping[str, str]

    def rows(self, *, edge: bool, use: str = reference_library.ENCODE) -> list[int]:
        """Some of the embedded texts.

        Args:
            edge: whether edge texts, else all others.
            use: the library's method that embedded them.

        Returns:
            Their places in `samples` and `vectors`, ascending.
        """
        return [
            row
            for row in range(len(self.vectors))
            if self.uses[row] == use and (self.samples[row].language == EDGE) is edge
        ]


def run(
    loaded: LoadedModel,
    spec: LoadSpec,
    texts: CalibrationSet,
    validate: ValidateSpec,
    *,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReferenceFiles:
    """Let the library embed texts of every language and length, and edge texts; write out_dir/FILE.

    Args:
        loaded: says where the checkpoint is, its task and its length limit.
        spec: [load] of the recipe.
        texts: the set that the compared texts are chosen from.
        validate: how many tokens are embedded, and of how long a text.
        out_dir: the folder of the file.
        progress: called after each batch with the tokens that are done and those of all texts.

    Returns:
        The folder, how many texts were embedded, and the library's name and version.

    Raises:
        ParityError: there is no text to compare.
        UnsupportedCheckpointError: the library cannot use the checkpoint.
    """
    with reference_library.opened(loaded, spec) as library:
        if not spec.max_tokens:
            _settle_limit(library, loaded.embedding.max_tokens)
        vectors = _embedded(library, texts, validate, loaded.embedding.max_tokens, progress)
    write(vectors, out_dir / FILE)
    return ReferenceFiles(
        folder=out_dir,
        texts=len(vectors.vectors),
        library=f"{reference_library.LIBRARY} {metadata.version(reference_library.LIBRARY)}",
    )


def _settle_limit(library: reference_library.ReferenceLibrary, ours: int) -> None:
    """Where the library would let a text through that its own model cannot take, cut as we do.

    It cuts at RoBERTa's max_position_embeddings, of which two hold no text, and fails there; and
    where nothing states a limit, not at all. A model that takes the longer text keeps its limit.
    """
    stated = library.max_tokens
    if (not stated or stated > ours) and ours < ATTEMPTED_TOKENS:
        longer = library.text_of(ours + 1)
        if longer and not library.can_embed(longer):
            library.limit(ours)


def _embedded(
    library: reference_library.ReferenceLibrary,
    texts: CalibrationSet,
    validate: ValidateSpec,
    ours: int,
    progress: Callable[[int, int], None],
) -> ReferenceSet:
    limit = min(validate.max_tokens, library.max_tokens or ours)
    usual = sampling.within_budget(
        texts, library.tokenize, budget_tokens=validate.budget_tokens, max_tokens=limit
    )
    if not usual:
        raise ParityError(
            "validate: there is no text to compare",
            evidence=f"set '{texts.name}' has {len(texts.samples)} texts; the limit is {limit} "
            "tokens, prompt included",
            fix="give validate.texts a set with texts, or raise validate.max_tokens",
        )
    sizes = map(len, library.tokenize([one.text for one in usual]))
    usual = tuple(one for one, size in zip(usual, sizes, strict=True) if size)
    longest = min(library.max_tokens or ours, LONGEST_TOKENS)
    chosen, others = _edge(library, longest, limit)
    chosen += _beyond_window(library, usual, limit)
    rows = [(one, reference_library.ENCODE) for one in (*usual, *chosen)]
    again = [usual[place] for place in _evenly(len(usual), USE_TEXTS)]
    for use in COMPARED_USES:
        if use in library.uses and library.tokenize([again[0].text], use) != library.tokenize(
            [again[0].text]
        ):
            rows += [(one, use) for one in again]
    embedded = len(rows)
    rows += [(one, reference_library.ENCODE) for one in others]
    ids = _tokenized(library, rows)
    total, done = sum(map(len, ids[:embedded])), 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    answers: list[reference_library.Answer] = []
    for use in reference_library.USES:
        mine = [row for row in range(embedded) if rows[row][1] == use]
        answers += library.encode(
            [rows[row][0].text for row in mine], [ids[row] for row in mine], use, count
        )
    tokens = tuple(one.tokens for one in answers if one.tokens is not None)
    return ReferenceSet(
        samples=tuple(one for one, _ in rows),
        uses=tuple(use for _, use in rows),
        ids=tuple(ids),
        vectors=np.stack([one.vector for one in answers]),
        tokens=tokens if len(tokens) == len(answers) else (),
        max_tokens=library.max_tokens,
        texts={"set": texts.name, "sha256": texts.sha256},
    )


def _edge(
    library: reference_library.ReferenceLibrary, longest: int, limit: int
) -> tuple[list[Sample], list[Sample]]:
    """The edge texts that are embedded, and those whose ids alone are compared."""
    added = edge_texts.with_tokens(library.added_tokens())
    short, long = edge_texts.short(), edge_texts.long(library.text_of, longest)
    selected = {*short[::EDGE_EVERY], *added[:ADDED_EMBEDDED], *long[:2]}
    every = tuple(dict.fromkeys((*short, *added, *long)))
    sizes = map(len, library.tokenize(every))
    chosen: list[Sample] = []
    others: list[Sample] = []
    for text, size in zip(every, sizes, strict=True):
        fits = 0 < size <= min(limit, LONGEST_EDGE_TOKENS)
        (chosen if fits and text in selected else others).append(Sample(text=text, language=EDGE))
    return chosen, others


def _beyond_window(
    library: reference_library.ReferenceLibrary, embedded: Sequence[Sample], limit: int
) -> list[Sample]:
    """A text longer than the attention's window, where none of those that are embedded is.

    Shorter texts have the same vectors whatever the window is; so have the edge texts of one word.
    Raises ParityError where the tokenizer has no such text.
    """
    window = library.window
    if not 0 < window < limit:
        return []
    texts = [one.text for one in embedded]
    if max(map(len, library.tokenize(texts))) > window:
        return []
    # Of many words: what sees fewer of one word repeated sees the same.
    words = " ".join(texts).split() or [edge_texts.WORD]
    size = min(limit, window + window // 8 + 8)
    text = " ".join(itertools.islice(itertools.cycle(words), size))
    [ids] = library.tokenize([text])
    if len(ids) > size:
        fewer = size * size // len(ids) + 1
        shorter = " ".join(itertools.islice(itertools.cycle(words), fewer))
        [cut] = library.tokenize([shorter])
        text, ids = (shorter, cut) if len(cut) > window else (text, ids)
    if len(ids) <= window:
        raise ParityError(
            "validate: no text is longer than the attention's window",
            evidence=f"the window is {window} tokens, the longest text {len(ids)}",
            fix="give validate.texts a set with longer texts",
        )
    return [Sample(text=text, language=EDGE)]


def _evenly(count: int, amount: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, count - 1, num=min(amount, count))})


def _tokenized(
    library: reference_library.ReferenceLibrary, rows: Sequence[tuple[Sample, str]]
) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in rows]
    for use in reference_library.USES:
        mine = [row for row, (_, own) in enumerate(rows) if own == use]
        if mine:
            encoded = library.tokenize([rows[row][0].text for row in mine], use)
            for row, one in zip(mine, encoded, strict=True):
                ids[row] = one
    return ids


def write(reference: ReferenceSet, path: Path) -> None:
    """Write the file. The same values give the same bytes.

    Args:
        reference: what is written.
        path: a safetensors file; its folder exists.
    """
    from safetensors.numpy import save_file

    flat = [one for ids in reference.ids for one in ids]
    arrays = {
        "vectors": np.ascontiguousarray(reference.vectors, dtype=np.float32),
        "ids": np.array(flat, dtype=np.int64),
        "lengths": np.array([len(ids) for ids in reference.ids], dtype=np.int64),
    }
    if reference.tokens:
        arrays["tokens"] = np.concatenate(reference.tokens)
    about = {
        "samples": [[one.text, one.language] for one in reference.samples],
        "uses": reference.uses,
        "max_tokens": reference.max_tokens,
        "texts": dict(reference.texts),
    }
    save_file(arrays, str(path), metadata={"about": json.dumps(about, sort_keys=True)})


def read(path: Path) -> ReferenceSet:
    """Read the file back; whoever hands out the folder has verified that it is as it was written.

    Args:
        path: of a file from `write`.

    Returns:
        What was written.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as stream:
        about = json.loads(stream.metadata()["about"])
        ends = np.cumsum(stream.get_tensor("lengths"))[:-1]
        ids = tuple(part.tolist() for part in np.split(stream.get_tensor("ids"), ends))
        vectors = stream.get_tensor("vectors")
        tokens: tuple[NDArray[np.float32], ...] = ()
        if "tokens" in stream.keys():  # noqa: SIM118 (not a mapping)
            borders = np.cumsum([len(one) for one in ids[: len(vectors)]])[:-1]
            tokens = tuple(np.split(stream.get_tensor("tokens"), borders))
    return ReferenceSet(
        samples=tuple(Sample(text=text, language=language) for text, language in about["samples"]),
        uses=tuple(about["uses"]),
        ids=ids,
        vectors=vectors,
        tokens=tokens,
        max_tokens=about["max_tokens"],
        texts=about["texts"],
    )
