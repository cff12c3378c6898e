"""pipeline: what decides a version, what is refused before a weight is read, and running twice."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport import recipe
from jexport.artifacts import manifest, store
from jexport.building import cache_keys, pipeline
from jexport.datasets import calibration
from jexport.errors import JexportError, ParityError
from jexport.stages import load as load_stage
from jexport.stages import validate as validate_stage

TASK = "separation"


class Known(Exception):
    """The version is known; nothing more is wanted."""


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """The version that a build would get, without building."""
    slots: list[store.Slot] = []

    def find(slot: store.Slot) -> None:
        slots.append(slot)
        raise Known

    monkeypatch.setattr(store, "find", find)

    def of(made: recipe.Recipe, task: str = TASK, precision: str = "fp32") -> str:
        with pytest.raises(Known):
            pipeline.build(made, task=task, target="onnx", precision=precision, out=tmp_path / "o")
        return slots[-1].version

    return of


def made_for(folder: Path, **export: Any) -> recipe.Recipe:
    made = recipe.for_model(str(folder))
    return dataclasses.replace(made, export=dataclasses.replace(made.export, **export))


def test_same_inputs_same_version(version: Callable[..., str], small: Path) -> None:
    assert version(made_for(small)) == version(made_for(small))
    assert version(made_for(small)).startswith("0.1.0-")


def test_where_the_checkpoint_lies_does_not_matter(
    version: Callable[..., str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(small, tmp_path / "elsewhere" / small.name))
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    base = version(made_for(small))
    assert version(made_for(copied)) == base
    monkeypatch.chdir(copied.parent)
    assert version(recipe.for_model(small.name)) == base
    renamed = copied.rename(copied.with_name("another-name"))
    named = dataclasses.replace(recipe.for_model(str(renamed)), name=small.name)
    assert version(named) == base


def test_the_order_of_a_recipes_keys_does_not_matter(
    version: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    tables = [
        f'[load]\nmodel = "{small}"\nmax_tokens = 99\n',
        "[export]\nopset = 21\ndimension = 0\n",
        "[validate.gates.fp16]\ncosine_min = 0.9\ncosine_mean = 0.8\n",
        "[validate.gates.fp32]\ncosine_mean = 0.9\ncosine_min = 0.99\n",
    ]
    found = set()
    for order, keys in ((tables, 1), (tables[::-1], -1)):
        path = tmp_path / "r.toml"
        lines = [line for table in order for line in table.splitlines()]
        head = ['name = "a"', 'version = "2"'][::keys]
        path.write_text("\n".join([*head, *lines]))
        found.add(version(recipe.read(str(path))))
    assert len(found) == 1


def test_what_else_a_recipe_ships_does_not_matter(version: Callable[..., str], small: Path) -> None:
    base = made_for(small)
    other = dataclasses.replace(
        base, tasks=(TASK, "classification"), targets=("onnx",), precisions=("fp32", "fp16")
    )
    assert version(other) == version(base)


@pytest.mark.parametrize(
    "change",
    [
        {"export": recipe.ExportSpec(opset=21)},
        {"export": recipe.ExportSpec(outputs=("sentence_embedding",))},
        {"export": recipe.ExportSpec(dimension=32)},
        {"export": recipe.ExportSpec(keep_fp32=("layers.0",))},
        {"compile": recipe.CompileSpec(fuse=False)},
        {"validate": recipe.ValidateSpec(max_tokens=100)},
        {"validate": recipe.ValidateSpec(budget_tokens=5)},
        {"validate": recipe.ValidateSpec(gates={"fp32": {"cosine_min": 0.5}})},
        {"version": "0.2.0"},
        {"name": "other"},
    ],
)
def test_every_other_key_gives_another_version(
    change: dict[str, Any], version: Callable[..., str], small: Path
) -> None:
    base = made_for(small)
    assert version(dataclasses.replace(base, **change)) != version(base)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 99},
        {"licence": "MIT"},
        {"prompts": {TASK: "p: "}},
        {"trust_remote_code": True},
    ],
)
def test_every_load_key_gives_another_version(
    change: dict[str, Any], version: Callable[..., str], small_copy: Path, remote_files: Path
) -> None:
    base = made_for(small_copy)
    assert version(base.replace_load(**change)) != version(base)


@pytest.fixture
def remote_files(small_copy: Path, small: Path) -> Path:
    """The small checkpoint with code of its own beside it."""
    for path in (small.parent / "remote_original").glob("*.py"):
        shutil.copy(path, small_copy)
    config = json.loads((small_copy / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "modeling_lora.XLMRobertaLoRA",
    }
    (small_copy / "config.json").write_text(json.dumps(config))
    return small_copy


def test_another_task_or_precision_gives_another_version(
    version: Callable[..., str], small: Path
) -> None:
    base = made_for(small)
    found = {version(base), version(base, "classification"), version(base, precision="fp16")}
    assert len(found) == 3


def test_every_file_of_the_checkpoint_counts(version: Callable[..., str], small_copy: Path) -> None:
    base = version(made_for(small_copy))
    weights = small_copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # the lowest bit of the last weight
    weights.write_bytes(content)
    other_weights = version(made_for(small_copy))
    config = json.loads((small_copy / "config.json").read_text())
    config["task_instructions"] = {**config.get("task_instructions", {}), TASK: "another: "}
    (small_copy / "config.json").write_text(json.dumps(config))
    path = small_copy / "config_sentence_transformers.json"  # the two must say the same
    sentence_config = json.loads(path.read_text())
    sentence_config["prompts"][TASK] = "another: "
    path.write_text(json.dumps(sentence_config))
    other_prompt = version(made_for(small_copy))
    path = small_copy / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    assert len({base, other_weights, other_prompt, version(made_for(small_copy))}) == 4


def test_the_licence_of_a_readme_counts(version: Callable[..., str], small_copy: Path) -> None:
    base = version(made_for(small_copy))
    (small_copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert version(made_for(small_copy)) != base


def test_tools_and_code_and_texts_count(
    version: Callable[..., str], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = version(made_for(small))
    with monkeypatch.context() as patch:
        patch.setattr(cache_keys, "tools", lambda: {"torch": "9"})
        assert version(made_for(small)) != base
    with monkeypatch.context() as patch:
        patch.setattr(cache_keys, "code_digest", lambda: "0" * 64)
        assert version(made_for(small)) != base
    with monkeypatch.context() as patch:
        read = calibration.read
        patch.setattr(
            calibration,
            "read",
            lambda *words: dataclasses.replace(read(*words), sha256="0" * 64),
        )
        assert version(made_for(small)) != base


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of everything below a folder, links themselves included."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        stat = os.lstat(path)
        found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def test_building_again_touches_nothing(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    first = cli(*as_separation, "--out", tmp_path)
    model = first.path.parents[2]
    before = snapshot(model)
    second = cli(*as_separation, "--out", tmp_path)
    assert (second.code, second.path) == (0, first.path)
    assert "already built of the same inputs" in second.err
    assert snapshot(model) == before
    assert {p.name for p in tmp_path.iterdir()} == {model.name, ".cache"}


def test_latest_follows_the_last_build(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    first = cli(*as_separation, "--out", tmp_path).path
    second = cli(*as_separation, "--out", tmp_path, "--validate-tokens", 99).path
    assert second != first
    latest = first.parent / "latest"
    assert latest.resolve() == second
    assert cli("verify", latest).code == 0
    # What a run killed between its two last steps leaves is mended by building again.
    latest.unlink()
    assert cli(*as_separation, "--out", tmp_path, "--validate-tokens", 99).path == second
    assert latest.resolve() == second


def test_manifest_says_what_was_built(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    path = cli(*as_separation, "--out", tmp_path).path
    content = manifest.verify(path).content
    assert content["version"] == path.name
    assert path.name.endswith(content["inputs_sha256"][:12])
    assert content["checkpoint"]["layout"] == "jina_v3_original"
    assert content["recipe"]["validate"]["gates"]["fp32"]["cosine_min"] == 0.99999
    assert content["tools"]["onnxruntime"]
    assert content["engine"]["files"][0] == "model.onnx"
    recorded = {entry["path"] for entry in content["checkpoint"]["files"]}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= recorded


@pytest.mark.parametrize(
    ("shipped", "asked", "code"),
    [
        ({"tasks": (TASK,)}, {"task": "separtion"}, 3),
        ({"tasks": (TASK,)}, {"task": "classification"}, 3),
        ({"targets": ("other",)}, {"target": "onnx"}, 4),
        ({}, {"target": "onxx"}, 4),
        ({"precisions": ("fp32",)}, {"precision": "fp16"}, 17),
        ({"precisions": ("fp16",)}, {"precision": "fp23"}, 17),
    ],
)
def test_cheap_refusals_come_before_anything_is_read_or_made(
    shipped: dict[str, Any],
    asked: dict[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(load_stage, "run", read)
    made = recipe.Recipe(name="m", load=recipe.LoadSpec(model="nowhere"), **shipped)
    words = {"task": TASK, "target": "onnx", "precision": "fp32", **asked}
    with pytest.raises(JexportError) as caught:
        pipeline.build(made, out=tmp_path / "out", **words)
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_the_base_model_goes_with_every_recipe(version: Callable[..., str], small: Path) -> None:
    assert version(dataclasses.replace(made_for(small), tasks=(TASK,)), "none")


def test_two_builds_of_the_same_at_once(
    canned: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both reach the last step; one places, both get the same whole artifact."""
    together = threading.Barrier(2, timeout=30)
    place = store.place

    def place_together(staged: Path, slot: store.Slot, **options: bool) -> Any:
        together.wait()
        return place(staged, slot, **options)

    monkeypatch.setattr(store, "place", place_together)
    paths: list[Path] = []
    trouble: list[BaseException] = []

    def build() -> None:
        try:
            paths.append(
                pipeline.build(made_for(small), task=TASK, target="onnx", out=tmp_path).path
            )
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble
    assert paths[0] == paths[1]
    manifest.verify(paths[0])
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [
        paths[0].name,
        f"{paths[0].name}.run.json",
        "latest",
    ]
    assert not (tmp_path / ".work").exists()


def test_a_failed_gate_leaves_its_report_and_no_artifact(
    canned: Any,
    cli: Callable[..., Any],
    as_separation: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, out_dir: Path, **__: Any) -> None:
        (out_dir / "parity.json").write_text('{"passed": false}')
        raise ParityError("validate: no", evidence="cosine 0.1", fix="look")

    monkeypatch.setattr(validate_stage, "run", fail)
    answer = cli(*as_separation, "--out", tmp_path)
    assert (answer.code, answer.out) == (6, "")
    left = [p for p in tmp_path.glob("[!.]*/**/*") if p.is_file() or p.is_symlink()]
    assert [p.name.rsplit(".", 2)[1:] for p in left] == [["failed", "json"]]
    assert json.loads(left[0].read_text()) == {"passed": False}
    assert f"report: {left[0]}" in answer.err


def test_a_gate_stays_failed_when_its_report_cannot_be_kept(
    canned: Any,
    cli: Callable[..., Any],
    as_separation: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ParityError("validate: no", evidence="cosine 0.1", fix="look")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validate_stage, "run", fail)
    monkeypatch.setattr(store, "keep_report", full)
    answer = cli(*as_separation, "--out", tmp_path)
    assert answer.code == 6
    assert "could not be kept" in answer.err
