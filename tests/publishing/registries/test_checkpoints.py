"""Artifacts of two checkpoints under one name: a tag and a pulled `latest` stay with the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jexport.artifacts import manifest
from jexport.errors import OutputPathError, RegistryError
from jexport.publishing import pull, registries
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

TAGGED = PublishSpec(tags=("latest",))


@pytest.fixture
def twins(made: Callable[..., Artifact]) -> tuple[Artifact, Artifact]:
    """Artifacts of one name, of other weights."""
    second = made(seed=2)
    content = json.loads((second.path / manifest.NAME).read_bytes())
    content["checkpoint"]["files"] = [
        {"path": "model.safetensors", "size_bytes": 1, "sha256": "ab" * 32}
    ]
    content["sha256"] = manifest.seal({k: v for k, v in content.items() if k != "sha256"})
    manifest.write_json(second.path / manifest.NAME, content)
    return made(seed=1), Artifact(path=second.path, manifest=manifest.verify(second.path))


def test_a_tag_stays_with_its_checkpoint(
    twins: tuple[Artifact, Artifact], made: Callable[..., Artifact], tmp_path: Path
) -> None:
    place = f"folder://{tmp_path / 'registry'}"
    first = publish.run(twins[0], place, TAGGED)
    with pytest.raises(RegistryError, match="'latest' names an artifact of another") as caught:
        publish.run(twins[1], place, TAGGED)
    assert "--replace" in caught.value.fix
    assert caught.value.evidence.count("checkpoint ") == 2
    again = pull.run(registries.parse(place), tmp_path / "out")
    assert again.path.name == twins[0].path.name
    publish.run(twins[1], place, PublishSpec())  # beside it, by digest
    publish.run(made(seed=3), place, TAGGED)  # the first checkpoint, another version
    moved = publish.run(twins[1], place, PublishSpec(tags=("latest",), replace=True))
    assert moved.digest != first.digest


def test_latest_of_what_was_pulled_stays(twins: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    place, out = f"folder://{tmp_path / 'registry'}", tmp_path / "out"
    refs = [registries.parse(publish.run(one, place, PublishSpec()).ref) for one in twins]
    latest = pull.run(refs[0], out).path.parent / "latest"
    with pytest.raises(OutputPathError, match="another checkpoint"):
        pull.run(refs[1], out)
    assert latest.resolve().name == twins[0].path.name
    blobs = [path for path in out.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert [path.name for path in blobs if "m/none" not in str(path)] == []  # nothing large came
    assert pull.run(refs[1], out, replace=True).path == latest.resolve()
    with pytest.raises(OutputPathError):
        pull.run(refs[0], out)  # there already, and the link would go back
    assert pull.run(refs[0], out, replace=True).path == latest.resolve()
