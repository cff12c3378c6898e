"""Pair: queries go through one artifact, documents through another, and both must belong together.

With a task such as text-matching, or a plain model, one artifact serves both. This module knows no
framework, no engine and no token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, cast

from jexport.artifacts import manifest
from jexport.errors import PairError
from jexport.runtime import prompts
from jexport.runtime.embedder import Embedder, EncodeOptions
from jexport.runtime.open import open_artifact
from jexport.tasks import COUNTERPART, QUERIES

DOCUMENTS = COUNTERPART[QUERIES]

Content = Mapping[str, Any]
Vectors = list[list[float]]


class Options(TypedDict, total=False):
    """How both artifacts are opened, and how they embed.

    Args:
        dimensions: size of the vectors (Matryoshka), None (default) for the full one.
        normalize: to length 1; None (default): as the checkpoint does.
        truncate: cut texts over the length limit (default), else TextTooLongError.
        batch_tokens: tokens of one forward pass, padding included; None (default) for what suits
            the engine.
        device: 'auto' (default), 'cpu' or 'cuda'.
        threads: 0 (default) for all cores.
        verify: check every file's SHA-256 first (default).
    """

    dimensions: int | None
    normalize: bool | None
    truncate: bool
    batch_tokens: int | None
    device: str
    threads: int
    verify: bool


OPEN_OPTIONS = ("device", "threads", "verify")


def _split(options: Options) -> tuple[dict[str, Any], EncodeOptions]:
    """What `open_artifact` takes of them, and what `Embedder.encode` does, in their words.

    Raises:
        TypeError: a name that no option has.
    """
    unknown = sorted(options.keys() - Options.__annotations__.keys())
    if unknown:
        raise TypeError(f"got an unexpected keyword argument '{unknown[0]}'")
    opening = {name: value for name, value in options.items() if name in OPEN_OPTIONS}
    encoding = {
        "max_batch_tokens" if name == "batch_tokens" else name: value
        for name, value in options.items()
        if name not in OPEN_OPTIONS
    }
    return opening, cast(EncodeOptions, encoding)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An open artifact; the lock lets one thread at a time into its engine."""

    model: Embedder
    lock: threading.Lock


class Pair:
    """Embeds queries and documents so that their vectors may be compared; a context manager.

    Opened when made, so a wrong path shows there. Threads may share it: calls on one artifact wait
    for each other (the engine uses every core for one of them), the two artifacts do not. A pickled
    or copied Pair opens its own engines when first used, and only on vectors of the same space.
    name: what was opened: model, and task, engine and version of each artifact. dimension: size of
    every vector.
    """

    def __init__(
        self, queries: str | Path, documents: str | Path | None = None, *, options: Options
    ) -> None:
        """Open both artifacts.

        Args:
            queries: folder of the artifact for queries.
            documents: of the one for documents; None for the same one.
            options: how they are opened, and how they embed.

        Raises:
            PairError: artifacts that do not belong together.
            DimensionError, UnsupportedGraphError: options that one of them does not have. Also
                what `open_artifact` raises.
        """
        self._folders = (str(queries), str(queries if documents is None else documents))
        self._opening, self._encoding = _split(options)
        self._spaces: tuple[str, str] | None = None
        self.name = ""
        self.dimension = 0
        self._begin()
        self._engines()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._opened: tuple[_Opened, _Opened] | None = None
        self._release = contextlib.ExitStack()
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from: everything but the engines and the locks."""
        names = ("_folders", "_opening", "_encoding", "_spaces", "name", "dimension")
        return {key: vars(self)[key] for key in names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make a copy that opens its engines when first used."""
        vars(self).update(state)
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Embed search queries.

        Args:
            texts: without a prompt.

        Returns:
            `dimension` floats for each, in the order given.

        Raises:
            RuntimeError: it is closed.
        """
        return self._embed(self._engines()[0], texts, prompts.QUERY_NAMES)

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Embed what is searched.

        Args:
            texts: without a prompt.

        Returns:
            `dimension` floats for each, in the order given.

        Raises:
            RuntimeError: it is closed.
        """
        return self._embed(self._engines()[1], texts, prompts.DOCUMENT_NAMES)

    def close(self) -> None:
        """Free the engines, after calls that are under way. Twice is harmless.

        Embedding afterwards is a RuntimeError.
        """
        with self._lock, contextlib.ExitStack() as held:
            for lock in {id(one.lock): one.lock for one in self._opened or ()}.values():
                held.enter_context(lock)
            self._closed, self._opened = True, None
            self._release.close()

    def _embed(self, engine: _Opened, texts: Sequence[str], side: tuple[str, ...]) -> Vectors:
        with engine.lock:
            return _encode(engine.model, texts, self._encoding, side)

    def _engines(self) -> tuple[_Opened, _Opened]:
        """Both engines, opened now if they are not: one and the same where one artifact does."""
        with self._lock:
            if self._closed:
                raise RuntimeError("these embeddings are closed")
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> tuple[_Opened, _Opened]:
        # Resolved once: what is opened is what was checked, though `latest` moves in between.
        folders = [Path(folder).resolve() for folder in self._folders]
        contents = [manifest.read(folder).content for folder in folders]
        check_belong(contents[0], contents[1], folders=self._folders)
        self._check_same_spaces(contents)
        alone = contents[0]["sha256"] == contents[1]["sha256"]
        with contextlib.ExitStack() as stack:
            engines = []
            for folder in folders[:1] if alone else folders:
                model = stack.enter_context(open_artifact(folder, **self._opening))
                _encode(model, [], self._encoding)  # refuses options the artifact does not have
                engines.append(_Opened(model=model, lock=threading.Lock()))
            self._release = stack.pop_all()
        parts = [
            f"{c['task']}/{c['target']}-{c['precision']}/{c['version']}"
            for c in contents[: len(engines)]
        ]
        self.name = f"{contents[0]['name']} ({', '.join(parts)})"
        self.dimension = self._encoding.get("dimensions") or contents[0]["embedding"]["dimension"]
        return engines[0], engines[-1]

    def _check_same_spaces(self, contents: Sequence[Content]) -> None:
        """A copy must not embed into another space because `latest` moved on in the meantime."""
        spaces = (contents[0]["embedding"]["space"], contents[1]["embedding"]["space"])
        if self._spaces not in (None, spaces):
            raise PairError(
                "the artifacts are not those that this was copied from",
                evidence=f"{' and '.join(dict.fromkeys(self._folders))} now hold another model",
                fix="name the versions instead of 'latest', and embed everything with one of them",
            )
        self._spaces = spaces


def _encode(
    model: Embedder, texts: Sequence[str], options: EncodeOptions, side: tuple[str, ...] = ()
) -> Vectors:
    """Embed with the prompt of one side of retrieval, where the checkpoint has prompts for both."""
    sided = side and prompts.has_sides(model.embedding)
    name = prompts.name_for(model.embedding, side) if sided else None
    given: EncodeOptions = {**options, "prompt_name": name}
    vectors: Vectors = model.encode(list(texts), **given).tolist()
    return vectors


def check_belong(queries: Content, documents: Content, *, folders: tuple[str, str]) -> None:
    """Refuse two artifacts whose vectors may not be compared.

    They may when one task embeds both into one space (text-matching, or a plain model), or when
    they are retrieval.query and retrieval.passage, in this order, of one checkpoint. Precision and
    engine may differ: each was held against the same reference when it was built.

    Args:
        queries: manifest of the artifact for queries.
        documents: manifest of the one for documents.
        folders: where both are, for the error.

    Raises:
        PairError: they are swapped, of two models, or of tasks that do not go together.
    """
    tasks = (queries["embedding"]["task"], documents["embedding"]["task"])
    evidence = f"queries: {folders[0]} ({tasks[0]})\ndocuments: {folders[1]} ({tasks[1]})"
    if tasks == (DOCUMENTS, QUERIES):
        raise PairError(
            "the artifacts for queries and for documents are swapped",
            evidence=evidence,
            fix="exchange the two",
        )
    sides = (queries["embedding"].get("side", ""), documents["embedding"].get("side", ""))
    if any(sides):
        differs = _of_routes(sides, queries, documents, evidence)
    elif tasks[0] == tasks[1]:
        if tasks[0] in COUNTERPART:
            raise _needs_other(tasks[0], evidence)
        differs = _first_difference(queries, documents)
        if not differs and not _share_space(queries, documents):
            differs = "their embedding spaces"
    elif tasks == (QUERIES, DOCUMENTS):
        differs = _first_difference(queries, documents)
    else:
        raise PairError(
            f"vectors of {tasks[0]} and of {tasks[1]} cannot be compared",
            evidence=evidence,
            fix=f"pair {QUERIES} with {DOCUMENTS}, or give one artifact for both",
        )
    if differs:
        raise PairError(
            "the artifacts for queries and for documents are not of one model",
            evidence=f"{evidence}\nnot the same: {differs}",
            fix="build both from the same checkpoint and revision",
        )


def _of_routes(sides: tuple[str, str], queries: Content, documents: Content, evidence: str) -> str:
    """What differs in two artifacts of a Router's routes. Raises PairError for the wrong sides."""
    if sides != ("query", "document"):
        swapped = sides == ("document", "query")
        raise PairError(
            "the artifacts for queries and for documents are "
            + ("swapped" if swapped else "not of the two routes of one checkpoint"),
            evidence=f"{evidence}\ntheir weights embed: {sides[0] or 'both'}, {sides[1] or 'both'}",
            fix="exchange the two"
            if swapped
            else "build both: jexport build --use query, and --use document",
        )
    return _first_difference(queries, documents, compared=("dimension", "truncate_dim", "prompts"))


def _share_space(queries: Content, documents: Content) -> bool:
    """Whether one index may hold both; artifacts of two uses differ in the default prompt only."""
    one, other = queries["embedding"], documents["embedding"]
    if one.get("use", "") == other.get("use", ""):
        return bool(one["space"] == other["space"])
    same = ("prompts", "truncate_dim", "include_prompt")
    return all(one[key] == other[key] for key in same)


def _needs_other(task: str, evidence: str) -> PairError:
    other = COUNTERPART[task]
    need = f"{'queries' if other == QUERIES else 'documents'} need an artifact of {other}"
    return PairError(
        f"an artifact of {task} cannot embed both queries and documents",
        evidence=evidence,
        fix=f"{need} of the same checkpoint; or use text-matching for both",
    )


def _first_difference(
    one: Content,
    other: Content,
    compared: Sequence[str] = ("dimension", "matryoshka", "pooling", "normalize"),
) -> str:
    """What shows that two artifacts come from two models, '' for nothing.

    Files that only one of them read are the adapter of its task. A README may change freely.
    """
    ours, theirs = one["checkpoint"], other["checkpoint"]
    for key in compared:
        if one["embedding"][key] != other["embedding"][key]:
            return f"{key} ({one['embedding'][key]} and {other['embedding'][key]})"
    for key in ("revision", "code_revision"):
        if ours[key] and theirs[key] and ours[key] != theirs[key]:
            return f"the checkpoint's {key} ({ours[key]:.12} and {theirs[key]:.12})"
    left, right = _digests(ours), _digests(theirs)
    common = left.keys() & right.keys()
    changed = sorted(path for path in common if left[path] != right[path])
    if changed:
        return f"the checkpoint's {', '.join(changed[:3])}"
    if not any(path.endswith((".safetensors", ".bin")) for path in common):
        return f"the checkpoint ({ours['name']} and {theirs['name']} share no weights)"
    return ""


def _digests(checkpoint: Content) -> dict[str, str]:
    listed = [*checkpoint["files"], *checkpoint["code"]]
    return {one["path"]: one["sha256"] for one in listed if not one["path"].endswith(".md")}
