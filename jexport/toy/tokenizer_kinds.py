"""Tokenizers of the kinds that embedders have, made on the spot from the toy's own sentences.

WordPiece (BERT), Unigram (XLM-R, T5), BPE over bytes (Qwen, ModernBERT) and BPE with byte fallback
(Gemma). Always the same for the same description; every letter of common scripts is in them.

Knows no model and no file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jexport.toy.tokenizer import SENTENCES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECES = 600
"""Entries that are learned from SENTENCES, special tokens and single letters aside."""

LONGEST_PIECE = 8
SPACE = "▁"
SCRIPTS = (
    (0x21, 0x7E),
    (0xA1, 0x17F),  # Latin with marks
    (0x1A0, 0x1B0),
    (0x1EA0, 0x1EF9),  # Vietnamese
    (0x370, 0x3CE),  # Greek
    (0x400, 0x45F),  # Cyrillic
    (0x531, 0x587),  # Armenian
    (0x5D0, 0x5EA),  # Hebrew
    (0x620, 0x652),  # Arabic
    (0x901, 0x96F),  # Devanagari
    (0x981, 0x9EF),  # Bengali
    (0xA01, 0xA75),  # Gurmukhi
    (0xA81, 0xAEF),  # Gujarati
    (0xB82, 0xBEF),  # Tamil
    (0xC01, 0xC6F),  # Telugu
    (0xC82, 0xCEF),  # Kannada
    (0xD02, 0xD6F),  # Malayalam
    (0xD82, 0xDF4),  # Sinhala
    (0xE01, 0xE5B),  # Thai
    (0x10D0, 0x10FF),  # Georgian
    (0x1200, 0x1357),  # Ethiopic
    (0x3041, 0x30FA),  # Kana
)
"""First and last code points of letters that a tokenizer has beside those of SENTENCES."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer to make.

    Args:
        kind: one of KINDS.
        first: special tokens, in the order of their ids from 0.
        last: special tokens behind all others.
        template: special tokens around a text, which is `$A`; '' for none.
        unknown: token for what the vocabulary lacks; '' for none.
        lowercase: whether text is lowered first (WordPiece).
        sentinels: how many of T5's <extra_id_N> are behind all others, the highest N first.
    """

    kind: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    template: str = ""
    unknown: str = ""
    lowercase: bool = False
    sentinels: int = 0

    @property
    def special(self) -> tuple[str, ...]:
        """Every special token, in the order in which they get ids."""
        sentinels = (f"<extra_id_{number}>" for number in reversed(range(self.sentinels)))
        return (*self.first, *self.last, *sentinels)


def make(spec: TokenizerSpec) -> Tokenizer:
    """Make a tokenizer.

    Args:
        spec: what it is to be.

    Returns:
        A backend; the ids of `first` begin at 0, those of `last` end the vocabulary.
    """
    from tokenizers import AddedToken, processors

    tokenizer: Tokenizer = KINDS[spec.kind](spec)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in spec.special]
    )
    if spec.template:
        used = [word for word in spec.template.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=spec.template,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(used)],
        )
    return tokenizer


def _wordpiece(spec: TokenizerSpec) -> Tokenizer:
    """BERT's: words are split at spaces and punctuation, later pieces begin with ##."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=spec.lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    split = splitter.pre_tokenize_str(normalizer.normalize_str(" ".join(SENTENCES)))
    pieces = _pieces([SPACE + word for word, _ in split])
    letters = [*_letters(), *sorted({letter for word, _ in split for letter in word})]
    names = [
        *spec.first,
        *(piece[1:] if piece[0] == SPACE else f"##{piece}" for piece in pieces if piece != SPACE),
        *(mark + letter for letter in letters for mark in ("", "##")),
        *spec.last,
    ]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token=spec.unknown, max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _unigram(spec: TokenizerSpec) -> Tokenizer:
    """SentencePiece's, as XLM-R and T5 have it, without its table of normalisations.

    Not trained: a piece's score is the logarithm of its share of all letters. What transformers
    makes of the real files splits at spaces and puts one before each word; so does this.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = _pieces([SPACE + word for word in " ".join(SENTENCES).split()])
    total = sum(pieces.values())
    scores = {token: 0.0 for token in spec.first}
    scores |= {piece: math.log(letters / total) for piece, letters in pieces.items()}
    lowest = min(scores.values()) - 1
    for letter in (SPACE, *sorted(set("".join(SENTENCES).replace(" ", ""))), *_letters()):
        scores.setdefault(letter, lowest)
    # No two ways to split a word may score the same: the library may then take either.
    for rank, piece in enumerate([*scores][len(spec.first) :], 1):
        scores[piece] -= math.sqrt(rank) / 100
    unknown = [*scores].index(spec.unknown)
    tokenizer = Tokenizer(
        models.Unigram(vocab=[*scores.items()], unk_id=unknown, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _byte_bpe(spec: TokenizerSpec) -> Tokenizer:
    """BPE over bytes, split by the expression of GPT-2 (ModernBERT's)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        show_progress=False,
        special_tokens=list(spec.first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _qwen_bpe(spec: TokenizerSpec) -> Tokenizer:
    """BPE over bytes, split by Qwen's expression, which transformers knows."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = _byte_bpe(spec)
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def _fallback_bpe(spec: TokenizerSpec) -> Tokenizer:
    """Gemma's: spaces are letters, and what the vocabulary lacks becomes its UTF-8 bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.Replace(" ", SPACE)
    splitter = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    learned = Tokenizer(models.BPE(unk_token=spec.unknown))
    learned.normalizer = normalizer
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, show_progress=False, special_tokens=list(spec.first)
    )
    learned.train_from_iterator(SENTENCES, trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary = learned.get_vocab()
    learned_names = sorted(vocabulary, key=vocabulary.__getitem__)
    rest = learned_names[len(spec.first) :]
    names = [*spec.first, *(f"<0x{byte:02X}>" for byte in range(256)), *rest]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token=spec.unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


KINDS: Mapping[str, Callable[[TokenizerSpec], Any]] = {
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "byte-bpe": _byte_bpe,
    "qwen-bpe": _qwen_bpe,
    "fallback-bpe": _fallback_bpe,
}


def _pieces(words: list[str]) -> dict[str, int]:
    """Parts of words that cover most letters, and how many; not learned, so always the same.

    words: SPACE stands before each.
    """
    counts: Counter[str] = Counter()
    for word in words:
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                counts[word[start:end]] += end - start
    best = sorted(counts, key=lambda piece: (-counts[piece], piece))[:PIECES]
    return {piece: counts[piece] for piece in best}


def _letters() -> Iterator[str]:
    """Every letter, mark, digit and sign of SCRIPTS."""
    for start, end in SCRIPTS:
        for number in range(start, end + 1):
            if chr(number).isprintable() and not chr(number).isspace():
                yield chr(number)
