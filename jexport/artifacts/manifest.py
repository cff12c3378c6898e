"""What an artifact says about itself: digests, the manifest, and verifying a folder against it.

Law: `verify(folder)` passes exactly when the folder holds the files that manifest.json lists, each
with its size and SHA-256, and nothing else, not even an empty folder. It opens no engine and
imports no framework.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jexport.errors import ArtifactError
from jexport.types import Embedding, FileDigest, Manifest

NAME = "manifest.json"
FORMAT = 3
"""Version of the manifest's own layout; raised when a reader of the old one would go wrong."""

SCHEMA = Path(__file__).with_name("manifest.schema.json")
SCHEMAS: Mapping[int, Path] = {
    1: SCHEMA.with_name("manifest.schema.1.json"),
    2: SCHEMA.with_name("manifest.schema.2.json"),
    FORMAT: SCHEMA,
}
"""Of every format that is still read. 1 held seconds, memory and speeds of the run as well; 2 knew
one prompt, and neither the similarity nor a size that vectors are cut to."""

OPTIONAL: Mapping[str, Any] = {"use": "", "side": "", "contextual": True, "modules": ()}
"""Keys of `embedding` that are written only where they say something else than this."""

CHUNK_BYTES = 1 << 22

JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def file_digest(path: Path, *, root: Path) -> FileDigest:
    """Size and SHA-256 of a file.

    Args:
        path: of the file.
        root: folder that its name is relative to.

    Returns:
        The digest; the file is read in pieces.
    """
    sha = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha.update(chunk)
            size += len(chunk)
    return FileDigest(
        path=path.relative_to(root).as_posix(), size_bytes=size, sha256=sha.hexdigest()
    )


def sha256_of(value: object) -> str:
    """SHA-256 of a value in canonical form (sorted keys, no spaces).

    Args:
        value: JSON-ready.

    Returns:
        64 hex digits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def listed(files: Iterable[FileDigest]) -> list[dict[str, Any]]:
    """File digests as the manifest lists them.

    Args:
        files: in any order.

    Returns:
        JSON-ready, ordered by path.
    """
    return [dataclasses.asdict(f) for f in sorted(files, key=lambda f: f.path)]


def embedding_space(weights: str, embedding: Embedding) -> str:
    """Id of the space that vectors live in: two indexes may be mixed only when it is equal.

    Args:
        weights: a digest of the weights that were run (checkpoint files and adapter). The precision
            is left out: within its gate an fp16 artifact searches an fp32 index.
        embedding: prompts, pooling, normalisation and size count as well.

    Returns:
        64 hex digits.
    """
    others = {
        name: text for name, text in embedding.prompts.items() if text not in ("", embedding.prompt)
    }
    return sha256_of(
        {
            "weights": weights,
            "task": embedding.task,
            "prompt": embedding.prompt,
            "pooling": embedding.pooling,
            "normalize": embedding.normalize,
            "dimension": embedding.dimension,
            # Only where there are any: artifacts of before keep their space.
            **({"prompts": others} if others else {}),
            **({"truncate_dim": embedding.truncate_dim} if embedding.truncate_dim else {}),
            **({"side": embedding.side} if embedding.side else {}),
            **({} if embedding.include_prompt else {"include_prompt": False}),
            **({"modules": list(embedding.modules)} if embedding.modules else {}),
        }
    )


def embedding_entry(embedding: Embedding) -> dict[str, Any]:
    """An Embedding as the manifest has it, without its space.

    Args:
        embedding: of the artifact.

    Returns:
        JSON-ready.
    """
    entry = dataclasses.asdict(embedding)
    kept = {
        key: value for key, value in entry.items() if key not in OPTIONAL or value != OPTIONAL[key]
    }
    kept |= {"matryoshka": list(embedding.matryoshka), "prompts": dict(embedding.prompts)}
    return kept | ({"modules": list(embedding.modules)} if embedding.modules else {})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as people read it: two spaces, UTF-8, a final newline.

    Args:
        path: of the file.
        content: JSON-ready; NaN and infinities are none.
    """
    path.write_text(_as_written(content), encoding="utf-8")


def _as_written(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read(folder: Path) -> Manifest:
    """Read a folder's manifest.json and check it against the schema and against itself.

    Args:
        folder: of the artifact.

    Returns:
        The manifest; the files that it lists are not read (see `verify`).

    Raises:
        ArtifactError: it is missing, not JSON, of another format, not as the schema says or not
            byte for byte as `write_json` writes it: its own digest is over what it says, and the
            same can be said in other bytes.
    """
    path = folder / NAME
    if not path.is_file():
        kind = "it is a file" if folder.is_file() else "there is no such folder"
        raise ArtifactError(
            f"{folder} is not a jexport artifact",
            evidence=f"there is no {NAME} in it" if folder.is_dir() else kind,
            fix=_meant(folder)
            or "give the folder that `jexport build` printed, or see `jexport list`",
        )
    try:
        raw = path.read_bytes()
        content = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(folder, f"{NAME} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _broken(folder, f"{NAME} is not a JSON object")
    if not any(content.get("format") == known for known in SCHEMAS):
        raise ArtifactError(
            f"{folder} was written in manifest format {content.get('format')!r:.40}",
            evidence=f"this jexport reads format {', '.join(map(str, SCHEMAS))}",
            fix="use the jexport that wrote it, or build it again",
        )
    try:
        problem = schema_problem(content) or _contradiction(content)
        if not problem and _as_written(content).encode(errors="surrogatepass") != raw:
            problem = "it was changed (what it says is the same, its bytes are not)"
    except (RecursionError, ValueError) as error:  # ValueError: a number no double holds
        problem = str(error)
    if problem:
        raise _broken(folder, f"{NAME}: {problem}")
    return Manifest(content=content)


def _meant(folder: Path) -> str:
    """The artifact that was probably meant: around, in, or named like a path; '' for none."""
    if (folder.parent / NAME).is_file():
        return f"give its folder: {folder.parent}"
    inside = folder if folder.is_dir() else folder.parent
    try:
        held = sorted(path.parent.name for path in inside.glob(f"*/{NAME}"))
    except OSError:
        return ""
    if folder.is_dir() and held:
        chosen = "latest" if "latest" in held else held[-1]
        return f"give one of the {len(held)} that are in it, such as {folder / chosen}"
    near = difflib.get_close_matches(folder.name, held, n=1)
    return f"did you mean {folder.parent / near[0]}?" if near and not folder.exists() else ""


def schema_problem(content: Mapping[str, Any]) -> str:
    """The first thing in a manifest that is not as manifest.schema.json says.

    Serving has no JSON schema library: this reads the words that the schema uses, and a test
    compares it with one that knows them all.

    Args:
        content: of a manifest.

    Returns:
        In words, '' when all is as it says.
    """
    version = content.get("format")
    path = next((path for known, path in SCHEMAS.items() if version == known), SCHEMA)
    schema = json.loads(path.read_text(encoding="utf-8"))
    return next(_deviations(content, schema, "", schema["$defs"]), "")


def _deviations(
    value: Any, rule: Mapping[str, Any], where: str, named: Mapping[str, Any]
) -> Iterator[str]:
    if "$ref" in rule:
        yield from _deviations(value, named[rule["$ref"].rsplit("/", 1)[-1]], where, named)
    what = f"'{where}'" if where else "it"
    kinds = rule.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(type(value) in JSON_TYPES[kind] for kind in kinds):
        yield f"{what} is {type(value).__name__}, not {' or '.join(kinds)}"
        return
    allowed = rule.get("enum", [rule["const"]] if "const" in rule else None)
    if allowed is not None and not any(type(value) is type(a) and value == a for a in allowed):
        yield f"{what} is {value!r:.60}, not {' or '.join(repr(a) for a in allowed)}"
    if isinstance(value, str):
        bad = "pattern" in rule and not re.search(rule["pattern"], value)
        bad |= "not" in rule and bool(re.search(rule["not"]["pattern"], value))
        if bad or len(value) < rule.get("minLength", 0):
            yield f"{what} is {value!r:.80}"
    elif isinstance(value, (int, float)):
        if not rule.get("minimum", -math.inf) <= value <= rule.get("maximum", math.inf):
            yield f"{what} is {value!r:.40}"
    elif isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            yield f"{what} is empty"
        for number, item in enumerate(value):
            yield from _deviations(item, rule.get("items", {}), f"{where}[{number}]", named)
    elif isinstance(value, dict):
        known = rule.get("properties", {})
        others = rule.get("additionalProperties", {})
        yield from (f"{what} lacks {key!r}" for key in rule.get("required", ()) if key not in value)
        for key, item in value.items():
            if key not in known and others is False:
                yield f"{what} has an unknown key {key!r:.40}"
                continue
            inside = f"{where}.{key}".lstrip(".")
            yield from _deviations(item, known.get(key, others or {}), inside, named)


def _contradiction(content: Mapping[str, Any]) -> str:
    """What a schema cannot say: its digest, each file listed once, only listed files opened."""
    if content["sha256"] != seal(content):
        return "it was changed (its own digest does not match)"
    paths = [entry["path"] for entry in content["files"]]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice or NAME in paths:
        return f"it lists {', '.join(twice) or 'itself'} more than it should"
    strangers = [name for name in content["engine"]["files"] if name not in paths]
    if strangers:
        return f"its engine would open {strangers[0]!r:.80}, which is not a listed file"
    return ""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def verify(folder: Path) -> Manifest:
    """Check every file of an artifact against its manifest.

    Args:
        folder: of the artifact, or a link to it.

    Returns:
        The manifest.

    Raises:
        ArtifactError: names each changed, missing or extra file. Symbolic links and anything that
            is not a plain file are refused: an engine would follow them out of the folder. A hard
            link is a plain file, and its content is checked like any other.
    """
    if folder.is_dir():
        folder = folder.resolve()  # one version is checked, whatever `latest` does meanwhile
    manifest = read(folder)
    problems = _problems(folder, manifest)
    if problems:
        raise _broken(folder, "\n".join(problems))
    return manifest


def _problems(folder: Path, manifest: Manifest) -> list[str]:
    expected = {entry["path"]: entry for entry in manifest.content["files"]}
    problems = []
    folders = {parent.as_posix() for name in expected for parent in PurePosixPath(name).parents}
    kinds: set[str] = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append(f"extra: {name} (a link or special file)")
        elif path.is_dir() and name not in folders:
            problems.append(f"extra: {name} (a folder)")
        elif path.is_file() and name != NAME:
            kinds.add(name)
    problems += [f"missing: {name}" for name in sorted(set(expected) - kinds)]
    problems += [f"extra: {name}" for name in sorted(kinds - set(expected))]
    problems += [
        text for name in sorted(kinds & set(expected)) if (text := _changed(folder, expected[name]))
    ]
    return problems


def _changed(folder: Path, entry: Mapping[str, Any]) -> str:
    """What is wrong with a listed file, '' when nothing is."""
    name, listed_bytes = entry["path"], entry["size_bytes"]
    try:
        size_bytes = (folder / name).stat().st_size
        if size_bytes != listed_bytes:
            return f"changed: {name} ({size_bytes} bytes, {listed_bytes} listed)"
        same = file_digest(folder / name, root=folder).sha256 == entry["sha256"]
    except OSError as error:
        return f"unreadable: {name} ({error.strerror})"
    return "" if same else f"changed: {name} (SHA-256 differs)"


def seal(content: Mapping[str, Any]) -> str:
    """The manifest's digest over everything it says but the digest itself.

    Args:
        content: of a manifest.

    Returns:
        64 hex digits.
    """
    return sha256_of({key: value for key, value in content.items() if key != "sha256"})


def _broken(folder: Path, evidence: str) -> ArtifactError:
    return ArtifactError(
        f"artifact {folder} is not what was built",
        evidence=evidence,
        fix="fetch it again, or build it again with `jexport build`",
    )
