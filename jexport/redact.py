"""What must not be said: takes credentials out of a text before it becomes an error or a log line.

Two strengths of one list. `hidden` takes what can be nothing else: for our own words and a recipe's
values, which speak of tokens and of keys ("max_tokens=512" stays). `redact` takes what may be one
as well: for the words of services and their libraries, where a wrong guess costs little.

Knows the shapes that credentials have in addresses, headers and query strings, and no service.
"""

from __future__ import annotations

import re

HIDDEN = "***"

SURE = (
    # user:password@ in an address; a ref's own @sha256: stays
    (re.compile(r"(?<=://)[^/\s]+@(?!sha256:)"), f"{HIDDEN}@"),
    # a token of the Hugging Face Hub: 34 behind the underscore; hf_transfer is a package
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (
        re.compile(r"((?:[?&](?:token|sig)|-(?:Signature|Security-Token))=)[^&\s'\"]+"),
        rf"\1{HIDDEN}",
    ),
)

LIKELY = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}"), rf"\1 {HIDDEN}"),
    # presigned addresses: everything behind the question mark
    (re.compile(r"(?<=[A-Za-z0-9/_-])\?[^\s'\"<>)]*=[^\s'\"<>)]*"), f"?{HIDDEN}"),
    (
        re.compile(
            r"(?i)([\w-]*(?:password|passwd|secret|token|signature|credential|access_?key|api_?key)"
            r"[\w-]*['\"]?\s*[=:]\s*)(['\"]?)[^\s'\",&}]+\2"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), f"hf_{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), HIDDEN),
)


def hidden(text: str) -> str:
    """Hide what can only be a credential: passwords in addresses, tokens.

    Args:
        text: our own words, or a recipe's values.

    Returns:
        The text, `***` for each.
    """
    for shape, shown in SURE:
        text = shape.sub(shown, text)
    return text


def redact(text: str) -> str:
    """Hide everything that looks like a credential.

    Args:
        text: of a service or its library.

    Returns:
        The text, `***` for each.
    """
    text = hidden(text)
    for shape, shown in LIKELY:
        text = shape.sub(shown, text)
    return text


def brief(error: BaseException) -> str:
    """A library's error in one line.

    Args:
        error: what it raised.

    Returns:
        Kind and first line, without credentials, in at most 300 characters.
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return redact(f"{type(error).__name__}: {first}")[:300]
