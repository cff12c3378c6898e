"""hf:// against a stand-in for the Hub: no test reaches it, so the real one was not asked.

The stand-in takes only calls that huggingface_hub's own functions would take.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from jexport.errors import RegistryError
from jexport.publishing import listing, pull, registries
from jexport.publishing.registries import Access
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

ATTEST = {"model.sig": b"signed"}
LARGE_BYTES = 100_000
REAL = huggingface_hub.HfApi


class Hub:
    """Repositories in memory. A commit is whole; what only went up before is in no repository."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.before: list[str] = []
        self.commits: list[str] = []
        self.fault: Callable[[str], None] = lambda name: None

    def asked(self, name: str, *words: Any, **options: Any) -> Any:
        real = getattr(REAL, name)
        found = inspect.signature(real).bind(None, *words, **options).arguments
        self.fault(name)
        return SimpleNamespace(**found)

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **options: getattr(self, f"_{name}")(
            self.asked(name, *words, **options)
        )

    def _there(self, repo: str) -> dict[str, bytes]:
        if repo not in self.repos:
            raise RepositoryNotFoundError("404", response=response(404))
        return self.repos[repo]

    def _repo_info(self, asked: Any) -> Any:
        self._there(asked.repo_id)
        return SimpleNamespace(private=self.private[asked.repo_id])

    def _create_repo(self, asked: Any) -> None:
        assert asked.exist_ok
        self.repos.setdefault(asked.repo_id, {})
        self.private.setdefault(asked.repo_id, asked.private)

    def _get_paths_info(self, asked: Any) -> list[Any]:
        held = self._there(asked.repo_id)
        return [entry(path, held[path]) for path in asked.paths if path in held]

    def _preupload_lfs_files(self, asked: Any) -> None:
        self._there(asked.repo_id)
        self.before += [each.path_in_repo for each in asked.additions]

    def _create_commit(self, asked: Any) -> None:
        held = self._there(asked.repo_id)
        added = {}
        for each in asked.operations:
            with each.as_file() as stream:
                added[each.path_in_repo] = stream.read()
        held |= added
        self.commits.append(asked.commit_message)

    def _list_repo_tree(self, asked: Any) -> Any:
        held = self._there(asked.repo_id)
        found = [p for p in held if p.startswith(f"{asked.path_in_repo}/")]
        if not found:
            raise EntryNotFoundError("404")
        return iter([entry(path, held[path]) for path in found])

    def files(self, root: Path) -> Any:
        """As HfFileSystem opens them: real files, so that seek and read are real."""

        def open_(place: str, mode: str, block_size: int = 0) -> Any:
            self.fault("open")
            owner, repo, path = place.split("/", 2)
            held = self.repos.get(f"{owner}/{repo}", {})
            if path not in held:
                raise FileNotFoundError(place)
            copy = root / "open" / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(held[path])
            return open(copy, mode)

        return SimpleNamespace(open=open_)


def entry(path: str, content: bytes) -> Any:
    import hashlib

    large = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return SimpleNamespace(
        path=path, blob_id="x", lfs=large if len(content) > LARGE_BYTES else None
    )


def response(code: int) -> Any:
    return httpx.Response(code, request=httpx.Request("GET", "https://hub/x?token=s3cret"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda **options: found.files(tmp_path))
    return found


def test_there_and_back(
    hub: Hub, made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    first, second = made(seed=1, attest=ATTEST), made(seed=2)
    one = publish.run(first, "hf://o/r", PublishSpec(tags=("latest", "one")))
    two = publish.run(second, "hf://o/r", PublishSpec(tags=("latest",)))
    assert hub.private == {"o/r": True}
    found = listing.read(registries.parse("hf://o/r"), Access())
    assert not found.troubles
    assert {row.ref: row.tags for row in found.rows} == {one.ref: ("one",), two.ref: ("latest",)}
    for ref, artifact in ((one.ref, first), ("hf://o/r", second)):
        back = pull.run(registries.parse(ref), tmp_path / "out")
        assert files_in(back.path) == files_in(artifact.path)
    old = pull.run(registries.parse("hf://o/r:one"), tmp_path / "old").path
    assert files_in(old.with_name(f"{old.name}.attest")) == ATTEST
    # People find the files where they look for them.
    names = [name for name in hub.repos["o/r"] if name.endswith("model.onnx")]
    assert sorted(name.split("/")[:3] for name in names) == [["m", "none", "onnx-fp32"]] * 2


def test_an_upload_that_ends_before_its_commit_is_not_visible(
    hub: Hub, made: Callable[..., Artifact], kinds_of_fault: Any
) -> None:
    artifact, killed = made(attest=ATTEST), kinds_of_fault["killed"]

    def fault(name: str) -> None:
        if name == "create_commit":
            raise killed

    hub.fault = fault
    with pytest.raises(killed):
        publish.run(artifact, "hf://o/r", PublishSpec(tags=("latest",)))
    assert any(place.endswith("model.onnx") for place in hub.before)
    assert hub.repos == {"o/r": {}}
    hub.fault = lambda name: None
    assert listing.read(registries.parse("hf://o/r"), Access()).rows == ()
    done = publish.run(artifact, "hf://o/r", PublishSpec(tags=("latest",)))
    hub.before.clear()
    again = publish.run(artifact, "hf://o/r", PublishSpec())
    assert again.ref == done.ref
    assert not any(place.endswith("model.onnx") for place in hub.before)  # it is there


def test_every_third_request_fails(
    hub: Hub, made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    artifact, count = made(attest=ATTEST), [0]

    def fault(name: str) -> None:
        count[0] += 1
        if count[0] % 3 == 0:
            raise HfHubHTTPError("503", response=response(503))

    hub.fault = fault
    done = publish.run(artifact, "hf://o/r", PublishSpec(threads=1))
    back = pull.run(registries.parse(done.ref), tmp_path / "out", threads=1)
    assert files_in(back.path) == files_in(artifact.path)
    assert count[0] > 30


def test_what_is_public_is_asked_of_the_hub(hub: Hub, made: Callable[..., Artifact]) -> None:
    artifact = made(licence="CC-BY-NC-4.0")
    publish.run(artifact, "hf://o/private", PublishSpec())
    hub.repos["o/public"], hub.private["o/public"] = {}, False
    with pytest.raises(RegistryError, match="non-commercial"):
        publish.run(artifact, "hf://o/public", PublishSpec())
    with pytest.raises(RegistryError, match="non-commercial"):
        publish.run(artifact, "hf://o/new", PublishSpec(access=Access(public=True)))
    assert hub.repos["o/public"] == {}
    assert "o/new" not in hub.repos
    publish.run(artifact, "hf://o/public", PublishSpec(accept_licence=True))


@pytest.mark.parametrize(
    "fault",
    [
        HfHubHTTPError("401 https://u:s3cret@hub/ hf_s3cret12345", response=response(401)),
        OfflineModeIsEnabled("offline"),
        RepositoryNotFoundError("404", response=response(404)),
    ],
)
def test_what_does_not_pass_is_told_at_once(
    fault: Exception, hub: Hub, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    asked: list[str] = []

    def fail(name: str) -> None:
        asked.append(name)
        raise fault

    hub.fault = fail
    with pytest.raises(RegistryError, match="cannot use hf://o/r") as caught:
        pull.run(registries.parse("hf://o/r"), tmp_path / "out")
    assert len(asked) == 1
    assert "s3cret" not in str(caught.value)
