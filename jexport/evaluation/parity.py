"""How far two sets of outputs are apart, in plain numpy.

It compares arrays; gates.py holds the numbers against bounds. It does not know which runtime made
an array, which text a row came from (only its language and length), or what a recipe wants.
Everything is computed in float64 from vectors normalised to length 1, and nothing is rounded.

It never passes on nothing: no texts, a missing output, a NaN or another length is a ParityError,
not a good number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import ParityError
from jexport.evaluation import intervals, ranking
from jexport.evaluation.ranking import Floats, Integers
from jexport.gates import GROUP_TEXTS
from jexport.workspace.threads import one_blas_thread

NEIGHBOURS = 10

LAST_BUCKET_TOKENS = 8192

LEAST_LOSS = 1e-3
"""Mean cosine lost up to which no language is said to lose more than another: it does not matter,
and where all of them lose little, one may lose twice the mean whatever is done."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """One side's vectors of a list of texts.

    Args:
        embeddings: float32 [texts, dimension], rows in text order, not necessarily normalised.
        tokens: per text float32 [tokens, hidden], without padding; () when the side has none.
    """

    embeddings: np.ndarray
    tokens: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the texts are, for the groups of a comparison.

    Args:
        languages: one per text.
        lengths: of each text in tokens, special tokens included.
        dimensions: Matryoshka sizes to compare, the full size included.
        kinds: what sort of text each is, '' for a usual one; () where no text is of a kind.
    """

    languages: tuple[str, ...]
    lengths: tuple[int, ...]
    dimensions: tuple[int, ...]
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Two sides at one dimension, per text and per pair: any group's numbers follow from these.

    cosines, differences, overlaps: float64 [texts].
    first, second: int64 [pairs], the two texts of each unordered pair.
    reference_levels, candidate_levels: int64 [pairs], see `ranking.levels`.
    """

    cosines: Floats
    differences: Floats
    overlaps: Floats
    first: Integers
    second: Integers
    reference_levels: Integers
    candidate_levels: Integers


def compare(reference: Outputs, candidate: Outputs, labels: Labels) -> dict[str, Any]:
    """How far `candidate` is from `reference`, as JSON-ready floats, ints and strings.

    Args:
        reference: the vectors that are taken for right.
        candidate: those that are measured.
        labels: of the texts.

    Returns:
        {"texts", "overall": M, "by_language": {"th": M}, "languages": {"largest_loss"},
        "by_length": {"5-8": M}, "by_dimension": {"64": M}, "tokens": T or None when neither side
        has tokens}, and "by_kind": {"verse": M} where texts have kinds. largest_loss: mean cosine
        lost by the language that loses most, over that of all; of languages with GROUP_TEXTS texts
        that lose more than LEAST_LOSS, 0 without any.

    Raises:
        ParityError: fewer than two texts, sides or labels that differ in shape, a NaN, an infinity
            or a vector of length zero, or a dimension that is not there.

    M has, for the group's texts, each side's vectors normalised to length 1:
    texts; cosine_mean, cosine_p1 (first percentile, linear), cosine_min; loss, 1 - cosine_mean;
    loss_low, below which it is not with CONFIDENCE (see intervals.py); largest_difference (of one
    vector element); spearman (see ranking.py) of the pairwise cosine similarities, each
    unordered pair with a text of the group once; top10_overlap, the mean share of the
    min(10, texts - 1) nearest neighbours in the whole set that both sides have (see ranking.py).
    by_dimension cuts vectors to their first values and normalises again (Kusupati et al. 2022,
    arXiv 2205.13147). T has texts, cosine_min and largest_difference over all token vectors.
    """
    texts = _check_embeddings(
        reference.embeddings, candidate.embeddings, languages=labels.languages
    )
    width = reference.embeddings.shape[1]
    _check_labels(labels, texts, width)
    full = _measure(reference, candidate, width, labels.languages)
    everything = np.ones(texts, dtype=np.bool_)
    languages = np.array(labels.languages, dtype=np.object_)
    uppers = np.array([_bucket_upper(int(length)) for length in labels.lengths])
    overall = _summary(full, everything)
    by_dimension = {}
    for dimension in sorted(set(labels.dimensions) - {width}):
        cut = _measure(reference, candidate, dimension, labels.languages)
        by_dimension[str(dimension)] = _summary(cut, everything)
    by_dimension[str(width)] = dict(overall)
    by_language = {
        name: _summary(full, languages == name) for name in sorted(set(labels.languages))
    }
    by_kind = _by_kind(full, labels)
    return {
        "texts": texts,
        "overall": overall,
        "by_language": by_language,
        "languages": {"largest_loss": _largest_loss(by_language, overall)},
        "by_length": {
            _bucket_name(upper): _summary(full, uppers == upper)
            for upper in sorted(set(uppers.tolist()))
        },
        "by_dimension": by_dimension,
        "tokens": _compare_tokens(reference.tokens, candidate.tokens, labels.languages),
        **({"by_kind": by_kind} if by_kind else {}),
    }


def _by_kind(full: _Comparison, labels: Labels) -> dict[str, dict[str, float]]:
    """M of each kind of text."""
    kinds = np.array(labels.kinds, dtype=np.object_)
    return {name: _summary(full, kinds == name) for name in sorted(set(labels.kinds) - {""})}


def _largest_loss(
    by_language: Mapping[str, Mapping[str, float]], overall: Mapping[str, float]
) -> float:
    """Mean cosine lost by the language that loses most, over that lost by all; 0 for no loss."""
    losses = [one["loss"] for one in by_language.values() if one["texts"] >= GROUP_TEXTS]
    worst = max(losses, default=0.0)
    return worst / overall["loss"] if worst > LEAST_LOSS and overall["loss"] > 0 else 0.0


def invariance(alone: np.ndarray, batched: np.ndarray) -> dict[str, float]:
    """How far each text alone is from the same text in a padded batch.

    Args:
        alone: float32 [texts, dimension].
        batched: the same texts in the same order, of the same shape.

    Returns:
        {"texts", "cosine_min", "largest_difference"} of the vectors normalised to length 1.

    Raises:
        ParityError: no text, other shapes, a NaN, an infinity or a vector of length zero.
    """
    sides = ("the texts alone", "the texts in a batch")
    texts = _check_embeddings(alone, batched, sides=sides, least=1)
    names = [_name(index, ()) for index in range(texts)]
    first = _normalised(alone, f"an embedding of {sides[0]}", names)
    second = _normalised(batched, f"an embedding of {sides[1]}", names)
    return {
        "texts": texts,
        "cosine_min": float(_cosines(first, second).min()),
        "largest_difference": float(np.abs(first - second).max()),
    }


def norms(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """How far the candidate's vector lengths are from the reference's: what cosines do not see.

    Args:
        reference: float32 [texts, dimension], not normalised.
        candidate: of the same shape, not normalised.

    Returns:
        {"texts", "largest_error"}, the largest |length / reference length - 1|.

    Raises:
        ParityError: as `compare`.
    """
    texts = _check_embeddings(reference, candidate, least=1)
    names = [_name(index, ()) for index in range(texts)]
    for side, vectors in (("the reference", reference), ("the candidate", candidate)):
        _normalised(vectors, f"an embedding of {side}", names)
    expected, measured = (
        np.linalg.norm(side.astype(np.float64), axis=1) for side in (reference, candidate)
    )
    return {"texts": texts, "largest_error": float(np.abs(measured / expected - 1).max())}


def _measure(
    reference: Outputs, candidate: Outputs, dimension: int, languages: Sequence[str]
) -> _Comparison:
    """Compare the first `dimension` values of at least two embeddings, normalised here."""
    texts, width = reference.embeddings.shape
    what = "an embedding" if dimension == width else f"an embedding cut to {dimension} values"
    names = [_name(index, languages) for index in range(texts)]
    ours = _normalised(reference.embeddings[:, :dimension], f"{what} of the reference", names)
    theirs = _normalised(candidate.embeddings[:, :dimension], f"{what} of the candidate", names)
    first, second = np.triu_indices(texts, k=1)
    with one_blas_thread():
        our_similarities, their_similarities = ours @ ours.T, theirs @ theirs.T
    our_levels = ranking.levels(our_similarities[first, second])
    their_levels = ranking.levels(their_similarities[first, second])
    count = min(NEIGHBOURS, texts - 1)
    unshared = np.abs(
        ranking.choices(our_similarities, count) - ranking.choices(their_similarities, count)
    )
    return _Comparison(
        cosines=_cosines(ours, theirs),
        differences=np.abs(ours - theirs).max(axis=1),
        # the sum of min(a, b) over rows that both sum to `count`; exactly 1 when a equals b
        overlaps=np.clip(1 - unshared.sum(axis=1) / (2 * count), 0, 1),
        first=first,
        second=second,
        reference_levels=our_levels,
        candidate_levels=their_levels,
    )


def _summary(comparison: _Comparison, members: NDArray[np.bool_]) -> dict[str, float]:
    """The numbers M of a group; members: bool [texts], at least one of them true."""
    cosines = comparison.cosines[members]
    pairs = members[comparison.first] | members[comparison.second]
    return {
        "texts": int(members.sum()),
        "cosine_mean": float(cosines.mean()),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_min": float(cosines.min()),
        "loss": float(1 - cosines.mean()),
        "loss_low": intervals.mean_at_least(1 - cosines),
        "largest_difference": float(comparison.differences[members].max()),
        "spearman": ranking.spearman(
            comparison.reference_levels[pairs], comparison.candidate_levels[pairs]
        ),
        "top10_overlap": float(comparison.overlaps[members].mean()),
    }


def _cosines(first: Floats, second: Floats) -> Floats:
    """Row by row cosine of vectors of length 1, float64 [rows], exactly 1 for equal rows.

    1 - |a - b|^2 / 2 instead of a.b, which rounds to 1 - 2e-16 or 1 + 2e-16 for equal vectors.
    """
    cosines: Floats = np.clip(1 - np.square(first - second).sum(axis=-1) / 2, -1, 1)
    return cosines


def _compare_tokens(
    reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], languages: Sequence[str]
) -> dict[str, float] | None:
    """T of `compare`: worst cosine and difference of all token vectors; None without tokens."""
    if len(reference) == 0 and len(candidate) == 0:
        return None
    if not len(reference) == len(candidate) == len(languages):
        raise ParityError(
            "token vectors are missing",
            evidence=f"the reference has them for {len(reference)} texts, the candidate for "
            f"{len(candidate)}, of {len(languages)}",
            fix="let both sides return token vectors for every text, or neither for any",
        )
    lowest, largest = math.inf, -math.inf
    for index, (ours, theirs) in enumerate(zip(reference, candidate, strict=True)):
        name = _name(index, languages)
        if ours.ndim != 2 or ours.shape != theirs.shape or ours.size == 0:
            raise ParityError(
                f"token vectors of {name} cannot be compared",
                evidence=f"the reference has shape {list(ours.shape)}, the candidate "
                f"{list(theirs.shape)}",
                fix="give both sides the same tokens, [tokens, hidden] without padding",
            )
        names = [f"token {token} of {name}" for token in range(len(ours))]
        first = _normalised(ours, "a token vector of the reference", names)
        second = _normalised(theirs, "a token vector of the candidate", names)
        lowest = min(lowest, float(_cosines(first, second).min()))
        largest = max(largest, float(np.abs(first - second).max()))
    return {"texts": len(reference), "cosine_min": lowest, "largest_difference": largest}


def _normalised(vectors: np.ndarray, what: str, names: Sequence[str]) -> Floats:
    """Rows [rows, width] at length 1 in float64; `what` and `names` (per row) are for errors.

    Raises ParityError for values that are not floating point, a NaN, an infinity or a zero vector.
    """
    if vectors.dtype.kind != "f":
        raise ParityError(
            f"{what} is not floating point",
            evidence=f"its values are {vectors.dtype}",
            fix="compare the embeddings themselves, in float32",
        )
    doubles = vectors.astype(np.float64)
    broken = np.flatnonzero(~np.isfinite(doubles).all(axis=1))
    if len(broken):
        raise ParityError(
            f"{what} has a NaN or an infinity",
            evidence=_which(broken, names),
            fix="find the operator that overflows: build in fp32, or keep it in float32",
        )
    # scaled by the largest value first: a square would overflow beyond 1e154
    scales = np.abs(doubles).max(axis=1, keepdims=True)
    empty = np.flatnonzero(scales[:, 0] == 0)
    if len(empty):
        raise ParityError(
            f"{what} is a vector of length zero",
            evidence=_which(empty, names),
            fix="find the text without tokens, or the output that was never written",
        )
    doubles /= scales
    doubles /= np.linalg.norm(doubles, axis=1, keepdims=True)
    return doubles


def _check_embeddings(
    reference: np.ndarray,
    candidate: np.ndarray,
    *,
    sides: tuple[str, str] = ("the reference", "the candidate"),
    languages: Sequence[str] = (),
    least: int = 2,
) -> int:
    """The number of texts; ParityError unless both sides are [texts, dimension] of one shape.

    `least` is 2 for a comparison: one text has neither a pair nor a neighbour.
    """
    shapes = f"{sides[0]}: {list(reference.shape)}, {sides[1]}: {list(candidate.shape)}"
    if reference.ndim != 2 or candidate.ndim != 2:
        raise ParityError(
            "embeddings are not a table",
            evidence=shapes,
            fix="give each side one row per text: [texts, dimension]",
        )
    if len(reference) != len(candidate):
        fewer = min(len(reference), len(candidate))
        raise ParityError(
            "the two sides have different numbers of embeddings",
            evidence=f"{shapes}; {_name(fewer, languages)} is the first on one side only",
            fix="run both sides on the same texts; find the output that was dropped",
        )
    if len(reference) < least:
        raise ParityError(
            f"too few texts to compare: {len(reference)}",
            evidence=f"{shapes}; at least {least} needed",
            fix="give the validation set more texts",
        )
    if reference.shape[1] != candidate.shape[1] or reference.shape[1] == 0:
        raise ParityError(
            "the two sides differ in width, or have none",
            evidence=shapes,
            fix="compare the same output of both sides, at full dimension",
        )
    return len(reference)


def _check_labels(labels: Labels, texts: int, width: int) -> None:
    """Raise ParityError unless there is one label per text and every dimension is there."""
    fields: dict[str, tuple[Any, ...]] = {"languages": labels.languages, "lengths": labels.lengths}
    if labels.kinds:
        fields["kinds"] = labels.kinds
    for field, values in fields.items():
        if len(values) != texts:
            raise ParityError(
                f"labels do not fit the texts: {len(values)} {field} for {texts} texts",
                evidence=f"text {min(len(values), texts)} is the first without its counterpart",
                fix=f"give one of {field} per text, in text order",
            )
    for index, length in enumerate(labels.lengths):
        if length < 1:
            raise ParityError(
                f"{_name(index, labels.languages)} has no tokens",
                evidence=f"its length is {length} tokens",
                fix="drop the text, or count its special tokens too",
            )
    wrong = [dimension for dimension in labels.dimensions if not 1 <= dimension <= width]
    if wrong or width not in labels.dimensions:
        raise ParityError(
            f"there is no dimension {wrong[0]} to compare"
            if wrong
            else f"the full dimension {width} is not among those to compare",
            evidence=f"the embeddings have {width} values, the dimensions are "
            f"{list(labels.dimensions)}",
            fix=f"name dimensions between 1 and {width}, {width} included",
        )


def _name(index: int, languages: Sequence[str]) -> str:
    """A text in words, with its language when that is known."""
    known = index < len(languages)
    return f"text {index} (language '{languages[index]}')" if known else f"text {index}"


def _which(rows: Integers, names: Sequence[str]) -> str:
    """The first of the broken rows by name, and how many more there are."""
    return names[int(rows[0])] + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _bucket_upper(length_tokens: int) -> int:
    """The power of two, at least 2, that ends the length's bucket; 0 tokens do not occur."""
    return min(max(2, 1 << (length_tokens - 1).bit_length()), 2 * LAST_BUCKET_TOKENS)


def _bucket_name(upper: int) -> str:
    """'1-2', '3-4', '5-8' ... '4097-8192', and '8193+' beyond."""
    if upper > LAST_BUCKET_TOKENS:
        return f"{LAST_BUCKET_TOKENS + 1}+"
    return f"{1 if upper == 2 else upper // 2 + 1}-{upper}"
