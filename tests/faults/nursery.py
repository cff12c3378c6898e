"""A program for tests: builds in forked children of a warm process, on a disk that can fail.

LD_PRELOAD names failing_disk.so. Arguments: the small checkpoint and a folder for the warm build.
One JSON object a line on stdin: {"target", "out", "below", "mode", "nth"}; one answer a line on
stdout: {"code", "error", "seen", "failed", "path"}; code is -9 for a child that was killed.
validate hands back what the warm build gave: it writes one small file and takes most of the time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

MODES = ("count", "kill", "full", "broken", "short", "read-only")


def recorded(checkpoint: Path, folder: Path, targets: tuple[str, ...]) -> dict[str, Any]:
    """Build each target once; what validate and, of onnx, export gave, is kept in `folder`."""
    from jexport.building import pipeline
    from jexport.stages import export as export_stage
    from jexport.stages import validate as validate_stage

    seen: dict[str, Any] = {}
    validate, export = validate_stage.run, export_stage.run

    def keep_report(*words: Any, out_dir: Path, **options: Any) -> Any:
        report = validate(*words, out_dir=out_dir, **options)
        kept = folder / "report"
        shutil.copytree(out_dir, kept)
        seen["validate"] = (report, kept)
        return report

    def keep_graph(*words: Any, out_dir: Path, **options: Any) -> Any:
        made = export(*words, out_dir=out_dir, **options)
        shutil.copytree(out_dir, folder / "graph")
        seen["export"] = dataclasses.replace(made, path=folder / "graph" / made.path.name)
        return made

    export_stage.run = keep_graph
    reports: dict[str, Any] = {}
    for target in targets:
        validate_stage.run = keep_report
        pipeline.build(recipe_of(checkpoint), task="separation", target=target, out=folder / target)
        reports[target] = next(one for name, one in seen.items() if name.startswith("validate"))
        (folder / "report").rename(folder / f"report-{target}")
        reports[target] = (reports[target][0], folder / f"report-{target}")
        seen = {name: one for name, one in seen.items() if not name.startswith("validate")}
    return {"graph": seen.get("export"), "reports": reports}


def recipe_of(checkpoint: Path) -> Any:
    from jexport import recipe

    made = recipe.for_model(str(checkpoint))
    quick = dataclasses.replace(made.validate, budget_tokens=1, max_tokens=64)
    return dataclasses.replace(made, validate=quick)


def without_slow_parts(known: dict[str, Any]) -> None:
    """Stages that take seconds hand back what a real build gave; what they write is written."""
    from jexport.stages import export as export_stage
    from jexport.stages import validate as validate_stage
    from jexport.workspace import run

    def exported(*_: Any, out_dir: Path, **__: Any) -> Any:
        for path in known["graph"].path.parent.iterdir():
            shutil.copyfile(path, out_dir / path.name)
        return dataclasses.replace(known["graph"], path=out_dir / known["graph"].path.name)

    def validated(*_: Any, out_dir: Path, **__: Any) -> Any:
        report, kept = known["reports"][known["target"]]
        for path in kept.iterdir():
            shutil.copyfile(path, out_dir / path.name)
        return report

    export_stage.run, validate_stage.run = exported, validated
    run.give_back_memory = lambda: None


def build(checkpoint: Path, order: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    from jexport.building import pipeline
    from jexport.cache.stages import Cache
    from jexport.errors import JexportError

    known["target"] = order["target"]
    without_slow_parts(known)
    disk = ctypes.CDLL(None)
    disk.fault_seen.restype = disk.fault_failed.restype = ctypes.c_long
    mode = MODES.index(order["mode"])
    disk.fault_arm(order["below"].encode(), mode, ctypes.c_long(order["nth"]))
    answer: dict[str, Any] = {"code": 0, "error": "", "path": ""}
    out = Path(order["out"])
    try:
        made = pipeline.build(
            recipe_of(checkpoint),
            task="separation",
            target=order["target"],
            out=out,
            cache=Cache(root=out / ".cache"),
        )
        answer["path"] = str(made.path)
    except JexportError as error:
        answer.update(code=error.exit_code, error=str(error))
    except BaseException:
        answer.update(code=1, error=traceback.format_exc())
    return answer | {"seen": disk.fault_seen(), "failed": disk.fault_failed()}


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    known = recorded(checkpoint, folder, ("hf", "onnx"))
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, json.dumps(build(checkpoint, order, known)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            text = said.read()
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        print(text.decode() if code == 0 else json.dumps({"code": code}), file=answers)


if __name__ == "__main__":
    main()
