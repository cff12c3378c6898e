"""benchmarks/gpu.py in its small form on the CPU, its report, and the run that holds both."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_check, table
from benchmarks.on_gpu import measure, models, report, run, trial

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(small_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--provider cpu --small` leaves."""
    out = tmp_path_factory.mktemp("bench")
    words = ("--provider", "cpu", "--small", "--work", str(small_work), "--out", str(out))
    gpu.main([*words, "--page"])
    return out


@pytest.fixture(scope="module")
def content(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / gpu.RESULTS).read_text(encoding="utf-8"))
    return found


def test_everything_is_measured(content: dict[str, Any]) -> None:
    assert content["left_out"] == []
    measured = content["measured"]
    lengths = [tokens for _, tokens in run.SMALL.shapes]
    for model in models.models(small=True):
        for side in (run.FP16, run.FP32, run.TORCH, run.EXACT):
            assert {
                one["tokens"]
                for one in measured
                if (one["model"], one["side"]) == (model.name, side) and one["kind"] == "graph"
            } >= set(lengths)
        for side in (run.FP16, run.TORCH):
            kinds = {
                (one["kind"], one["tokens"])
                for one in measured
                if (one["model"], one["side"]) == (model.name, side)
            }
            assert kinds >= {
                ("encode", "mix"),
                ("one graph", 16),
                *(("encode", n) for n in lengths),
            }
    assert {one["kind"] for one in measured if one["side"] == run.COMPILED} == {"graph", "encode"}
    for one in measured:
        assert one["seconds"]
        assert min(one["seconds"]) > 0
        assert one["cosine_min"] is None or one["cosine_min"] > 0.999, one


def test_a_wrong_side_would_be_seen(content: dict[str, Any]) -> None:
    """Sides of one group embed the same texts: the cosines of all are real numbers near one."""
    exact = [one["cosine_min"] for one in content["measured"] if one["side"] == run.EXACT]
    half = [one["cosine_min"] for one in content["measured"] if one["side"] == run.TORCH]
    assert min(exact) > 0.9999999
    assert 0.999 < min(half) < 0.9999999  # float16 rounds: it is not compared with itself


def test_the_section_is_made_again_from_the_file(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(table.HEAD + "\n## Another\n\ntext\n\n## On a GPU\n\nold\n", encoding="utf-8")
    monkeypatch.setattr(table, "PAGE", page)
    gpu.main(["--from", str(results / gpu.RESULTS)])
    text = page.read_text(encoding="utf-8")
    section = (results / gpu.SECTION).read_text(encoding="utf-8")
    assert section.strip() in text
    assert "\nold\n" not in text
    assert "## Another\n\ntext\n" in text
    assert "no number means anything" in section
    assert trial.SOURCE in section


def test_a_small_run_never_gets_onto_the_page(results: Path) -> None:
    """`--page` was given to `results`."""
    page = ROOT / "BENCHMARKS.md"
    assert "no number means anything" not in page.read_text(encoding="utf-8")


# --- the goals ------------------------------------------------------------------------------------


def record(**values: Any) -> dict[str, Any]:
    one = {
        "group": "a",
        "model": models.FULL,
        "kind": "graph",
        "side": run.FP16,
        "tokens": 512,
        "texts": 32,
        "real_tokens": 32 * 512,
        "flop": 1e12,
        "memory_bytes": 0,
        "cosine_min": 1.0,
        "seconds": [0.01, 0.01, 0.01],
    }
    return {**one, **values}


def met(*measured: dict[str, Any]) -> list[bool | None]:
    content = {"measured": list(measured), "peak": {"tflops": 200.0, "size": 1}}
    return [goal.met for goal in report.goals(content)]


def test_goals_that_nothing_was_measured_of() -> None:
    assert met() == [None, None, None, None]


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0100, True), (0.0112, False)])
def test_the_goal_of_encode_is_a_share_of_its_graph(seconds: float, wanted: bool) -> None:
    bare = record(tokens="mix", seconds=[0.0099] * 3)
    whole = record(tokens="mix", kind="encode", seconds=[seconds] * 3)
    assert met(bare, whole)[0] is wanted
    assert met({**bare, "group": "b"}, whole)[0] is None  # not in turn with it


@pytest.mark.parametrize(("seconds", "wanted"), [(0.009, True), (0.011, False)])
def test_the_goal_against_torch_holds_at_every_length(seconds: float, wanted: bool) -> None:
    own = [record(), record(tokens=16, seconds=[seconds] * 3)]
    torch = [record(side=run.TORCH), record(side=run.TORCH, tokens=16)]
    assert met(*own, *torch)[1] is wanted


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0111, True), (0.0112, False)])
def test_the_goal_of_the_peak_is_at_512_tokens(seconds: float, wanted: bool) -> None:
    assert met(record(seconds=[seconds]))[2] is wanted  # 90 of 200 TFLOP/s
    assert met(record(seconds=[seconds], tokens=128))[2] is None


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0019, True), (0.0021, False)])
def test_the_goal_of_one_text_needs_cuda_graphs(seconds: float, wanted: bool) -> None:
    one = record(kind="one encode", tokens=16, texts=1, seconds=[seconds] * 3)
    assert met(one)[3] is None
    assert met({**one, "side": f"{run.FP16}, {run.GRAPHS}"})[3] is wanted


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 201)]
    assert measure.percentile(values, 0.5) == 100.0
    assert measure.percentile(values, 0.99) == 198.0
    assert measure.percentile([3.0], 0.99) == 3.0


def test_work_is_counted_as_the_trial_counted_it() -> None:
    full = models.models(small=False)[0]
    # 3,225 texts of 128 tokens a second were 255 TFLOP/s there, 30 of 8,192 were 345.
    assert 3225 * full.flop(128) / 1e12 == pytest.approx(255, rel=0.01)
    assert 30 * full.flop(8192) / 1e12 == pytest.approx(345, rel=0.03)


def test_a_side_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nmore")

    taken = measure.in_turn({"a": lambda: None, "b": broken}, rounds=3, seconds=9)
    assert taken.failed == {"b": "RuntimeError: no kernel"}
    assert len(taken.seconds["a"]) == 3
    assert taken.seconds["b"] == []


def test_builds_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size each is a process: one that fails says why, and the others are there."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\necho noise\nif [ "$6" = fp32 ]; then echo "ParityError: far off"; exit 6; fi\n'
        'echo "$4/$5/$6"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(fake))
    jina = models.models(small=False)[0]
    made = models._built([(jina, "fp16"), (jina, "fp32")], tmp_path, small=False)
    assert made == [tmp_path / "jina" / "fp16", "ParityError: far off"]


def test_memory_is_the_sides_that_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, used = measure.Memory("cpu"), [1000]
    monkeypatch.setattr(memory, "used", lambda: used[0])
    of = measure.MemoryOf(memory)
    for name, kept, rise in (("a", 300, 0), ("b", 50, 0), ("a", 0, 70), ("b", 20, 500)):
        with of.acting(name, sampled=name == "a"):
            used[0] += kept + rise
            if name == "a":
                time.sleep(10 * measure.SAMPLE_S)
                used[0] -= rise
        used[0] -= rise if name == "b" else 0
    assert of.peak == {"a": 370, "b": 570}


# --- gpu-check ------------------------------------------------------------------------------------


def check(out: Path, **values: Any) -> gpu_check.Check:
    out.mkdir(exist_ok=True)
    asked = {
        "out": out,
        "work": out / "work",
        "provider": "cpu",
        "small": True,
        "seconds": 60.0,
        "packed": out / "none",
    }
    return gpu_check.Check(argparse.Namespace(**{**asked, **values}))


def test_a_part_is_cut_off_with_all_that_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    part = check(tmp_path).part("slow", "-c", script, limit_s=1.5)
    begin = time.monotonic()
    part.run()
    assert part.status == "cut off after 2 s"
    assert time.monotonic() - begin < 20
    child = int(part.log.read_text().split()[0])
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the part had started went on")


def test_the_summary_is_written_whatever_failed(tmp_path: Path, content: dict[str, Any]) -> None:
    one = check(tmp_path)
    tests = one.part("tests", "-c", "pass", limit_s=9)
    tests.status = "exit code 1"
    names = [f"tests/gpu/test_x.py::test_{n}" for n in range(30)]
    lines = [f"{name} FAILED [ 1%]" for name in names] + ["tests/gpu/test_x.py::test_y PASSED [9%]"]
    lines += [f"FAILED {name} - assert {n} == 1" for n, name in enumerate(names)]
    tests.log.write_text("\n".join(lines), encoding="utf-8")
    assert "bench: it left no result" in gpu_check.summary(one)
    (tmp_path / gpu.RESULTS).write_text(json.dumps(content), encoding="utf-8")
    text = gpu_check.summary(one)
    assert len(text) <= gpu_check.LINES
    assert max(map(len, text)) <= gpu_check.WIDTH
    assert "tests: exit code 1, 0 s" in text
    assert "tests: 30 failed, 1 passed" in text
    assert any("assert 0 == 1" in line for line in text)
    assert sum(line.startswith(("met: ", "NOT MET: ", "not measured: ")) for line in text) >= 4


def test_without_pytest_the_benchmark_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = check(tmp_path)
    ran: list[str] = []
    monkeypatch.setattr(gpu_check.Part, "start", lambda part: ran.append(part.name))
    monkeypatch.setattr(gpu_check.Part, "wait", lambda part: setattr(part, "status", "ok"))
    monkeypatch.setattr(one, "succeeds", lambda line: line != "import pytest")
    gpu_check._run(one)
    assert ran == ["build", "bench"]
    assert any("no pytest" in note for note in one.notes)


def test_without_a_gpu_it_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = check(tmp_path, provider="cuda", packed=tmp_path / "none")
    monkeypatch.setattr(one, "succeeds", lambda line: "cuda" not in line)
    gpu_check._run(one)
    assert one.parts == []
    assert "no CUDA device" in gpu_check.summary(one)[1]


def test_an_interpreter_is_asked_for_what_it_has(tmp_path: Path) -> None:
    one = check(tmp_path)
    assert one.succeeds("import json")
    assert not one.succeeds("import a_module_that_is_nowhere")
    assert one.part("x", "-c", "", limit_s=1).command[0] == sys.executable
