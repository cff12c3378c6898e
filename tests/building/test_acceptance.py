"""verdict: once given it is kept, for those bytes, texts, gates and that processor only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport import recipe
from jexport.artifacts import manifest
from jexport.building import cache_keys, float_comparison, pipeline
from jexport.errors import ParityError
from jexport.evaluation import reference_set
from jexport.stages import compile as compile_stage
from jexport.stages import package as package_stage
from jexport.stages import validate as validate_stage


@dataclasses.dataclass
class Builds:
    """Builds of one checkpoint whose packaging fails when told to, and how often they validated."""

    model: Path
    out: Path
    monkeypatch: pytest.MonkeyPatch
    validated: int = 0
    stages: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        real = validate_stage.run

        def counted(*args: Any, **named: Any) -> Any:
            self.validated += 1
            return real(*args, **named)

        self.monkeypatch.setattr(validate_stage, "run", counted)

    def ends_in_package(self) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(package_stage, "run", ends)
            with pytest.raises(KeyboardInterrupt):
                self.whole()

    def whole(self, **validate: Any) -> Path:
        made = recipe.for_model(str(self.model))
        spec = dataclasses.replace(made.validate, **validate)
        made = dataclasses.replace(made, validate=spec)

        def listen(event: Any) -> None:
            if event.kind == "done":
                self.stages[event.stage] = event.text

        built = pipeline.build(made, task="separation", target="onnx", out=self.out, listen=listen)
        manifest.verify(built.path)
        return built.path


def ends(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def ended(canned: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(model=small, out=tmp_path / "out", monkeypatch=monkeypatch)


def test_a_build_that_ended_in_package_does_not_validate_again(
    ended: Builds, tmp_path: Path
) -> None:
    ended.ends_in_package()
    assert ended.validated == 1
    resumed = ended.whole()
    assert ended.validated == 1
    assert ended.stages["validate"].startswith("from the cache; ")
    assert "lowest cosine" in ended.stages["validate"]
    ended.out = tmp_path / "elsewhere"
    undisturbed = ended.whole()
    assert ended.validated == 2
    assert resumed.name == undisturbed.name
    sealed = [manifest.read(one).content["sha256"] for one in (resumed, undisturbed)]
    assert sealed[0] == sealed[1]


def test_the_judge_is_asked_once_for_every_target_and_precision(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = reference_set.run, []

    def counted(*args: Any, **named: Any) -> Any:
        asked.append(args)
        return real(*args, **named)

    monkeypatch.setattr(reference_set, "run", counted)
    made = recipe.for_model(str(small))
    spec = dataclasses.replace(made.validate, budget_tokens=1, max_tokens=64)
    made = dataclasses.replace(made, validate=spec)
    for target, precision in (("hf", "fp32"), ("hf", "bf16"), ("vllm", "fp32")):
        pipeline.build(
            made, task="separation", target=target, precision=precision, out=tmp_path / "out"
        )
    assert len(asked) == 1
    other = dataclasses.replace(made.load, prompts={"separation": "apart: "})
    made = dataclasses.replace(made, load=other)
    pipeline.build(made, task="separation", target="hf", out=tmp_path / "out")
    assert len(asked) == 2  # what the recipe says on purpose is another question


def test_other_gates_are_another_verdict(ended: Builds) -> None:
    ended.ends_in_package()
    gates = recipe.DEFAULT_GATES | {"fp32": {"cosine_min": 0.5}}
    ended.whole(gates=gates)
    assert ended.validated == 2


def test_other_bytes_of_the_engine_are_another_verdict(
    ended: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended.ends_in_package()
    real = compile_stage.run

    def otherwise(*args: Any, out_dir: Path) -> Any:
        made = real(*args, out_dir=out_dir)
        with open(out_dir / made.files[0], "ab") as graph:
            graph.write(b"\x00")
        return made

    monkeypatch.setattr(compile_stage, "run", otherwise)
    for entry in (ended.out / ".cache").glob("compile-*/entry.json"):
        entry.unlink()  # damaged: it is compiled again
    with monkeypatch.context() as patch:
        patch.setattr(package_stage, "run", ends)
        with pytest.raises(KeyboardInterrupt):
            ended.whole()
    assert ended.validated == 2


def test_another_processor_is_another_verdict(
    ended: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = "model name\t: A\nflags\t\t: avx2 avx512f\ncpu MHz\t\t: {}\n"
    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(cache_keys, "PROCESSOR", cpu)
    cpu.write_text(told.format(2000))
    ended.ends_in_package()
    cpu.write_text(told.format(2100))
    ended.ends_in_package()
    assert ended.validated == 1
    cpu.write_text(told.replace("avx512f", "avx512f amx_int8"))
    ended.whole()
    assert ended.validated == 2


def test_a_verdict_against_is_not_kept(
    ended: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def fail(*_: Any, out_dir: Path, **__: Any) -> None:
        calls.append(out_dir)
        (out_dir / "parity.json").write_text(json.dumps({"passed": False}))
        raise ParityError("validate: no", evidence="cosine 0.1", fix="look")

    monkeypatch.setattr(validate_stage, "run", fail)
    for _ in range(2):
        with pytest.raises(ParityError):
            ended.whole()
    assert len(calls) == 2
    assert not list((ended.out / ".cache").glob("validate-*"))


def test_a_changed_verdict_is_given_anew(ended: Builds) -> None:
    ended.ends_in_package()
    (report,) = (ended.out / ".cache").glob("validate-*/content/parity.json")
    report.write_text(report.read_text().replace('"passed": true', '"passed": maybe'))
    path = ended.whole()
    assert ended.validated == 2
    assert "made again, for the cache's was damaged" in ended.stages["validate"]
    assert json.loads((path / "parity.json").read_text())["passed"] is True


@pytest.fixture
def int8_builds(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Path, dict[str, str]]]:
    low = {
        "cosine_mean": 0.9,
        "cosine_p1": 0.8,
        "top10_overlap": 0.3,
        "allow_slower": True,
        "pair_top10_overlap": 0.3,
        "samples": 48,
    }
    made = recipe.for_model(str(small)).replace_quantize(**low)
    gates = recipe.DEFAULT_GATES | {"int8": {"cosine_mean": 0.9, "batch_cosine_min": 0.999999}}
    spec = dataclasses.replace(made.validate, budget_tokens=1, max_tokens=64, gates=gates)
    made = dataclasses.replace(made, validate=spec)

    def build() -> tuple[Path, dict[str, str]]:
        stages: dict[str, str] = {}
        built = pipeline.build(
            made,
            task="retrieval.passage",
            target="onnx",
            precision="int8",
            out=tmp_path / "out",
            listen=lambda event: (
                stages.update({event.stage: event.text}) if event.kind == "done" else None
            ),
        )
        return built.path, stages

    return build


def test_what_was_measured_of_int8_is_kept_with_it(
    int8_builds: Callable[[], tuple[Path, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(package_stage, "run", ends)
        with pytest.raises(KeyboardInterrupt):
            int8_builds()
    monkeypatch.setattr(float_comparison, "compare_with_float", ends)  # would measure again
    path, stages = int8_builds()
    assert stages["validate"].startswith("from the cache; ")
    assert "with retrieval.query: top-10" in stages["validate"]
    told = json.loads(path.with_name(f"{path.name}.run.json").read_text(encoding="utf-8"))
    assert {one["precision"] for one in told["speed"]} >= {"fp32", "int8"}
    assert told["pair"]["with"] == "retrieval.query"
    report = json.loads((path / "quantization.json").read_text(encoding="utf-8"))
    assert report["bytes"]["int8"] < report["bytes"]["fp32"]
