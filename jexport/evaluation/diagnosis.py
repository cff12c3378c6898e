"""Which key of a checkpoint is likely to be behind a difference: words for whoever mends it.

Only asked once two sides differ. It decides nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from jexport.runtime.pool import MODES, finish, pool

SAME = 0.9999
"""Cosine from which two vectors are taken for the same one, computed otherwise."""

FAR = 0.99
"""Cosine below which no precision explains a difference."""

LENGTHS = 0.2
"""Share by which no precision makes a vector longer or shorter."""

SHOWN = 3
SHOWN_CHARACTERS = 60
CLOSED_CLASS = ("Cc", "Cf", "Co", "Cn", "Cs")


def _without_marks(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def _without_control(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) not in CLOSED_CLASS)


VARIANTS: Sequence[tuple[str, Callable[[str], str]]] = (
    ("white space at the end is dropped: normalizer Strip in tokenizer.json", str.rstrip),
    ("white space at both ends is dropped: normalizer Strip in tokenizer.json", str.strip),
    (
        "white space is joined: normalizer or pre_tokenizer in tokenizer.json",
        lambda text: " ".join(text.split()),
    ),
    ("lower case: do_lower_case in sentence_bert_config.json or tokenizer_config.json", str.lower),
    ("accents are dropped: strip_accents in tokenizer_config.json", _without_marks),
    ("NFC: normalizer in tokenizer.json", lambda text: unicodedata.normalize("NFC", text)),
    ("NFD: normalizer in tokenizer.json", lambda text: unicodedata.normalize("NFD", text)),
    ("NFKC: normalizer in tokenizer.json", lambda text: unicodedata.normalize("NFKC", text)),
    ("control characters are dropped: clean_text in tokenizer.json", _without_control),
)
"""What the checkpoint's tokenizer may do to a text that the artifact's does not."""


def of_ids(
    text: str,
    library: Sequence[int],
    artifact: Sequence[int],
    *,
    tokenize: Callable[[str], list[int]],
    prompt: str,
    limits: tuple[int, int],
) -> str:
    """The likely key behind other token ids.

    Args:
        text: without its prompt.
        library: token ids of the reference library.
        artifact: token ids of the artifact.
        tokenize: the artifact's tokenizer, given prompt and text.
        prompt: what the artifact puts before each text.
        limits: the length limits of both, in tokens; 0 for none.

    Returns:
        The key and its file, in words.
    """
    if (
        len(library) != len(artifact)
        and (len(library), len(artifact))[len(library) > len(artifact)] in limits
    ):
        return (
            f"max_seq_length: the checkpoint cuts at {limits[0] or 'no'} tokens, the artifact at "
            f"{limits[1]} (sentence_bert_config.json; model_max_length in tokenizer_config.json)"
        )
    expected = list(library)
    if prompt and tokenize(text) == expected:
        return f"prompt: the checkpoint puts none there, the artifact {prompt!r}"
    for reason, change in VARIANTS:
        if change(text) != text and tokenize(prompt + change(text)) == expected:
            return reason
    start, end = _shared(library, artifact)
    if start + end >= min(len(library), len(artifact)) and start <= 2 < len(library) - len(
        artifact
    ):
        return "prompt: the checkpoint puts one there (config_sentence_transformers.json: prompts)"
    if text.strip() and start and end >= len(tokenize(text)) - 2:
        return f"prompt: the checkpoint puts another one there than {prompt!r}"
    if start == 0 or end == 0:
        return "special tokens around a text: post_processor in tokenizer.json"
    if text != text.strip():
        return "white space: normalizer or pre_tokenizer in tokenizer.json"
    if any(mark in text for mark in ("<", "[")):
        return "added tokens: added_tokens in tokenizer.json, added_tokens.json"
    return "tokenizer.json is not the tokenizer that transformers opens (tokenizer_class)"


def shown(library: Sequence[int], artifact: Sequence[int], text: str) -> str:
    """Where two lists of ids part.

    Args:
        library: token ids of the reference library.
        artifact: token ids of the artifact.
        text: that they are of.

    Returns:
        The text, and the ids of both sides from that place on.
    """
    place = _shared(library, artifact)[0]
    word = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return (
        f"{word!a} at token {place}: the checkpoint has "
        f"{list(library[place : place + SHOWN])} of {len(library)}, the artifact "
        f"{list(artifact[place : place + SHOWN])} of {len(artifact)}"
    )


def _shared(first: Sequence[int], second: Sequence[int]) -> tuple[int, int]:
    """How many ids are the same from the start, and of the rest from the end."""
    least = min(len(first), len(second))
    start = next((n for n in range(least) if first[n] != second[n]), least)
    rest = range(1, least - start + 1)
    end = next((n - 1 for n in rest if first[-n] != second[-n]), least - start)
    return start, end


def of_vectors(
    library: np.ndarray,
    library_tokens: Sequence[np.ndarray],
    artifact_tokens: Sequence[np.ndarray],
    *,
    pooling: str,
) -> str:
    """The likely key behind other vectors of the same token ids.

    Args:
        library: float32 [texts, dimension], the reference library's vectors.
        library_tokens: its token vectors, float32 [tokens, hidden] a text; () where it has none.
        artifact_tokens: the artifact's; () where it gives none.
        pooling: how the artifact pools.

    Returns:
        The key and its file, in words.
    """
    if not library_tokens or not artifact_tokens:
        return "the same token ids give other vectors: pooling (1_Pooling/config.json), weights"
    pairs = zip(library_tokens, artifact_tokens, strict=True)
    if not all(_same(one, other) for one, other in pairs):
        return (
            "the model's states differ before pooling: weights, the task's adapter and its merge, "
            "token_type_ids, position ids"
        )
    fits = [
        mode
        for mode in MODES
        if library.shape[1] == library_tokens[0].shape[1]
        and _same(library, np.stack([_pooled(one, mode) for one in library_tokens]))
    ]
    if fits and pooling not in fits:
        return f"pooling: the checkpoint's is {fits[0]}, the artifact's {pooling} (1_Pooling)"
    return "the states are the same, what follows is not: modules.json (Pooling, Dense, LayerNorm)"


def of_lengths(library: np.ndarray, artifact: np.ndarray) -> str:
    """What the lengths of both sides' vectors say.

    Args:
        library: float32 [texts, dimension], the reference library's vectors.
        artifact: the artifact's, of the same shape.

    Returns:
        The likely key and its file, in words.
    """
    sizes = [np.linalg.norm(side.astype(np.float64), axis=1) for side in (library, artifact)]
    ranges = [f"{one.min():.4g} to {one.max():.4g}" for one in sizes]
    key = "normalisation"
    if abs(sizes[1] - 1).max() < 1e-3:
        key = "no Normalize module in modules.json, and the artifact normalises"
        if sizes[0].max() < 1:
            key = "truncate_dim cuts after Normalize (config_sentence_transformers.json)"
    elif abs(sizes[0] - 1).max() < 1e-3:
        key = "modules.json has a Normalize module, and the artifact is not normalised"
    return f"the checkpoint's lengths are {ranges[0]}, the artifact's {ranges[1]}: {key}"


def _pooled(tokens: np.ndarray, mode: str) -> np.ndarray:
    mask = np.ones((1, len(tokens)), dtype=np.int64)
    vector: np.ndarray = pool(tokens[None], mask, mode)[0]
    return vector


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape:
        return False
    sides = [finish(one, dimensions=None, normalize=True) for one in (first, second)]
    return bool((sides[0] * sides[1]).sum(axis=1).min() >= SAME)
