"""Every reader of a file that somebody else may have written, and bytes to give it.

A reader takes the bytes of one file and a folder to work in. Whatever the bytes are, it returns or
raises a JexportError; `Outcome` says more where more can be said. `near` makes bytes that come far
into a reader: broken ones are found at its door by `junk`.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jexport.errors import JexportError

CORPUS = Path(__file__).parent / "corpus"
Bytes = st.SearchStrategy[bytes]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What reads, and bytes near to what it takes."""

    run: Callable[[bytes, Path], object]
    near: Bytes


# Values that readers trip over, of every type that JSON and TOML have.

NASTY_TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "a" * 300,
    "\ud800",
    "é" * 100,
    "NaN",
    "-1",
    "nul\n",
    "C:\\x",
    "~",
    "%s",
    "hf_" + "a" * 20,
    "1_Pooling/../../x",
)
NASTY_NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30)
texts = st.sampled_from(NASTY_TEXTS) | st.text(max_size=12)
numbers = st.sampled_from(NASTY_NUMBERS) | st.integers()
scalars = st.none() | st.booleans() | numbers | st.floats() | texts
values: st.SearchStrategy[Any] = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=8
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a tree of dicts and lists is."""
    inside: list[tuple[Any, ...]] = []
    pairs: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, one in pairs:
        inside += places(one, (*path, key))
    return [path, *inside]


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """A copy of a tree with a few places replaced, removed, doubled or added."""
    tree = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 4))):
        spots = [path for path in places(tree) if path]
        if not spots:
            break
        path = draw(st.sampled_from(spots))
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(("replace", "remove", "add", "twice")))
        if how == "remove":
            del holder[path[-1]]
        elif how == "replace":
            holder[path[-1]] = draw(values)
        elif isinstance(holder, list):
            holder.append(holder[path[-1]] if how == "twice" else draw(values))
        else:
            holder[draw(texts)] = draw(values)
    return tree


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Bytes of a good file, some of them changed, lost or repeated."""
    found = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(1, 5))):
        spot = draw(st.integers(0, len(found)))
        how = draw(st.sampled_from(("set", "insert", "cut", "repeat", "end")))
        if how == "set" and spot < len(found):
            found[spot] = draw(st.integers(0, 255))
        elif how == "insert":
            found[spot:spot] = draw(st.binary(max_size=8))
        elif how == "cut":
            del found[spot : spot + draw(st.integers(1, 16))]
        elif how == "repeat":
            found[spot:spot] = found[max(0, spot - 16) : spot] * draw(st.integers(1, 3))
        elif how == "end":
            del found[spot:]
    return bytes(found)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Recipes


def as_toml(table: Mapping[str, Any]) -> bytes:
    """TOML of nested tables, written inline; JSON's strings and numbers are TOML's, too."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key(k)} = {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(text, value)) + "]"
        if value is None:
            return '""'
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return json.dumps(value, ensure_ascii=isinstance(value, str) and "\ud800" not in value)

    def key(name: str) -> str:
        return json.dumps(name, ensure_ascii=False)

    lines = "".join(f"{key(name)} = {text(value)}\n" for name, value in table.items())
    return lines.encode(errors="surrogatepass")


def read_recipe(content: bytes, folder: Path) -> None:
    from jexport import recipe

    path = folder / "r.toml"
    path.write_bytes(content)
    found = recipe.read(str(path))
    json.dumps(found.resolved(), allow_nan=False).encode()  # it goes into the manifest
    assert recipe.checked(found, origin="again") == found


def recipes() -> Bytes:
    from jexport import recipe

    whole = recipe.Recipe(name="r", tasks=("none",)).resolved()
    whole["compile"]["profiles"] = [{"batch": [1, 4, 16], "tokens": [1, 32, 64]}]
    whole["quantize"]["symmetric"] = {"cosine_mean": 0.9}
    whole["load"]["prompts"] = {"none": "query: "}
    shipped = [path.read_bytes() for path in sorted(recipe.recipe_folder().glob("*.toml"))]
    return changed(whole).map(as_toml) | damaged([as_toml(whole), *shipped])


# Manifests


def good_manifest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CORPUS / "manifest" / "good").read_bytes())
    return found


def read_manifest(content: bytes, folder: Path) -> None:
    import jexport
    from jexport.artifacts import manifest

    (folder / "manifest.json").write_bytes(content)
    for name in ("config.json", "model.onnx"):
        (folder / name).touch()
    for attempt in (manifest.verify, jexport.open_artifact):
        try:
            attempt(folder)
        except JexportError:
            continue
        raise AssertionError("a folder of empty files was accepted")
    manifest.read(folder)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    from jexport.artifacts import manifest

    content = draw(changed(good_manifest()))
    if isinstance(content, dict) and draw(st.booleans()):
        content["sha256"] = manifest.seal(content)
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return as_json(content)


# safetensors


def read_safetensors(content: bytes, folder: Path) -> None:
    import torch

    from jexport.checkpoints import shards

    (folder / shards.SINGLE).write_bytes(content)
    for name, entry in shards.tensors(folder).items():
        read = shards.reader(name, entry)
        assert read().shape == torch.Size(entry.shape)


def read_index(content: bytes, folder: Path) -> None:
    from jexport.checkpoints import shards

    (folder / shards.INDEX).write_bytes(content)
    (folder / "a.safetensors").write_bytes(
        tensor_file({"w": _tensor("F32", [1], [0, 4])}, b"\0" * 4)
    )
    assert all(entry.path.parent == folder for entry in shards.tensors(folder).values())


def read_modules(content: bytes, folder: Path) -> None:
    from jexport.checkpoints import module_stack, sentence_files

    (folder / sentence_files.MODULES).write_bytes(content)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    found = module_stack.read(folder)
    assert found is not None
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in found.files)


def modules() -> Bytes:
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    good = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(kinds)
    ]
    return changed(good).map(as_json) | damaged([as_json(good)])


def _tensor(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensor_file(header: Any, rest: bytes, *, size: int | None = None) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", (len(text) if size is None else size) & (2**64 - 1)) + text + rest


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    good = {
        "__metadata__": {"format": "pt"},
        "w": _tensor("F32", [2, 3], [0, 24]),
        "b": _tensor("BF16", [2], [24, 28]),
        "n": _tensor("F64", [], [28, 36]),
    }
    header = draw(st.just(good) | changed(good))
    size = draw(st.none() | st.none() | numbers)
    whole = st.just(bytes(36)) | st.binary(min_size=36, max_size=36)
    return tensor_file(header, draw(whole | whole | st.binary(max_size=40)), size=size)


def indexes() -> Bytes:
    good = {"metadata": {"total_size": 4}, "weight_map": {"w": "a.safetensors"}}
    return changed(good).map(as_json) | damaged([as_json(good)])


# ONNX, with its weights in a file beside it

LOCATIONS = (
    "model.onnx_data",
    "../secret",
    "/etc/passwd",
    "link",
    "folder",
    "pipe",
    "",
    ".",
    "..",
    "./model.onnx_data",
    "folder/../model.onnx_data",
    "..\\secret",
    "model.onnx_data\0",
    "absent",
    "*",
    "model.onnx_data/",
    "file:///etc/passwd",
)
NUMBERS = (
    "0",
    "4",
    "8",
    "-1",
    "-4096",
    "9223372036854775807",
    "9223372036854775808",
    "1e3",
    "x",
    "",
    " 4",
    "+4",
    "0x4",
    "٤",
    "1_0",
    "9" * 30,
    "9" * 5000,
    "\0",
)
PLAIN = "model.onnx_data"
SECRET = b"\x7fnobody may read this"


def external(location: str, offset: str | None, length: str | None, dims: Sequence[int]) -> bytes:
    """A graph with one weight, which lies where it is said."""
    import onnx

    weight = onnx.TensorProto(name="w", data_type=1, dims=dims, data_location=1)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            weight.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", 4])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


def onnx_folder(content: bytes, folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(content)
    (folder / PLAIN).write_bytes(b"\0" * 16)
    (folder.parent / "secret").write_bytes(SECRET)
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    return folder / "model.onnx"


def read_onnx(content: bytes, folder: Path) -> None:
    """Lint and the check of target onnx; both must see a weight that lies elsewhere."""
    from jexport.graph import diagnostics
    from jexport.graph.lint import onnx_reader
    from jexport.targets import onnx as target
    from jexport.targets.trt import lint
    from jexport.types import OnnxModel, Signature

    path = onnx_folder(content, folder)
    bad = diagnostics.errors(lint.lint(path))
    read = onnx_reader.read(path)
    for scope in read.scopes():
        for constant in scope.constants.values():
            found = constant.values()
            assert found is None or SECRET[:4] not in found.tobytes()
    away = [c for s in read.scopes() for c in s.constants.values() if _away(c)]
    assert not away or bad, f"accepted: {away}"
    model = OnnxModel(
        path=path,
        signature=Signature(inputs=(), outputs=()),
        precision="fp32",
        opset=20,
        sha256="",
        max_tokens=8,
    )
    try:
        target.check(model)
    except JexportError:
        return
    assert not [c for c in read.graph.constants.values() if _away(c)], "target onnx accepted it"


def _away(constant: Any) -> bool:
    """Whether a weight lies elsewhere than inside the one plain file."""
    place = constant.place
    if place is None:
        return False
    offset, length = place.offset or "0", place.length or "0"
    if place.location != PLAIN or not (offset + length).isascii():
        return True
    if not (offset.isdigit() and length.isdigit()) or len(offset + length) > 40:
        return True
    return int(offset) + int(length) > 16


def graphs() -> Bytes:
    some = st.none() | st.sampled_from(NUMBERS) | texts.filter(lambda t: "\ud800" not in t)
    built = st.builds(
        external,
        st.sampled_from(LOCATIONS) | texts.filter(lambda t: "\ud800" not in t),
        some,
        some,
        st.lists(st.sampled_from((0, 1, 4, -1, 2**62, 2**40)), max_size=3),
    )
    return built | damaged([external(PLAIN, "0", "16", [4]), external("../secret", "0", "16", [4])])


# Texts to calibrate on, and other texts


def read_calibration(content: bytes, folder: Path) -> None:
    from jexport.datasets import calibration

    (folder / "t.jsonl").write_bytes(content)
    (folder / "t.txt").write_bytes(content)
    for name in ("t.jsonl", "t.txt"):
        try:
            found = calibration.parts(str(folder / name), "none")
        except JexportError:
            continue
        seen = {sample.text for sample in found.calibration.samples}
        assert not seen & {sample.text for sample in found.held_out.samples}
    calibration.texts(folder / "t.jsonl")


def read_set(content: bytes, folder: Path) -> None:
    from jexport.datasets import calibration

    lines = "".join(f'"text number {n}"\n' for n in range(50))
    (folder / "set.toml").write_bytes(content)
    (folder / "any.jsonl").write_text(lines)
    calibration.parts(str(folder), "none")


@st.composite
def text_files(draw: st.DrawFn) -> bytes:
    line = {"text": "some text", "language": "en", "part": "calibration", "task": "none"}
    written = st.one_of(
        changed(line).map(as_json),
        values.map(as_json),
        texts.map(lambda t: t.encode(errors="surrogatepass")),
    )
    few = draw(st.lists(written, max_size=6))
    many = [as_json({"text": f"text {n}"}) for n in range(draw(st.sampled_from((0, 60))))]
    end = draw(st.sampled_from((b"\n", b"\r\n", b"\r")))
    return draw(st.sampled_from((b"", b"\xef\xbb\xbf", b"\xff\xfe"))) + end.join([*few, *many])


def sets() -> Bytes:
    good = {"name": "s", "languages": ["en"], "tasks": ["none"], "sha256": "0" * 64}
    return changed(good).map(as_toml) | damaged([as_toml(good)])


# Signatures


@functools.cache
def vouched() -> tuple[Any, dict[str, str], bytes, bytes]:
    """A key, the files that it signed (one), the signature, and provenance of them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from jexport.publishing.signing import Signer, envelope, openssf

    key = ec.generate_private_key(ec.SECP256R1())
    files = {"manifest.json": hashlib.sha256(b"{}").hexdigest()}
    with tempfile.TemporaryDirectory() as room:
        private, folder = Path(room) / "k.pem", Path(room) / "artifact"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        signature = openssf.sign(folder, Signer(key=private))
    return key.public_key(), files, signature, envelope.seal({"subject": []}, key)


def read_signature(content: bytes, folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    from jexport.publishing.signing import Policy, openssf

    public, files, _, _ = vouched()
    (folder / "artifact").mkdir()
    (folder / "artifact" / "manifest.json").write_text("{}")
    (folder / "k.pub").write_bytes(
        public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (folder / "model.sig").write_bytes(content)
    policy = Policy(key=folder / "k.pub")
    openssf.check(folder / "artifact", folder / "model.sig", policy, files)
    try:
        openssf.check(folder / "artifact", folder / "model.sig", policy, {**files, "more": "0"})
    except JexportError:
        return
    raise AssertionError("a signature of other files was accepted")


def signatures() -> Bytes:
    good = vouched()[2]
    return changed(json.loads(good)).map(as_json) | damaged([good])


def read_provenance(content: bytes, folder: Path) -> None:
    from jexport.publishing.signing import envelope

    assert envelope.opened(content, vouched()[0]) == {"subject": []}


def provenances() -> Bytes:
    good = vouched()[3]
    return changed(json.loads(good)).map(as_json) | damaged([good])


# Releases: a registry's document says which files a pull unpacks, and where


@functools.cache
def published() -> tuple[Path, bytes]:
    """A registry with one release of small files, and the release's document."""
    from jexport.artifacts import manifest
    from jexport.publishing import release
    from jexport.stages import publish
    from jexport.types import Artifact

    room = Path(tempfile.mkdtemp(prefix="jexport-fuzz-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    content = good_manifest()
    folder = room / "built" / content["version"]
    places = [folder / listed["path"] for listed in content["files"]]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(place.name)
    files = [manifest.file_digest(place, root=folder) for place in places]
    content["files"] = manifest.listed(files)
    content["sha256"] = manifest.seal(content)
    manifest.write_json(folder / manifest.NAME, content)
    artifact = Artifact(path=folder, manifest=manifest.verify(folder))
    done = publish.run(artifact, f"folder://{room / 'registry'}", publish.PublishSpec())
    with tempfile.TemporaryDirectory() as scratch:
        made, _ = release.of(artifact, Path(scratch))
    assert made.digest == done.digest
    return room / "registry", made.document


def read_release(content: bytes, folder: Path) -> None:
    """Pull whatever it says, from a registry that has it under its right digest."""
    from jexport.artifacts import manifest
    from jexport.publishing import pull, registries

    registry, _ = published()
    document = registry / "releases" / "sha256" / hashlib.sha256(content).hexdigest()
    was_there = document.exists()
    document.write_bytes(content)
    out = folder / "a" / "b" / "out"
    try:
        ref = registries.parse(f"folder://{registry}@sha256:{document.name}")
        found = pull.run(ref, out)
        manifest.verify(found.path)
        assert found.path.resolve().is_relative_to(out.resolve())
    finally:
        if not was_there:
            document.unlink()
        outside = [path for path in folder.rglob("*") if not path.is_relative_to(out)]
        assert {path.name for path in outside} <= {"a", "b"}, outside
        assert not any(path.is_symlink() and path.name != "latest" for path in out.rglob("*"))


@st.composite
def releases(draw: st.DrawFn) -> bytes:
    """The good document with one place changed; most often a file's name, digest or size."""
    good = json.loads(published()[1])
    if draw(st.booleans()):
        layer = draw(st.sampled_from(good["layers"]))
        title = "org.cncf.model.filepath"
        how = draw(st.sampled_from(("path", "size", "digest", "again")))
        if how == "path":
            nasty = st.sampled_from((*NASTY_TEXTS, "x.attest/../../y", "1.0.0.attest/a", "/x"))
            layer["annotations"][title] = draw(nasty | st.text(max_size=12))
        elif how == "again":
            good["layers"].append(json.loads(json.dumps(layer)))
        else:
            layer[how] = draw(numbers if how == "size" else texts)
        return as_json(good)
    return draw(changed(good).map(as_json) | damaged([published()[1]]))


def seeds(name: str) -> list[bytes]:
    """The kept files of a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]


def readers() -> dict[str, Reader]:
    """All of them, by name; each has a folder in the corpus."""
    return {
        "recipe": Reader(run=read_recipe, near=recipes()),
        "manifest": Reader(run=read_manifest, near=manifests()),
        "safetensors": Reader(run=read_safetensors, near=tensor_files()),
        "index": Reader(run=read_index, near=indexes()),
        "modules": Reader(run=read_modules, near=modules()),
        "onnx": Reader(run=read_onnx, near=graphs()),
        "calibration": Reader(run=read_calibration, near=text_files()),
        "set": Reader(run=read_set, near=sets()),
        "signature": Reader(run=read_signature, near=signatures()),
        "provenance": Reader(run=read_provenance, near=provenances()),
        "release": Reader(run=read_release, near=releases()),
    }


def contents(name: str, reader: Reader) -> Bytes:
    """Bytes for a reader: near ones most of the time, kept ones damaged, junk."""
    kept = seeds(name)
    return st.one_of(reader.near, reader.near, damaged(kept or [b""]), st.binary(max_size=200))


def tried(reader: Reader, content: bytes, room: Path) -> str:
    """What a reader makes of bytes: '' or the name of the JexportError; anything else is raised."""
    folder = room / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        reader.run(content, folder)
    except JexportError as error:
        if not (error.what and error.fix):
            raise AssertionError(f"{type(error).__name__} says nothing") from error
        return type(error).__name__
    return ""
