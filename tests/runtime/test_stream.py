"""jexport.runtime.stream: reading lines, bounded memory, atomic output, full disks."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jexport.errors import (
    DimensionError,
    DiskFullError,
    OutputPathError,
    TextInputError,
    TextTooLongError,
)
from jexport.runtime import Embedder, TextTokenizer
from jexport.runtime.stream import embed_stream, read_texts
from jexport.types import Embedding, Runner, Tensors

REFERENCE = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
DIM = 8


def bag_of_tokens(feeds: Tensors) -> Tensors:
    """A model whose token vectors are waves of the token id."""
    phase = feeds["input_ids"][:, :, None] * np.arange(1, DIM + 1)
    return {"last_hidden_state": np.sin(phase).astype(np.float32)}


def make(
    runner: Runner = bag_of_tokens, streams: Callable[[], Sequence[Runner]] | None = None
) -> Embedder:
    return Embedder(
        tokenizer=TextTokenizer.open(REFERENCE, max_tokens=32),
        runner=runner,
        streams=streams,
        embedding=Embedding(
            task="none",
            prompt="",
            pooling="mean",
            normalize=True,
            dimension=DIM,
            matryoshka=(4, 8),
            max_tokens=32,
        ),
        outputs=["last_hidden_state"],
    )


@pytest.fixture
def embedder() -> Embedder:
    return make()


TEXTS = [f"text {'word ' * (n % 7)}{n}" for n in range(25)]


def only_file(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# read_texts


def txt(content: bytes) -> list[str]:
    return list(read_texts(io.BytesIO(content), "txt"))


def jsonl(content: bytes) -> list[str]:
    return list(read_texts(io.BytesIO(content), "jsonl"))


def test_txt_lines() -> None:
    assert txt(b"") == []
    assert txt(b"one") == txt(b"one\n") == txt(b"one\r\n") == ["one"]
    assert txt(b"one\n\n two \r\n") == ["one", "", " two "]
    assert txt(b"\n") == [""]
    assert txt(b"a\rb\n\x0bc\x85".replace(b"\x85", b"\xc2\x85")) == ["a\rb", "\x0bc\x85"]
    assert txt(b"a\r") == ["a\r"]


def test_a_byte_order_mark_is_dropped() -> None:
    assert txt(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n") == ["one", "\ufefftwo"]
    assert txt(b"\xef\xbb\xbf") == []
    assert jsonl(b"\xef\xbb\xbf") == []
    assert jsonl(b'\xef\xbb\xbf"one"\n') == ["one"]


def test_jsonl_lines() -> None:
    content = b'"one"\n{"text": "two", "id": 7}\r\n"\\u00e9 \\ud83d\\ude42"\n""'
    assert jsonl(content) == ["one", "two", "\u00e9 \U0001f642", ""]


@given(texts=st.lists(st.text().filter(lambda text: "\n" not in text and "\r" not in text)))
def test_txt_round_trip(texts: list[str]) -> None:
    if texts and texts[0].startswith("\ufeff"):
        return
    assert txt("".join(f"{text}\n" for text in texts).encode()) == texts


@given(texts=st.lists(st.text()))
def test_jsonl_round_trip(texts: list[str]) -> None:
    assert jsonl("\n".join(map(json.dumps, texts)).encode()) == texts


def test_a_path_is_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\n\xff\n")
    texts = read_texts(path, "txt")
    assert next(texts) == "one"
    with pytest.raises(TextInputError) as caught:
        next(texts)
    assert f"{path}, line 2" in caught.value.evidence


def test_a_line_that_is_not_utf8() -> None:
    with pytest.raises(TextInputError, match="not UTF-8") as caught:
        txt(b"fine\ncaf\xe9 au lait\n")
    assert "line 2" in caught.value.evidence
    assert r"caf\xe9 au" in caught.value.evidence
    with pytest.raises(TextInputError, match="not UTF-8"):
        jsonl(b'"caf\xe9"\n')
    with pytest.raises(TextInputError, match="not UTF-8"):
        txt("utf-16".encode("utf-16"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "not JSON"),
        (b"plain words", "not JSON"),
        (b"", "a blank line"),
        (b"  ", "a blank line"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "has no text"),
        (b"null", "has no text"),
        (b'["a"]', "has no text"),
        (b'{"txt": "a"}', "has no text"),
        (b'{"text": null}', "has no text"),
        (b'{"text": ["a"]}', "has no text"),
        (b'"\\ud83d alone"', "half of a surrogate pair"),
    ],
)
def test_a_bad_jsonl_line(line: bytes, what: str) -> None:
    with pytest.raises(TextInputError, match=what) as caught:
        jsonl(b'"fine"\n' + line + b'\n"fine"\n')
    assert "line 2" in caught.value.evidence
    assert repr(line[:80]) in caught.value.evidence
    str(caught.value).encode()


def test_an_input_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(TextInputError, match="cannot be opened") as caught:
            next(read_texts(path, "txt"))
        assert str(path) in caught.value.evidence


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        read_texts(io.BytesIO(), "csv")  # type: ignore[arg-type]


# embed_stream


@pytest.mark.parametrize("window", [1, 4, 25, 4096])
def test_npy_rows_are_in_input_order(tmp_path: Path, embedder: Embedder, window: int) -> None:
    output = tmp_path / "out.npy"
    done: list[int] = []
    rows = embed_stream(embedder, iter(TEXTS), output, window=window, on_progress=done.append)
    assert rows == sum(done) == 25
    vectors = np.load(output, allow_pickle=False)
    assert vectors.dtype == np.float32
    assert vectors.shape == (25, DIM)
    np.testing.assert_allclose(vectors, embedder.encode(TEXTS), atol=1e-6)
    np.testing.assert_array_equal(np.load(output, mmap_mode="r"), vectors)
    assert only_file(tmp_path) == ["out.npy"]


def test_texts_may_be_a_list(tmp_path: Path, embedder: Embedder) -> None:
    texts = [f"text {n}" for n in range(5)]
    assert embed_stream(embedder, texts, tmp_path / "v.npy", window=2) == 5
    assert np.array_equal(np.load(tmp_path / "v.npy"), embedder.encode(texts))


def test_jsonl_is_the_shortest_round_trip(tmp_path: Path, embedder: Embedder) -> None:
    output = tmp_path / "out.jsonl"
    assert embed_stream(embedder, iter(TEXTS), output, window=7, normalize=False) == 25
    lines = output.read_text().splitlines()
    read = np.array([json.loads(line) for line in lines], dtype=np.float32)
    np.testing.assert_array_equal(read, embedder.encode(TEXTS, normalize=False))
    first = lines[0].strip("[]").split(", ")
    assert first == [str(number) for number in read[0]]
    assert max(map(len, first)) < 16


def test_options_reach_the_embedder(tmp_path: Path, embedder: Embedder) -> None:
    output = tmp_path / "out.NPY"
    embed_stream(embedder, iter(TEXTS), output, dimensions=4, normalize=False, prompt="query: ")
    expected = embedder.encode(TEXTS, dimensions=4, normalize=False, prompt="query: ")
    np.testing.assert_allclose(np.load(output), expected, atol=1e-6)


def test_no_texts(tmp_path: Path, embedder: Embedder) -> None:
    assert embed_stream(embedder, iter([]), tmp_path / "out.npy", dimensions=4) == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 4)
    assert embed_stream(embedder, iter([]), tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=20), window=st.integers(1, 8))
def test_any_window_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], window: int
) -> None:
    embedder = Embedder(
        tokenizer=TextTokenizer.open(REFERENCE, max_tokens=32),
        runner=bag_of_tokens,
        embedding=Embedding(
            task="none",
            prompt="p: ",
            pooling="mean",
            normalize=True,
            dimension=DIM,
            matryoshka=(),
            max_tokens=32,
        ),
        outputs=["last_hidden_state"],
    )
    output = tmp_path_factory.mktemp("window") / "out.npy"
    assert embed_stream(embedder, iter(texts), output, window=window) == len(texts)
    np.testing.assert_allclose(np.load(output), embedder.encode(texts), atol=1e-6)


class Text(str):
    """A str whose life can be followed."""


def test_only_one_window_is_in_memory(tmp_path: Path, embedder: Embedder) -> None:
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def texts() -> Iterator[str]:
        nonlocal most
        for number in range(100):
            text = Text(f"text {number}")
            alive.add(text)
            most = max(most, len(alive))
            yield text

    assert embed_stream(embedder, texts(), tmp_path / "out.npy", window=10) == 100
    assert most <= 11  # the window, and the one that the generator still holds


def test_a_window_without_room(tmp_path: Path, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="window"):
        embed_stream(embedder, iter(TEXTS), tmp_path / "out.npy", window=0)


def test_errors_number_texts_over_the_whole_stream(tmp_path: Path, embedder: Embedder) -> None:
    texts: list[Any] = [*TEXTS, "long " * 40]
    with pytest.raises(TextTooLongError, match="text 25 is too long"):
        embed_stream(embedder, iter(texts), tmp_path / "out.npy", window=4, truncate=False)
    texts[13] = None
    with pytest.raises(TextInputError, match="text 13 is not a str"):
        embed_stream(embedder, iter(texts), tmp_path / "out.npy", window=4)
    assert only_file(tmp_path) == []


# a whole file or none


class Trouble(BaseException):
    """What a test throws into the stream."""


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_an_exception_leaves_the_old_output(
    tmp_path: Path, embedder: Embedder, error: type[BaseException], name: str
) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise error("stop")

    output = tmp_path / name
    output.write_bytes(b"old")
    with pytest.raises(error, match="stop"):
        embed_stream(embedder, texts(), output, window=4)
    assert output.read_bytes() == b"old"
    assert only_file(tmp_path) == [name]
    embed_stream(embedder, iter(TEXTS), output, window=4)
    assert output.read_bytes() != b"old"
    assert only_file(tmp_path) == [name]


MANY_TEXTS = [f"{number} " + "word " * (number % 5) for number in range(300)]


def test_windows_in_streams_give_the_same_file(tmp_path: Path) -> None:
    options: Any = {"window": 64, "max_batch_tokens": 1}
    rows = embed_stream(make(), iter(MANY_TEXTS), tmp_path / "one.npy", **options)
    in_streams = make(streams=lambda: [bag_of_tokens, lambda feeds: bag_of_tokens(feeds)])
    assert embed_stream(in_streams, iter(MANY_TEXTS), tmp_path / "two.npy", **options) == rows
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


@pytest.mark.parametrize("whose", ["engine", "caller"])
def test_an_error_in_a_later_window_in_streams_leaves_nothing(tmp_path: Path, whose: str) -> None:
    count = itertools.count()

    def engine(feeds: Tensors) -> Tensors:
        if whose == "engine" and next(count) == 100:
            raise Trouble
        return bag_of_tokens(feeds)

    def caller(rows: int) -> None:
        if whose == "caller" and next(count) == 100:
            raise Trouble

    in_streams = make(runner=never_run, streams=lambda: [engine, lambda feeds: engine(feeds)])
    with pytest.raises(Trouble):
        embed_stream(
            in_streams,
            iter(MANY_TEXTS),
            tmp_path / "out.npy",
            window=64,
            max_batch_tokens=1,
            on_progress=caller,
        )
    assert only_file(tmp_path) == []
    assert not [one for one in threading.enumerate() if one.name.startswith("jexport-stream")]


def never_run(feeds: Tensors) -> Tensors:
    raise AssertionError("the windows are large enough for streams")


def test_the_output_appears_at_the_end(tmp_path: Path, embedder: Embedder) -> None:
    output = tmp_path / "out.npy"

    def texts() -> Iterator[str]:
        for text in TEXTS:
            assert not output.exists()
            yield text

    embed_stream(embedder, texts(), output, window=4)
    assert output.exists()


def test_a_link_stays_one(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.npy").symlink_to(tmp_path / "disk" / "real.npy")
    embed_stream(embedder, iter(TEXTS), tmp_path / "out.npy")
    assert (tmp_path / "out.npy").is_symlink()
    assert only_file(tmp_path / "disk") == ["real.npy"]


def test_a_long_name(tmp_path: Path, embedder: Embedder) -> None:
    name = "\u6587" * 80 + ".npy"  # 244 bytes
    embed_stream(embedder, iter(TEXTS), tmp_path / name)
    assert only_file(tmp_path) == [name]


def test_the_output_has_the_usual_permissions(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "usual").touch()
    embed_stream(embedder, iter(TEXTS), tmp_path / "out.npy")
    assert (tmp_path / "out.npy").stat().st_mode == (tmp_path / "usual").stat().st_mode


class FullFile(io.FileIO):
    """A file on a disk with room for 300 bytes."""

    code = errno.ENOSPC

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > 300:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(content)


class QuotaFile(FullFile):
    code = errno.EDQUOT


class ChoosyFile(io.FileIO):
    """A file that takes 50 bytes at a time."""

    def write(self, content: Any) -> int:
        return super().write(content[:50])


def open_as(monkeypatch: pytest.MonkeyPatch, kind: type[io.FileIO]) -> None:
    def opened(path: Path, mode: str, buffering: int) -> io.FileIO:
        assert buffering == 0
        return kind(path, mode)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("kind", [FullFile, QuotaFile])
@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_a_full_disk(
    tmp_path: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[io.FileIO],
    name: str,
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with monkeypatch.context() as patch:
        open_as(patch, kind)
        with pytest.raises(DiskFullError, match="disk is full") as caught:
            embed_stream(embedder, iter(TEXTS), tmp_path / name, window=4)
    assert name in caught.value.evidence
    assert (tmp_path / name).read_bytes() == b"old"
    assert only_file(tmp_path) == [name]


def test_a_file_size_limit_of_the_system(tmp_path: Path, embedder: Embedder) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        with pytest.raises(DiskFullError):
            embed_stream(embedder, iter(TEXTS), tmp_path / "out.npy", window=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only_file(tmp_path) == []


def test_partial_writes_are_finished(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        open_as(patch, ChoosyFile)
        embed_stream(embedder, iter(TEXTS), tmp_path / "out.npy", window=4)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), embedder.encode(TEXTS), atol=1e-6)


def never() -> Iterator[str]:
    raise AssertionError("no text is read for an output that cannot be written")
    yield ""


def test_places_that_cannot_be_written_to(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.npy").mkdir()
    for name in ("missing/out.npy", "file/out.npy", "folder.npy", "n" * 300 + ".npy"):
        with pytest.raises(OutputPathError) as caught:
            embed_stream(embedder, never(), tmp_path / name)
        assert str(tmp_path / name) in caught.value.evidence
    assert only_file(tmp_path) == ["file", "folder.npy"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path: Path, embedder: Embedder) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputPathError, match="cannot be written"):
            embed_stream(embedder, never(), tmp_path / "out.npy")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["out.csv", "out", "out.npz"])
def test_an_unknown_ending(tmp_path: Path, embedder: Embedder, name: str) -> None:
    with pytest.raises(OutputPathError, match="cannot write") as caught:
        embed_stream(embedder, never(), tmp_path / name)
    assert ".npy, .jsonl" in caught.value.evidence


def test_bad_options_are_refused_before_any_text(tmp_path: Path, embedder: Embedder) -> None:
    with pytest.raises(DimensionError):
        embed_stream(embedder, never(), tmp_path / "out.npy", dimensions=99)
    assert only_file(tmp_path) == []
