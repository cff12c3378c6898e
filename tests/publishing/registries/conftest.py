"""What tests of registries share: artifacts made in a moment, and a store that fails when told."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.publishing import registries
from jexport.publishing.registries import Store
from jexport.publishing.retry import TransientError
from jexport.types import Artifact

ZEROS = "0" * 64
MODEL_BYTES = 300_000


def write_artifact(out: Path, *, seed: int = 0, task: str = "none", licence: str = "MIT") -> Path:
    """An artifact as a build lays it down, whose graph is none; tokenizer.json never differs."""
    version = f"1.0.0-{hashlib.sha256(f'{seed} {task}'.encode()).hexdigest()[:12]}"
    folder = out / "m" / task / "onnx-fp32" / version
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    (folder / "tokenizer.json").write_text('{"the same": "everywhere"}')
    (folder / "README.md").write_text(f"# {seed}\n")
    (folder / "copy.md").write_text(f"# {seed}\n")  # the same bytes twice in one artifact
    pieces = (hashlib.sha512(f"{seed} {n}".encode()).digest() for n in range(MODEL_BYTES // 64))
    (folder / "model.onnx").write_bytes(b"".join(pieces))
    files = [manifest.file_digest(p, root=folder) for p in folder.rglob("*") if p.is_file()]
    ids = {"dtype": "int64", "shape": ["batch", "sequence"]}
    content: dict[str, Any] = {
        "format": 1,
        "name": "m",
        "version": version,
        "inputs_sha256": ZEROS,
        "task": task,
        "target": "onnx",
        "precision": "fp32",
        "licence": licence,
        "checkpoint": {
            "name": "m",
            "layout": "l",
            "revision": "",
            "code_revision": "",
            "code": [],
            "files": [{"path": "w", "size_bytes": 1, "sha256": ZEROS}],
        },
        "embedding": {
            "task": task,
            "prompt": "",
            "pooling": "mean",
            "normalize": True,
            "dimension": 4,
            "matryoshka": [],
            "max_tokens": 8,
            "space": ZEROS,
        },
        "engine": {
            "files": ["model.onnx"],
            "inputs": [{"name": "input_ids", **ids}],
            "outputs": [{"name": "last_hidden_state", "dtype": "float32", "shape": ["batch", 4]}],
            "runs_on": {},
            "facts": {},
        },
        "parity": {
            "passed": True,
            "texts": 1,
            "cosine_mean": 1.0,
            "cosine_p1": 1.0,
            "cosine_min": 0.9999,
            "largest_difference": 0.0,
            "spearman": 1.0,
            "top10_overlap": 1.0,
            "batch_cosine_min": 1.0,
        },
        "stages": [{"stage": "load", "seconds": 1.0, "peak_memory_mib": 1.0, "note": ""}],
        "recipe": {},
        "tools": {},
        "files": manifest.listed(files),
    }
    content["sha256"] = manifest.seal(content)
    manifest.write_json(folder / manifest.NAME, content)
    manifest.verify(folder)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Artifact]:
    """`made(seed=1, attest={"model.sig": b"..."})`: an artifact, with what lies beside it."""

    def make(
        *,
        seed: int = 0,
        task: str = "none",
        licence: str = "MIT",
        attest: dict[str, bytes] | None = None,
    ) -> Artifact:
        path = write_artifact(tmp_path / f"built-{seed}", seed=seed, task=task, licence=licence)
        for name, content in (attest or {}).items():
            beside = path.with_name(f"{path.name}.attest") / name
            beside.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
        return Artifact(path=path, manifest=manifest.read(path))

    return make


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


@pytest.fixture(scope="session")
def files_in() -> Callable[[Path], dict[str, bytes]]:
    return tree


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow at once."""
    monkeypatch.setattr("jexport.publishing.retry.FIRST_PAUSE_S", 0.0)


class Killed(BaseException):
    """The process ends here: nothing catches it."""


@dataclasses.dataclass
class Faults:
    """What a store's requests meet. fail(n, what): raises for request number n, or does nothing.

    Each chunk that is read is a request, too. log: what was asked.
    """

    fail: Callable[[int, str], None] = lambda n, what: None
    log: list[str] = dataclasses.field(default_factory=list)

    def meet(self, what: str) -> None:
        self.log.append(what)
        self.fail(len(self.log), what)


def every_third(number: int, what: str) -> None:
    if number % 3 == 0:
        raise TransientError(f"503 for request {number}")


def faulty(store: Store, faults: Faults) -> Store:
    """The same store, whose requests fail before or, where they write, also after their work."""

    def wrapped(name: str) -> Callable[..., Any]:
        function = getattr(store, name)

        def call(*words: Any) -> Any:
            faults.meet(name)
            answer = function(*words)
            if name in ("put", "commit", "tag"):
                faults.meet(f"{name} done")
            return answer

        return call

    def read(*words: Any) -> Iterator[bytes]:
        faults.meet("read")
        for chunk in store.read(*words):
            half = len(chunk) // 2 + 1  # so that a file breaks in its middle
            for piece in (chunk[:half], chunk[half:]):
                yield piece
                faults.meet("chunk")

    changed = {field.name: wrapped(field.name) for field in dataclasses.fields(Store)}
    return Store(**{**changed, "read": read})


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Every store that is opened from now on meets these."""
    found = Faults()
    opened = registries.opened

    @contextlib.contextmanager
    def opened_faulty(*words: Any, **options: Any) -> Iterator[Store]:
        with opened(*words, **options) as store:
            yield faulty(store, found)

    monkeypatch.setattr(registries, "opened", opened_faulty)
    return found


@pytest.fixture(scope="session")
def kinds_of_fault() -> Any:
    """every_third and Killed, for files that cannot import this one."""
    return {"third": every_third, "killed": Killed}
