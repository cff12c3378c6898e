"""Two machines: one without a GPU builds up to the engine, one with a GPU completes it.

The second machine's TensorRT and GPU are stand-ins that compute with onnxruntime
(tests/targets/trt).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import jexport
from jexport.artifacts import manifest, reference, store
from jexport.building import portable as portable_build
from jexport.cache import entries
from jexport.errors import ArtifactError, DeviceError, ParityError, QuantizationError
from jexport.graph.diagnostics import errors
from jexport.targets.trt.lint import lint
from jexport.workspace.run import Event

TASK = "retrieval.query"
RECIPE = """name = "small"
[compile]
profiles = [
  {batch = [1, 4, 16], tokens = [1, 32, 64]},
  {batch = [1, 2, 8], tokens = [65, 128, 1024]},
]
[quantize]
samples = 64
top10_overlap = 0.3
pair_top10_overlap = 0.3
[validate]
budget_tokens = 1
max_tokens = 64
[validate.gates.int8]
cosine_mean = 0.99
cosine_p1 = 0.98
batch_cosine_min = 0.9999
"""


@pytest.fixture(scope="module")
def portable(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`portable("fp16")`: such an artifact, not to be changed; its checkpoint is gone."""
    from jexport import recipe

    room = tmp_path_factory.mktemp("portable")
    (room / "r.toml").write_text(RECIPE)
    made: dict[tuple[str, str], Path] = {}

    def build(precision: str, task: str = TASK) -> Path:
        if (precision, task) not in made:
            checkpoint = Path(shutil.copytree(small, room / "checkpoint"))
            chosen = recipe.read(str(room / "r.toml")).replace_load(model=str(checkpoint))
            try:
                made[precision, task] = jexport.build(
                    chosen,
                    task=task,
                    target="trt",
                    precision=precision,
                    until="compile",
                    out=room / "out",
                ).path
            finally:
                shutil.rmtree(checkpoint)
        return made[precision, task]

    return build


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`no_torch()`: from here on this is the second machine, which has neither."""

    def leave() -> None:
        for name in ("torch", "transformers"):
            monkeypatch.setitem(sys.modules, name, None)

    return leave


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_portable_artifact_holds_all_that_is_needed(
    precision: str, portable: Callable[..., Path]
) -> None:
    folder = portable(precision)
    content = manifest.verify(folder).content
    assert (content["target"], content["precision"]) == ("trt", precision)
    assert content["parity"]["passed"]
    facts = content["engine"]["facts"]
    assert facts["portable"] is True
    assert facts["profiles"] == [
        {"batch": [1, 4, 16], "tokens": [1, 32, 64]},
        {"batch": [1, 2, 8], "tokens": [65, 128, 1024]},
    ]
    assert not errors(lint(folder / "model.onnx", max_tokens=1024))
    stored = reference.read(folder / reference.NAME)
    assert stored.vectors.shape == (content["parity"]["texts"], content["embedding"]["dimension"])
    assert len(set(stored.languages)) >= 30
    with pytest.raises(ArtifactError, match="has no engine yet"):
        jexport.open_artifact(folder)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_other_machine_completes_it(
    precision: str,
    portable: Callable[..., Path],
    bench: Any,
    no_torch: Callable[[], None],
    cli: Callable[..., Any],
    texts: list[str],
    tmp_path: Path,
    small: Path,
) -> None:
    source = portable(precision)
    no_torch()
    before = (source / manifest.NAME).read_bytes()
    answer = cli("compile", source, "--out", tmp_path / "here")
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert content["engine"]["files"] == ["model.plan"]
    assert not (answer.path / "model.onnx").exists()
    assert content["engine"]["runs_on"]["device"].startswith("Stand-In 3090")
    assert content["engine"]["facts"]["portable_sha256"] == json.loads(before)["sha256"]
    stages = [record["stage"] for record in store.measured(answer.path)["stages"]]
    assert stages == ["compile", "validate", "package"]
    assert (source / manifest.NAME).read_bytes() == before
    truth = np.load(small.with_name(f"{small.name}.{TASK}.npy"))
    with jexport.open_artifact(answer.path) as model:
        cosines = (model.encode(texts) * truth).sum(axis=1)
    floor = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}[precision]
    assert np.median(cosines) >= floor
    again = cli("compile", source, "--out", tmp_path / "here")
    assert again.path == answer.path
    assert "already compiled for this machine" in again.err
    # What a run killed between its two last steps leaves is mended by compiling again.
    latest = answer.path.parent / "latest"
    latest.unlink()
    assert cli("compile", source, "--out", tmp_path / "here").path == answer.path
    assert latest.resolve() == answer.path
    other = cli("compile", source, "--out", tmp_path / "here", "--weight-stripped").path
    assert latest.resolve() == other != answer.path
    assert cli("compile", source, "--out", tmp_path / "here").path == answer.path
    assert latest.resolve() == answer.path
    assert not (tmp_path / "here" / ".work").exists()
    assert bench.gpu.leaks() == {"device": 0, "host": 0, "handles": 0}


def test_quantizers_stand_where_tensorrt_wants_them(portable: Callable[..., Path]) -> None:
    graph = onnx.load(portable("int8") / "model.onnx").graph
    made = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert all(tensor.data_type != TensorProto.UINT8 for tensor in graph.initializer)
    quantized = plain = 0
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            zero = [weights[name] for name in node.input[2:] if name]
            assert not any(numpy_helper.to_array(one).any() for one in zero)
        if node.op_type != "MatMul":
            continue
        first, second = (made.get(name) for name in node.input)
        if second is not None and second.op_type == "DequantizeLinear":
            weight, scale = (weights[name] for name in second.input[:2])
            assert weight.data_type == TensorProto.INT8
            assert list(scale.dims) == [weight.dims[1]]  # per channel
            assert [a.i for a in second.attribute if a.name == "axis"] == [1]
            assert first is not None
            assert first.op_type == "DequantizeLinear"
            assert not list(weights[first.input[1]].dims)  # per tensor
            assert made[first.input[0]].op_type == "QuantizeLinear"
            quantized += 1
        else:  # attention: both inputs computed, neither through int8
            kinds = {one.op_type for one in (first, second) if one is not None}
            assert not kinds & {"DequantizeLinear", "QuantizeLinear"}
            plain += 1
    assert (quantized, plain) == (8, 4)  # two layers: four products and two of attention each


def test_int8_queries_and_passages_are_compared_without_their_engines(
    portable: Callable[..., Path],
) -> None:
    portable("int8")
    second = portable("int8", "retrieval.passage")
    pair = store.measured(second)["pair"]
    assert pair["with"] == TASK
    for folder in (portable("int8"), second):
        told = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))["command"]
        assert told.endswith(" --until compile")
        assert told in (folder / "report.html").read_text(encoding="utf-8")
    for name in (
        "queries_int8_passages_fp32",
        "queries_fp32_passages_int8",
        "queries_int8_passages_int8",
    ):
        assert 0.3 < pair[name]["top10_overlap"] <= 1


def test_without_a_gpu_it_says_so_and_leaves_it(
    portable: Callable[..., Path], bench: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    bench.gpu.count = 0
    answer = cli("compile", portable("fp32"), "--out", tmp_path / "here")
    assert answer.code == DeviceError.exit_code
    assert not (tmp_path / "here").exists()
    manifest.verify(portable("fp32"))


def test_an_engine_that_computes_something_else_is_not_kept(
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jexport.targets import trt

    real = trt.TARGET.runner

    def wrong(*given: Any) -> Any:
        import contextlib

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            with real(*given) as run:
                yield lambda feed: {n: v[:, :, ::-1] for n, v in run(feed).items()}

        return opened()

    object.__setattr__(trt.TARGET, "runner", wrong)
    try:
        answer = cli("compile", portable("fp32"), "--out", tmp_path / "here")
    finally:
        object.__setattr__(trt.TARGET, "runner", real)
    assert answer.code == ParityError.exit_code
    assert not list((tmp_path / "here").rglob(manifest.NAME))
    [report] = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert report.name.endswith(".failed.json")
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["passed"] is False
    assert content["failures"]
    assert f"report: {report}" in answer.err


def test_what_is_not_portable_or_was_changed_is_refused(
    portable: Callable[..., Path], artifact: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    answer = cli("compile", artifact)
    assert answer.code == ArtifactError.exit_code
    assert "is not a portable artifact" in answer.err
    changed = Path(shutil.copytree(portable("fp32"), tmp_path / "changed"))
    with open(changed / reference.NAME, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    answer = cli("compile", changed)
    assert answer.code == ArtifactError.exit_code
    assert reference.NAME in answer.err


def test_until_is_for_targets_that_have_an_end_elsewhere(
    small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    answer = cli(
        "build",
        "--model",
        small,
        "--task",
        TASK,
        "--target",
        "onnx",
        "--until",
        "compile",
        "--out",
        tmp_path,
    )
    assert answer.code == 4
    assert "there is no --until for it" in answer.err


def test_profiles_are_chosen_by_the_lengths_of_texts(
    small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(["short one"] * 40 + ["word " * 60] * 10), encoding="utf-8")
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    answer = cli(
        "build",
        "--recipe",
        recipe,
        "--model",
        small,
        "--task",
        TASK,
        "--target",
        "trt",
        "--until",
        "compile",
        "--profile-from",
        texts,
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0, answer.err
    content = manifest.read(answer.path).content
    found = content["engine"]["facts"]["profiles"]
    assert 2 <= len(found) <= 4
    assert found[0]["tokens"][2] < 60 < found[1]["tokens"][1]  # short ones for themselves
    assert content["recipe"]["compile"]["profiles"] == found
    answer = cli(
        "build",
        "--model",
        small,
        "--task",
        TASK,
        "--target",
        "onnx",
        "--profile-from",
        texts,
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 5
    assert "not tuned to the lengths" in answer.err


def test_one_engine_takes_the_weights_of_every_task(
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    texts: list[str],
    tmp_path: Path,
    small: Path,
) -> None:
    def compiled(task: str, *words: Any) -> Path:
        answer = cli("compile", portable("fp32", task), "--out", tmp_path / "here", *words)
        assert answer.code == 0, answer.err
        found: Path = answer.path
        return found

    first = compiled(TASK, "--weight-stripped")
    assert {"model.plan", "model.stripped.plan"} <= {path.name for path in first.iterdir()}
    built = len(bench.record.named("build_serialized_network"))
    assert built
    for task in ("separation", TASK, "separation"):  # there, back, and there again
        folder = compiled(task, "--refit-from", first)
        facts = manifest.verify(folder).content["engine"]["facts"]
        assert facts["refitted_from"] == manifest.read(first).content["sha256"]
        truth = np.load(small.with_name(f"{small.name}.{task}.npy"))
        with jexport.open_artifact(folder) as model:
            assert (model.encode(texts) * truth).sum(axis=1).min() >= 0.99999
    assert len(bench.record.named("build_serialized_network")) == built  # nothing was built again


def test_completed_and_refitted_engines_say_what_they_are_attested_by(
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    vouching: Callable[[Path, Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "here"
    first = cli("compile", portable("fp32"), "--out", out, "--weight-stripped").path
    other = cli("compile", portable("fp32", "separation"), "--out", out, "--refit-from", first).path
    found = []
    for made, source in ((first, portable("fp32")), (other, portable("fp32", "separation"))):
        facts = manifest.verify(made).content["engine"]["facts"]
        assert facts["reproducible"] is False
        assert facts["attested_by"] == vouching(made, source)
        found.append(facts["attested_by"])
        # The portable one is made again bit for bit; nothing needs to vouch for it.
        assert "attested_by" not in manifest.read(source).content["engine"]["facts"]
    assert all(found[0][key] != found[1][key] for key in found[0])


def test_what_cannot_be_refitted_is_refused(
    portable: Callable[..., Path], bench: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "here"
    plain = cli("compile", portable("fp32"), "--out", out).path
    other = portable("fp32", "separation")
    answer = cli("compile", other, "--out", out, "--refit-from", plain)
    assert answer.code == 29
    assert "compile one task with --weight-stripped first" in answer.err
    stripped = cli("compile", portable("fp32"), "--out", out, "--weight-stripped").path
    bench.gpu.major = 9
    answer = cli("compile", other, "--out", out, "--refit-from", stripped)
    assert answer.code == DeviceError.exit_code
    bench.gpu.major = 8
    with (stripped / "model.stripped.plan").open("ab") as file:
        file.write(b".")
    seen = len(bench.record.named("deserialize_cuda_engine"))
    answer = cli("compile", other, "--out", out, "--refit-from", stripped)
    assert answer.code == ArtifactError.exit_code
    assert len(bench.record.named("deserialize_cuda_engine")) == seen
    assert not list((out / "small" / "separation").rglob(manifest.NAME))


# --- the engine in the cache ---------------------------------------------------------------------


def built(bench: Any) -> int:
    """How many engines this process has asked TensorRT for."""
    return len(bench.record.named("build_serialized_network"))


def killed_at(stage: str, source: Path, out: Path) -> None:
    """Complete `source` in a child that is killed, with nothing caught, when a stage begins."""

    def listen(event: Event) -> None:
        if (event.kind, event.stage) == ("start", stage):
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            portable_build.compile_portable(source, out=out, listen=listen)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(("stage", "again"), [("compile", 1), ("validate", 0), ("package", 0)])
def test_a_killed_run_does_not_build_its_engine_again(
    stage: str,
    again: int,
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    texts: list[str],
    tmp_path: Path,
) -> None:
    source, out = portable("fp32"), tmp_path / "here"
    killed_at(stage, source, out)
    assert not list(out.glob(f"*/**/{manifest.NAME}"))
    answer = cli("compile", source, "--out", out)
    assert answer.code == 0, answer.err
    assert built(bench) == again
    assert ("from the cache" in answer.err) == (not again)
    assert not (out / ".work").exists()
    manifest.verify(answer.path)
    [entry] = entries.listed(out / ".cache")
    assert entry.name.startswith("compile-")
    assert f"small {TASK} trt-fp32" in entry.about
    assert [name for name, problem in entries.verify(out / ".cache") if problem] == []
    with jexport.open_artifact(answer.path) as model:
        assert model.encode(texts).shape[0] == len(texts)
    assert bench.gpu.leaks() == {"device": 0, "host": 0, "handles": 0}


def test_the_kept_engine_is_of_this_machine_and_these_settings(
    portable: Callable[..., Path], bench: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "here"

    def compiled(precision: str, *words: Any) -> Path:
        answer = cli("compile", portable(precision), "--out", out, *words)
        assert answer.code == 0, answer.err
        shutil.rmtree(answer.path.parent)  # only the cache remembers
        found: Path = answer.path
        return found

    first = compiled("fp32")
    assert built(bench) == 1
    assert compiled("fp32") == first
    assert compiled("fp32", "--timing-cache", tmp_path / "timings") == first
    assert built(bench) == 1
    compiled("fp16")
    assert built(bench) == 2
    compiled("fp32", "--weight-stripped")
    assert built(bench) == 3
    bench.gpu.minor = 9
    assert compiled("fp32") != first
    assert built(bench) == 4
    bench.gpu.minor = 6
    assert compiled("fp32") == first
    assert built(bench) == 4
    compiled("fp32", "--no-cache")
    assert built(bench) == 5
    compiled("fp32", "--cache", tmp_path / "elsewhere")
    assert built(bench) == 6
    assert len(entries.listed(tmp_path / "elsewhere")) == 1
    assert len(entries.listed(out / ".cache")) == 4


@pytest.mark.parametrize("name", ["content/model.plan", "entry.json"])
def test_a_damaged_engine_in_the_cache_is_built_again_and_never_opened(
    name: str,
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source, out = portable("fp32"), tmp_path / "here"
    shutil.rmtree(cli("compile", source, "--out", out).path.parent)
    [entry] = (out / ".cache").glob("compile-*")
    whole = (entry / "content" / "model.plan").read_bytes()
    damaged = bytearray((entry / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (entry / name).write_bytes(damaged)
    answer = cli("compile", source, "--out", out)
    assert answer.code == 0, answer.err
    assert built(bench) == 2
    assert "was damaged" in answer.err
    assert (answer.path / "model.plan").read_bytes() == whole  # the stand-in's are always the same
    assert [problem for _, problem in entries.verify(out / ".cache")] == [""]


def test_a_plan_that_changes_in_the_cache_meanwhile_is_not_opened(
    portable: Callable[..., Path], bench: Any, tmp_path: Path
) -> None:
    source, out = portable("fp32"), tmp_path / "here"

    def listen(event: Event) -> None:
        if (event.kind, event.stage) == ("start", "validate"):
            [plan] = (out / ".cache").glob("compile-*/content/model.plan")
            with plan.open("ab") as file:
                file.write(b".")

    with pytest.raises(ArtifactError, match=r"model\.plan"):
        portable_build.compile_portable(source, out=out, listen=listen)
    assert bench.record.named("deserialize_cuda_engine") == []
    assert not list(out.glob(f"*/**/{manifest.NAME}"))


def test_int8_that_is_too_slow_keeps_its_engine_for_allow_slower(
    portable: Callable[..., Path],
    bench: Any,
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "here"
    assert cli("compile", portable("fp16"), "--out", out).code == 0
    monkeypatch.setattr(
        portable_build.speed, "compare", lambda runners, batch: {"fp16": 9.0, "int8": 3.0}
    )
    answer = cli("compile", portable("int8"), "--out", out)
    assert answer.code == QuantizationError.exit_code, answer.err
    assert built(bench) == 2
    answer = cli("compile", portable("int8"), "--out", out, "--allow-slower")
    assert answer.code == 0, answer.err
    assert built(bench) == 2
