"""Text files larger than memory -> one file of embeddings, window by window.

Reads .txt or .jsonl, writes .npy or .jsonl under a temporary name beside the output and renames it
at the end, so that a reader sees the whole output or none. This module knows no engine and no
artifact.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import IO, Literal, TypeAlias, Unpack

from jexport.errors import DiskFullError, OutputPathError, TextInputError
from jexport.runtime.embedder import Embedder, EncodeOptions
from jexport.runtime.pool import Floats

Kind: TypeAlias = Literal["txt", "jsonl"]

_BOM = b"\xef\xbb\xbf"
_NPY_HEADER_BYTES = 128  # magic and version 8, length 2, then text: room for rows up to 10^40


def read_texts(source: Path | IO[bytes], kind: Kind) -> Iterator[str]:
    """The texts of a file, one a line.

    A byte order mark at the start is dropped, and a final newline starts no further text.

    Args:
        source: a path, or an open binary file.
        kind: 'txt' takes the line without its end (\\n or \\r\\n), and an empty line is an empty
            text; 'jsonl' a string or an object with a "text" string a line, and a blank line is an
            error.

    Returns:
        The texts, read as they are asked for.

    Raises:
        TextInputError: a line is not UTF-8, not JSON or not a text (with its number and bytes), or
            the source cannot be opened.
        ValueError: another kind.
    """
    if kind not in ("txt", "jsonl"):
        raise ValueError(f"kind must be 'txt' or 'jsonl', not {kind!r}")
    if not isinstance(source, Path):
        return _texts(source, kind, str(getattr(source, "name", "input")))
    return _texts_of_file(source, kind)


def _texts_of_file(path: Path, kind: Kind) -> Iterator[str]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise TextInputError(
            "embed: the input cannot be opened",
            evidence=f"{path}: {error.strerror}",
            fix="name a readable .txt or .jsonl file, or - for standard input",
        ) from error
    with file:
        yield from _texts(file, kind, str(path))


def _texts(lines: Iterable[bytes], kind: Kind, name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith(_BOM):
            line = line.removeprefix(_BOM)
            if not line:  # a file of nothing but a byte order mark has no line
                return
        content = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
        where = f"{name}, line {number}"
        yield _json_text(content, where) if kind == "jsonl" else _decode(content, where)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        near = line[max(0, error.start - 20) : error.start + 20]
        raise TextInputError(
            "embed: a line is not UTF-8",
            evidence=f"{where}, byte {error.start} of the line, in {near!r}",
            fix="convert the file, for example: iconv -f latin1 -t utf-8 IN > OUT",
        ) from error


def _json_text(line: bytes, where: str) -> str:
    """The text of one .jsonl line; its escapes may not spell a lone surrogate."""
    content = _decode(line, where)
    shown = f"{where}: {line[:80]!r}"
    fix = 'make each line a JSON string or an object like {"text": "..."}'
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = "embed: a line is not JSON" if line.strip() else "embed: a blank line in .jsonl"
        raise TextInputError(what, evidence=f"{shown}\n{error}", fix=fix) from error
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        if isinstance(entry, dict):
            evidence = f'"text" is {type(text).__name__}' if "text" in entry else 'no "text"'
        else:
            evidence = f"the line is {type(entry).__name__}"
        raise TextInputError("embed: a line has no text", evidence=f"{shown}\n{evidence}", fix=fix)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextInputError(
            "embed: a line escapes half of a surrogate pair",
            evidence=f"{shown}\ncharacter {error.start} of its text is {text[error.start]!a}",
            fix="write the whole pair, or the character itself in UTF-8",
        ) from error
    return text


def embed_stream(
    embedder: Embedder,
    texts: Iterable[str],
    output: Path,
    *,
    window: int = 4096,
    on_progress: Callable[[int], None] | None = None,
    **options: Unpack[EncodeOptions],
) -> int:
    """Embed texts into a file, one row a text in the order they come.

    On any exception the temporary file is removed and an existing output stays as it was.

    Args:
        embedder: what embeds them.
        texts: read a window at a time.
        output: .npy: float32 [rows, d], also for zero rows. .jsonl: one array of floats a line,
            each the shortest decimal that gives the same float32 again.
        window: so many texts are in memory at a time, sorted by length together.
        on_progress: called after each forward pass with how many texts it held.
        options: as in `Embedder.encode`; its errors number texts from 0 over the whole stream.

    Returns:
        The rows written.

    Raises:
        ValueError: `window` is below 1.
        OutputPathError: `output` cannot be written, or its name ends otherwise.
        DiskFullError: the disk is full.
        Exception: what `encode` and `texts` raise.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    form = _form_of(output)
    columns = embedder.encode([], **options).shape[1]  # refuses bad options before any text is read
    rows, coming = 0, iter(texts)
    with _atomic_file(output) as file:
        _write(file, form.header(0, columns))
        while batch := list(islice(coming, window)):
            vectors = embedder.encode(batch, on_batch=on_progress, first_index=rows, **options)
            _write(file, form.rows(vectors))
            rows += len(batch)
            del batch, vectors  # else the next window is read while this one is still held
        file.seek(0)
        _write(file, form.header(rows, columns))
    return rows


def _npy_header(rows: int, columns: int) -> bytes:
    """Header of a .npy file, format 1.0, always 128 bytes so that it can be written again in place.

    Source: numpy.lib.format (magic, version, header length, a dict literal padded with spaces).
    """
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    text = shape.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _npy_rows(vectors: Floats) -> bytes:
    return vectors.astype("<f4", copy=False).tobytes()


def _jsonl_rows(vectors: Floats) -> bytes:
    # str() of a numpy float32 is its shortest round trip: 490 ns a value, json.dumps takes 450.
    return "".join(f"[{', '.join(map(str, row))}]\n" for row in vectors).encode()


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One output format: the bytes before all rows, always of one length, and the bytes of rows."""

    header: Callable[[int, int], bytes]
    rows: Callable[[Floats], bytes]


_FORMS = {
    ".npy": _Form(header=_npy_header, rows=_npy_rows),
    ".jsonl": _Form(header=lambda rows, columns: b"", rows=_jsonl_rows),
}


def _form_of(output: Path) -> _Form:
    """The format that the output's ending names; refuses a place that cannot be written to."""
    if output.suffix.lower() not in _FORMS:
        raise OutputPathError(
            f"embed: cannot write '{output.suffix or output.name}'",
            evidence=f"{output} ends in none of {', '.join(_FORMS)}",
            fix="name an output that ends in .npy (float32 rows) or .jsonl (an array a line)",
        )
    with _clear_errors(output):
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return _FORMS[output.suffix.lower()]


@contextmanager
def _atomic_file(output: Path) -> Iterator[FileIO]:
    """A new file beside `output` that takes its name at the end, or vanishes on any exception."""
    target = output.resolve()  # a link stays one: what it names is replaced
    # 60 characters are at most 240 bytes, of the 255 that a name may have.
    temporary = target.with_name(f".{target.name[:60]}.{secrets.token_hex(4)}.tmp")
    try:
        with _clear_errors(output):
            # Unbuffered: closing then writes nothing, so it cannot fail again on a full disk.
            opened = temporary.open("xb", buffering=0)
        with opened as file:
            yield file
            with _clear_errors(output):
                os.fsync(file.fileno())
        with _clear_errors(output):
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write(file: FileIO, content: bytes) -> None:
    """Write all of it: an unbuffered write may take a part only."""
    rest = memoryview(content)
    with _clear_errors(Path(str(file.name))):
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says about `path` into DiskFullError or OutputPathError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                "embed: the disk is full, or a quota is reached",
                evidence=f"writing {path}: {error.strerror}",
                fix="free space there, or write to another place; nothing was left behind",
            ) from error
        raise OutputPathError(
            "embed: the output cannot be written",
            evidence=f"{path}: {error.strerror}",
            fix="name a file in a folder that exists and that you may write to",
        ) from error
