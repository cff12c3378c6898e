"""docs/checkpoint-keys.md, made from the tables in keys.py.

`python -m jexport.checkpoints.keys_page > docs/checkpoint-keys.md` writes it; a test compares.
"""

from __future__ import annotations

import sys

from jexport.checkpoints import keys

HEAD = """\
# Keys of a checkpoint

What becomes of every key that sentence-transformers, transformers and peft read in a checkpoint's
files. This page is made from `jexport/checkpoints/keys.py`; a test fails when the installed
libraries read a key that it lacks.

- **honoured**: it takes effect in every artifact.
- **refused**: it would change vectors and jexport does not have it: the build stops and names it.
  Null and empty values, and those in brackets, ask for nothing and pass.
- **harmless**: it changes no vector.
"""


def text() -> str:
    """The whole page, as Markdown."""
    parts = [HEAD]
    for file in keys.FILES:
        rows = [_row(f"`{name}`", key) for name, key in file.keys.items()]
        rows.append(_row("any other", file.unknown))
        parts.append(f"\n## {file.title}\n\n| key | | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(parts)


def _row(name: str, key: keys.Key) -> str:
    accepted = ", ".join(f"`{value}`" for value in key.accepted)
    effect = f"{key.effect} (but {accepted})" if accepted else key.effect
    return f"| {name} | {effect} | {key.why.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    sys.stdout.write(text())
