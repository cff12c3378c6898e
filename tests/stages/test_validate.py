"""validate: what is the same passes, and everything that was broken on purpose does not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from jexport.datasets import calibration
from jexport.errors import ParityError, RecipeError
from jexport.evaluation import reference_set
from jexport.evaluation.candidate import Candidate
from jexport.evaluation.reference_set import ReferenceSet
from jexport.recipe import CompileSpec, ExportSpec, LoadSpec, ValidateSpec
from jexport.runtime.pool import finish, pool
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import export, load, merge, validate
from jexport.targets import onnx as engine
from jexport.types import CalibrationSet, CompiledModel, LoadedModel, Signature

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"
TASK = "retrieval.passage"
SHAPES = ((HIDDEN,), (POOLED,), (HIDDEN, POOLED), (POOLED, HIDDEN))
SHORT = ValidateSpec(budget_tokens=1200, max_tokens=128)
Change = Callable[[dict[str, np.ndarray], Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Altered(TextTokenizer):
    """A tokenizer that does something else to the ids that it made."""

    change: Callable[[list[str], list[list[int]]], list[list[int]]]

    @classmethod
    def of(
        cls, folder: Path, change: Callable[[list[str], list[list[int]]], list[list[int]]]
    ) -> Altered:
        made = cls.open(folder, max_tokens=8192)
        assert isinstance(made, cls)
        made.change = change
        return made

    def token_ids(self, texts: Any, *, first_index: int = 0) -> list[list[int]]:
        return self.change(list(texts), super().token_ids(texts, first_index=first_index))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ReferenceSet]:
    """What the judge gives for a model and texts, made once."""
    kept: dict[Any, ReferenceSet] = {}

    def judge(loaded: LoadedModel, texts: CalibrationSet, spec: ValidateSpec) -> ReferenceSet:
        length = loaded.embedding.max_tokens
        key = (loaded.embedding.task, length, texts.sha256, spec.budget_tokens, spec.max_tokens)
        if key not in kept:
            folder = tmp_path_factory.mktemp("judged")
            load_spec = LoadSpec(model=str(loaded.folder), max_tokens=length)
            reference_set.run(loaded, load_spec, texts, spec, out_dir=folder)
            kept[key] = reference_set.read(folder / reference_set.FILE)
        return kept[key]

    return judge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A comparison of the small checkpoint with its artifact, of which a test breaks a part."""

    judged: Callable[..., ReferenceSet]
    loaded: LoadedModel
    compiled: CompiledModel
    tokenizer: TextTokenizer
    out: Path
    spec: ValidateSpec = SHORT

    def signature(self, names: tuple[str, ...]) -> Signature:
        """What an artifact with these outputs says of itself."""
        whole = self.compiled.signature
        found = tuple(spec for name in names for spec in whole.outputs if spec.name == name)
        return dataclasses.replace(whole, outputs=found)

    def run(
        self,
        outputs: tuple[str, ...] = (HIDDEN,),
        *,
        change: Change | None = None,
        folder: Path | None = None,
        tokenizer: TextTokenizer | None = None,
        texts: CalibrationSet | None = None,
        reference: Callable[[ReferenceSet], ReferenceSet] = lambda found: found,
        embedding: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Any:
        """Validate. change: what the candidate does to its outputs. folder: another graph.

        embedding: what the runtime does otherwise. reference: what is done to the judge's answer.
        """
        signature = self.signature(outputs)
        compiled = dataclasses.replace(
            self.compiled, folder=folder or self.compiled.folder, signature=signature
        )

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            with engine.runner(compiled, "cpu", 1) as forward:
                if change is None:
                    yield forward
                else:
                    yield lambda feed: change(dict(forward(feed)), feed)

        wanted = dataclasses.replace(self.spec, **spec)
        given = texts or calibration.read("parity", TASK)
        return validate.run(
            lambda: reference(self.judged(self.loaded, given, wanted)),
            Candidate(
                tokenizer=tokenizer or self.tokenizer,
                open=opened,
                embedding=dataclasses.replace(self.loaded.embedding, **(embedding or {})),
                outputs=signature.outputs,
            ),
            spec=wanted,
            precision="fp32",
            out_dir=self.out,
        )

    def refused(self, outputs: tuple[str, ...] = (HIDDEN,), **broken: Any) -> tuple[str, Any]:
        """The error's text and the report on the disk, when it is refused as it should be."""
        with pytest.raises(ParityError) as caught:
            self.run(outputs, **broken)
        assert caught.value.exit_code == 6
        report = json.loads((self.out / "parity.json").read_text())
        assert report["passed"] is False
        assert report["failures"]
        return str(caught.value), report


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`made("separation")`: that task of the small checkpoint, opened and compiled once."""
    kept: dict[str, Any] = {}

    def make(task: str) -> Any:
        if task not in kept:
            loaded = load.run(LoadSpec(model=str(small)), task=task)
            folders = [
                tmp_path_factory.mktemp(f"{task}-{stage}") for stage in ("export", "compile")
            ]
            exported = export.run(
                merge.run(loaded),
                ExportSpec(outputs=(HIDDEN, POOLED)),
                precision="fp32",
                samples=(),
                out_dir=folders[0],
            )
            kept[task] = loaded, engine.build(exported, CompileSpec(), folders[1])
        return kept[task]

    return make


@pytest.fixture
def trial(
    made: Callable[[str], Any],
    judged: Callable[..., ReferenceSet],
    small: Path,
    tmp_path: Path,
) -> Trial:
    loaded, compiled = made(TASK)
    tokenizer = TextTokenizer.open(small, max_tokens=loaded.embedding.max_tokens)
    return Trial(judged=judged, loaded=loaded, compiled=compiled, tokenizer=tokenizer, out=tmp_path)


# --- what is the same passes --------------------------------------------------------------------


@pytest.mark.parametrize("outputs", SHAPES)
def test_the_artifact_itself_passes(outputs: tuple[str, ...], trial: Trial) -> None:
    report = trial.run(outputs)
    assert report.passed
    assert report.failures == ()
    assert report.metrics["overall"]["cosine_min"] >= 0.99999
    assert report.metrics["batch"]["cosine_min"] >= 0.99999
    on_disk = json.loads((trial.out / "parity.json").read_text())
    assert on_disk["passed"] is True
    assert on_disk["metrics"] == json.loads(json.dumps(report.metrics))
    assert on_disk["texts"]["sha256"] == calibration.read("parity", TASK).sha256


def test_the_report_has_every_group(trial: Trial) -> None:
    metrics = trial.run((HIDDEN, POOLED)).metrics
    languages = {sample.language for sample in calibration.read("parity", TASK).samples}
    for place in (metrics, metrics[POOLED]):
        assert set(place["by_language"]) == languages | {"mixed"}
        assert {"17-32", "33-64", "65-128"} <= set(place["by_length"])
        assert set(place["by_dimension"]) == {"16", "32", "64"}
        assert place["batch"]["texts"] >= 30
        assert set(place["overall"]) == {
            "texts",
            "cosine_mean",
            "cosine_p1",
            "cosine_min",
            "loss",
            "loss_low",
            "largest_difference",
            "spearman",
            "top10_overlap",
        }
    assert metrics["tokens"]["cosine_min"] > 0.99999
    assert metrics["token_ids_differ"] == 0


def test_the_longest_texts_on_request(trial: Trial) -> None:
    report = trial.run(max_tokens=8192, budget_tokens=100)
    assert {"17-32", "4097-8192"} <= set(report.metrics["by_length"])
    assert report.metrics["overall"]["cosine_min"] >= 0.99999


def test_every_length_by_default(made: Callable[[str], Any], trial: Trial) -> None:
    loaded, compiled = made("separation")  # whose prompt is empty
    usual = dataclasses.replace(trial, loaded=loaded, compiled=compiled, spec=ValidateSpec())
    metrics = usual.run().metrics
    assert list(metrics["by_length"]) == [
        "1-2",
        "3-4",
        "5-8",
        "9-16",
        "17-32",
        "33-64",
        "65-128",
        "129-256",
        "257-512",
        "513-1024",
        "1025-2048",
    ]
    assert len(metrics["by_language"]) == 31


def test_a_model_of_sixteen_tokens(trial: Trial, small: Path) -> None:
    # The prompt alone is longer than that: every text is cut to the same few tokens by both.
    loaded = load.run(LoadSpec(model=str(small), max_tokens=16), task="separation")
    short = dataclasses.replace(
        trial, loaded=loaded, tokenizer=TextTokenizer.open(small, max_tokens=16)
    )
    _, report = short.refused()  # another task's weights, but the same tokens
    assert set(report["metrics"]["by_length"]) == {"1-2", "3-4", "5-8", "9-16"}
    assert report["metrics"]["token_ids_differ"] == 0


def test_progress_ends_at_its_total(trial: Trial) -> None:
    told: list[tuple[int, int]] = []
    loaded = trial.loaded
    texts = calibration.read("parity", TASK)
    validate.run(
        lambda: trial.judged(loaded, texts, trial.spec),
        Candidate(
            tokenizer=trial.tokenizer,
            open=loaded.reference,
            embedding=loaded.embedding,
            outputs=trial.signature((HIDDEN,)).outputs,
        ),
        spec=trial.spec,
        precision="fp32",
        out_dir=trial.out,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]


# --- graphs that were changed -------------------------------------------------------------------


def changed_graph(trial: Trial, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the compiled graph with an edit."""
    folder.mkdir()
    model = onnx.load(trial.compiled.folder / "model.onnx")
    edit(model)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data"
    )
    return folder


def set_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    (tensor,) = [entry for entry in model.graph.initializer if entry.name == name]
    numbers = numpy_helper.to_array(tensor).copy()
    change(numbers)
    tensor.CopyFrom(numpy_helper.from_array(numbers, name))


def one_number(numbers: np.ndarray) -> None:
    numbers[3, 5] += 2.0


def one_number_a_little(numbers: np.ndarray) -> None:
    numbers[3, 5] += 0.1


def nan(numbers: np.ndarray) -> None:
    numbers[3, 5] = np.nan


@pytest.mark.parametrize("outputs", SHAPES[:3])
@pytest.mark.parametrize(
    "name", ["layers.0.mlp.fc1.weight", "layers.1.self_attn.q_proj_k_proj_v_proj.weight"]
)
def test_one_weight_changed(
    outputs: tuple[str, ...], name: str, trial: Trial, tmp_path: Path
) -> None:
    folder = changed_graph(
        trial, tmp_path / "graph", lambda model: set_weight(model, name, one_number)
    )
    text, report = trial.refused(outputs, folder=folder)
    assert "cosine_min" in text
    assert report["metrics"]["overall"]["cosine_min"] < 0.99999


def test_a_small_change_is_seen_by_the_gate_on_differences(trial: Trial, tmp_path: Path) -> None:
    name = "layers.0.mlp.fc1.weight"
    folder = changed_graph(
        trial, tmp_path / "graph", lambda model: set_weight(model, name, one_number_a_little)
    )
    gates = {"fp32": {"largest_difference": 1e-4}}
    assert trial.run(gates=gates).passed
    text, _ = trial.refused(folder=folder, gates=gates)
    assert "largest_difference" in text


@pytest.mark.parametrize("outputs", SHAPES[:3])
def test_nan_in_a_weight(outputs: tuple[str, ...], trial: Trial, tmp_path: Path) -> None:
    folder = changed_graph(
        trial, tmp_path / "graph", lambda model: set_weight(model, "layers.0.mlp.fc1.weight", nan)
    )
    text, report = trial.refused(outputs, folder=folder)
    assert "NaN" in text
    assert "NaN" in report["failures"][0]


@pytest.mark.parametrize("name", [HIDDEN, POOLED])
@pytest.mark.parametrize("renamed", [False, True])
def test_an_output_is_gone(name: str, renamed: bool, trial: Trial, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        (value,) = [entry for entry in model.graph.output if entry.name == name]
        if not renamed:
            model.graph.output.remove(value)
            return
        value.name = "embeddings"
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["embeddings" if n == name else n for n in names]

    folder = changed_graph(trial, tmp_path / "graph", edit)
    text, _ = trial.refused((HIDDEN, POOLED), folder=folder)
    assert f"'{name}'" in text
    other = POOLED if name == HIDDEN else HIDDEN
    assert trial.run((other,), folder=folder).passed  # the graph is whole but for that


def test_another_tasks_adapter(made: Callable[[str], Any], trial: Trial) -> None:
    _, separation = made("separation")
    text, _ = trial.refused(folder=separation.folder)
    assert "cosine_min" in text


# --- outputs that were changed ------------------------------------------------------------------


def test_a_vector_that_depends_on_its_batch(trial: Trial) -> None:
    def mix(made: dict[str, np.ndarray], feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value + 0.05 * value.mean(axis=0) for name, value in made.items()}

    loose = {"fp32": {"cosine_min": 0.5, "batch_cosine_min": 0.99999}}
    for outputs in SHAPES[:3]:
        text, report = trial.refused(outputs, change=mix, gates=loose)
        assert "batch: cosine_min" in text
        assert report["metrics"]["overall"]["cosine_min"] > 0.5


@pytest.mark.parametrize("outputs", SHAPES[1:])
@pytest.mark.parametrize("mode", ["cls", "max"])
def test_wrong_pooling(outputs: tuple[str, ...], mode: str, trial: Trial) -> None:
    (hidden,) = trial.compiled.signature.outputs[:1]

    def pool_so(
        made: dict[str, np.ndarray], feed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        tokens = np.asarray(whole(feed)[hidden.name])
        vectors = pool(tokens, feed["attention_mask"], mode)
        return made | {POOLED: finish(vectors, dimensions=None, normalize=True)}

    with engine.runner(trial.compiled, "cpu", 1) as whole:
        text, _ = trial.refused(outputs, change=pool_so)
    assert "cosine_min" in text


@pytest.mark.parametrize("outputs", SHAPES[1:])
def test_a_pooled_output_that_is_not_normalised(outputs: tuple[str, ...], trial: Trial) -> None:
    def longer(made: Any, feed: Any) -> Any:
        return made | {POOLED: made[POOLED] * 1.01}

    text, report = trial.refused(outputs, change=longer)
    assert "not L2-normalised" in text
    place = report["metrics"] if outputs[0] == POOLED else report["metrics"][POOLED]
    assert place["norms"]["largest_error"] == pytest.approx(0.01, rel=0.01)


def test_a_checkpoint_that_does_not_normalise(trial: Trial) -> None:
    def longer(found: ReferenceSet) -> ReferenceSet:
        return dataclasses.replace(found, vectors=found.vectors * 3)

    text, report = trial.refused(reference=longer)  # no cosine sees it
    assert "no Normalize module" in text
    assert "set other gates" not in text
    assert report["metrics"]["norms"]["largest_error"] == pytest.approx(2 / 3, rel=0.01)
    assert report["metrics"]["overall"]["cosine_min"] > 0.99999


def test_a_late_token_vector_that_is_wrong(trial: Trial) -> None:
    def last(made: Any, feed: Any) -> Any:
        vectors = made[HIDDEN].copy()
        vectors[:, -1] = vectors[:, -1, ::-1]
        return {HIDDEN: vectors}

    gates = {"fp32": {"token_cosine_min": 0.999}}
    text, _ = trial.refused(change=last, gates=gates)
    assert "tokens: cosine_min" in text
    assert trial.run(gates=gates).passed


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("pooled under the name of token vectors", lambda v: v[:, 0]),
        ("a token less", lambda v: v[:, :-1]),
        ("a row less", lambda v: v[:-1]),
        ("narrower", lambda v: v[..., :32]),
    ],
)
def test_an_output_of_another_shape(what: str, change: Any, trial: Trial) -> None:
    text, report = trial.refused(change=lambda made, feed: {HIDDEN: change(made[HIDDEN])})
    assert "another shape" in text, what
    assert "another shape" in report["failures"][0]


def test_a_foreign_error_passes_through_with_a_note(trial: Trial) -> None:
    def burst(made: Any, feed: Any) -> Any:
        raise OSError("no device")

    with pytest.raises(OSError, match="no device") as caught:
        trial.run(change=burst)
    assert any("validate: while running a batch of shape" in n for n in caught.value.__notes__)


# --- texts and tokens ---------------------------------------------------------------------------


def test_wrong_prompt(trial: Trial) -> None:
    text, report = trial.refused(embedding={"prompt": "Represent: "})
    assert "token ids differ in" in text
    assert report["metrics"]["token_ids_differ"] >= report["metrics"]["texts"]
    assert "prompt" in text
    assert "set other gates" not in text


def test_no_prompt_where_there_is_one(trial: Trial) -> None:
    text, _ = trial.refused((POOLED,), embedding={"prompt": ""})
    assert "token ids differ in" in text
    assert "likely prompt: the checkpoint puts one there" in text


def test_a_tokenizer_that_cuts_earlier(trial: Trial, small: Path) -> None:
    text, report = trial.refused(tokenizer=TextTokenizer.open(small, max_tokens=60))
    assert "token ids differ in" in text
    assert 0 < report["metrics"]["token_ids_differ"] < report["metrics"]["texts"]
    assert "max_seq_length: the checkpoint cuts at 8192 tokens, the artifact at 60" in text


def test_other_ids_fail_even_when_the_vectors_are_near(trial: Trial, small: Path) -> None:
    def one_other(texts: list[str], ids: list[list[int]]) -> list[list[int]]:
        for text, one in zip(texts, ids, strict=True):
            if text.endswith(changed) and len(text) > len(changed):
                one[20] += 1
        return ids

    changed = (
        trial.judged(trial.loaded, calibration.read("parity", TASK), trial.spec).samples[1].text
    )

    text, report = trial.refused(
        tokenizer=Altered.of(small, one_other), gates={"fp32": {"cosine_min": -1.0}}
    )
    assert "token ids differ in 1 of" in text
    assert "text 1 (language '" in text
    assert "at token 20: the checkpoint has" in text
    assert report["metrics"]["overall"]["cosine_min"] > 0


def nothing(texts: list[str], ids: list[list[int]]) -> list[list[int]]:
    return [[] for _ in texts]


def test_an_empty_set(trial: Trial) -> None:
    texts = CalibrationSet(name="empty", samples=(), sha256="0" * 64)
    text, report = trial.refused(texts=texts)
    assert "no text to compare" in text
    assert report["metrics"] == {}


def test_texts_without_a_token(trial: Trial, small: Path) -> None:
    text, report = trial.refused(tokenizer=Altered.of(small, nothing))
    assert "gives no token" in text
    assert report["metrics"] == {}


def test_one_text_is_too_few(trial: Trial) -> None:
    def only_the_first(found: ReferenceSet) -> ReferenceSet:
        return dataclasses.replace(
            found,
            samples=found.samples[:1],
            uses=found.uses[:1],
            ids=found.ids[:1],
            vectors=found.vectors[:1],
            tokens=found.tokens[:1],
        )

    text, _ = trial.refused(reference=only_the_first)
    assert "few texts" in text


@pytest.mark.parametrize("gates", [{}, {"fp16": {"cosine_min": 0.5}}, {"fp32": {}}])
def test_no_gates_for_this_precision(gates: Any, trial: Trial) -> None:
    with pytest.raises(RecipeError, match="no gates for fp32"):
        trial.run(gates=gates)


def test_token_gates_are_for_token_vectors(trial: Trial) -> None:
    gates = {"fp32": {"token_cosine_min": 0.99999, "cosine_min": 0.99999}}
    for outputs in SHAPES:
        assert trial.run(outputs, gates=gates).passed
    text, _ = trial.refused((POOLED,), gates={"fp32": {"token_cosine_min": 0.5}})
    assert "no gate" in text


def test_every_failure_is_in_the_report_and_the_first_are_told(trial: Trial) -> None:
    def noise(made: Any, feed: Any) -> Any:
        rng = np.random.default_rng(0)
        return {n: v + rng.normal(size=v.shape).astype(np.float32) for n, v in made.items()}

    text, report = trial.refused(change=noise)
    assert len(report["failures"]) > 30
    assert f"and {len(report['failures']) - 8} more" in text


def test_batches_of_one_are_batched_for_the_batch_gate(trial: Trial) -> None:
    # Texts too long to share a batch: the gate still compares a padded pair.
    def only_long(found: ReferenceSet) -> ReferenceSet:
        rows = [row for row, ids in enumerate(found.ids[: len(found.vectors)]) if len(ids) > 512]
        return dataclasses.replace(
            found,
            samples=tuple(found.samples[row] for row in rows),
            uses=tuple(found.uses[row] for row in rows),
            ids=tuple(found.ids[row] for row in rows),
            vectors=found.vectors[rows],
            tokens=tuple(found.tokens[row] for row in rows),
        )

    def mix(made: Any, feed: Any) -> Any:
        rows = feed["input_ids"].shape[0]
        return {name: value + (rows > 1) * 0.3 * value[::-1] for name, value in made.items()}

    common = {"reference": only_long, "max_tokens": 2048, "budget_tokens": 5000}
    assert trial.run(**common).metrics["batch"]["texts"] == 2
    text, _ = trial.refused(change=mix, **common)
    assert "batch: cosine_min" in text
