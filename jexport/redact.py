"""What must not be said: takes credentials out of a text before it becomes an error or a log line.

Knows the shapes that credentials have in addresses, headers and query strings, and no service.
"""

from __future__ import annotations

import re

HIDDEN = "***"

SHAPES = (
    # user:password@ in an address; a ref's own @sha256: is behind a slash and stays
    (re.compile(r"(?<=://)[^/@\s]+@(?!sha256:)"), f"{HIDDEN}@"),
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


def redact(text: str) -> str:
    """The text with everything that looks like a credential hidden."""
    for shape, shown in SHAPES:
        text = shape.sub(shown, text)
    return text


def brief(error: BaseException) -> str:
    """Kind and first line of a library's error, without credentials, in at most 300 characters."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return redact(f"{type(error).__name__}: {first}")[:300]
