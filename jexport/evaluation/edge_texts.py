"""Texts that tokenizers get wrong: made here, since most of them cannot be seen in a file.

Each is one where some tokenizer of a public checkpoint gave other ids after it was saved, converted
or opened by another library. Knows no tokenizer: lengths are measured by the function it is given.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

EDGE = "edge"
"""The language of these texts."""

SPACES = (" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", "\u200b")
"""White space: ASCII, no-break, em, ideographic, next line, line separator, and zero width."""

SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "<|endoftext|>",
    "<|im_start|>",
    "<bos>",
    "<eos>",
)
"""Special tokens of well-known tokenizers, as somebody may write them in a text."""

WORD = "Harbour"
PHRASE = f"{WORD} lights at night"

CHARACTERS = (
    "",
    "bell\x07 and escape\x1b[0m and nul\x00 in it",
    "\x00",
    "soft\u00adhyphen, word\u2060joiner, zero\u200bwidth\u200cnon\u200djoiner",
    "\u200d\u200c\u200b",
    "\ufeffa byte order mark in front",
    "private \ue000 and unassigned \u0378 and noncharacter \uffff",
    "replacement \ufffd \ufffd",
    "\uff76\uff9e\uff77\uff9e\uff78\uff9e \uff8a\uff9f\uff9d \uff83\uff9e\uff8a\uff9e\uff72\uff7d",
    "\uff26\uff55\uff4c\uff4c\u3000\uff37\uff49\uff44\uff54\uff48 \uff11\uff12\uff13\uff01",
    "\u1100\u1161\u11a8\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\ud55c\uae00\uacfc \u1112\u1161\u11ab\u1100\u1173\u11af",
    "a\u0301e\u0302\u0323o\u0308\u0304 z\u0335\u0336\u0337\u0338 \u0301alone",
    "caf\u00e9 cafe\u0301 CAFE\u0301 stra\u00dfe STRASSE \u1e9e",
    "\u0130stanbul I\u0307 \u0131 \u0130\u0131",
    "\ufb01ligature \u2460 \u00bd \u33a5 \u2122 \u212b \u2167",
    "\u1e69 s\u0323\u0307 s\u0307\u0323",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd "
    "\U0001f1f3\U0001f1f1 \u2764\ufe0f \u2764 1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f\U0001f680",
    "\u202eright to left\u202c \u200f\u200e \u2067isolate\u2069",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627 "
    "\u0627\u0644\u0639\u0640\u0640\u0627\u0644\u0645"
    " \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
    "\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48\u0e44\u0e21\u0e48"
    "\u0e21\u0e35\u0e0a\u0e48\u0e2d\u0e07\u0e27\u0e48\u0e32\u0e07",
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f \u09a8"
    "\u09cd\u09a6\u09cd\u09b0 \u0baa\u0bc6\u0bbe\u0ba9\u0bcd",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3001"
    "\u4eba\u53e3\u306f1400\u4e07\u4eba\u3002",
    "\U00020bb7\u91ce\u5bb6 \U0001d54f \U00010348 \u16a0\u16a2\u16a6",
    "\u2581under\u2581bar \u2581 ##piece \u0120byte",
    "ALL UPPER CASE And Title Case and lower",
    "don't won't it's John's \u2019tis \u201cquoted\u201d \u2014 dash\u2026 e.g. U.S.A.",
    "1234567890 3.14159 1,000,000 0x1F 12:30 2026-11-28",
    "https://example.org/a_b?c=d&e=%20#f user@example.org snake_case camelCase",
    '{"json": [1, 2, null]} <b>bold</b> &amp; \\n \\u0041 C:\\new',
    "!!! ??? ... --- *** ((())) ```",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "multiple   spaces    inside\t\ttabs\n\n\nand lines",
)

LONG_CHARACTERS = 20_000


def short() -> tuple[str, ...]:
    """The texts that are the same for every checkpoint: white space, characters, special tokens."""
    texts: list[str] = []
    for space in SPACES:
        texts += [
            space,
            space + PHRASE,
            PHRASE + space,
            f"{space}{WORD}{space}{space}lights{space}",
        ]
    for text in CHARACTERS:
        texts += [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))]
    for token in SPECIAL:
        texts += [token, f"{PHRASE} {token} and{token}on", f"{token}{WORD}", f" {token} "]
    return tuple(dict.fromkeys(texts))


def with_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """A text for each added token: with spaces around it, and inside a word.

    Args:
        tokens: what the tokenizer finds in a text before its model sees it.

    Returns:
        The texts, in the order of the tokens.
    """
    return tuple(f"one {token} two{token}three  {token}" for token in tokens)


def long(text_of: Callable[[int], str], limit: int) -> tuple[str, ...]:
    """Texts around a length limit, and long ones that have no space or nothing but one word.

    Args:
        text_of: a text of exactly so many tokens, '' where there is none.
        limit: in tokens, special tokens included.

    Returns:
        Those of limit, limit + 1 and limit - 1 tokens where `text_of` has them, then the long ones.
    """
    around = [text_of(limit + more) for more in (0, 1, -1)]
    endless = ("x" * LONG_CHARACTERS, "\u6771\u4eac" * (LONG_CHARACTERS // 2))
    return tuple(text for text in (*around, *endless, f"{PHRASE} " * (limit // 2)) if text)
