"""A GitHub Actions matrix: {"include": [...]}, one entry a step, as `strategy.matrix` takes it.

.github/workflows/build.yml reads it. A matrix has no order: the phases are two matrices, of which
the second job `needs` the first.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from jexport.errors import MatrixError
from jexport.jobs.schedulers import Scheduler, Step, Wishes

LARGEST = 256
"""Jobs of one matrix (docs.github.com, "Running variations of jobs in a workflow")."""

HOSTED = ["ubuntu-24.04"]


def write(steps: Sequence[Step], wishes: Wishes) -> str:
    """The entries of a matrix, on one line, since it goes through $GITHUB_OUTPUT.

    In an entry: command: the words as a shell reads them. runs_on: for `runs-on`. carry: whether a
    step of the next phase needs what this one makes; needs: the name of the step that made what
    this one takes.

    Args:
        steps: of one matrix.
        wishes: phases and publishing count.

    Returns:
        JSON.

    Raises:
        MatrixError: too many jobs.
    """
    needed = {step.needs for step in steps}
    entries = [
        {
            "name": step.name,
            "phase": step.phase,
            "task": step.job.task,
            "target": step.job.target,
            "precision": step.job.precision,
            "gpu": step.gpu,
            "runs_on": _runner(step),
            "command": shlex.join(step.words),
            "made": step.artifact,
            "carry": step.name in needed,
            "needs": step.needs,
            "publish": wishes.publish,
            "publish_flags": wishes.publish_flags,
        }
        for step in steps
        if step.phase in wishes.phases
    ]
    if len(entries) > LARGEST:
        raise MatrixError(
            f"{len(entries)} jobs do not fit one matrix",
            evidence=f"GitHub runs at most {LARGEST} of one",
            fix="ask for fewer tasks, targets or precisions at once, or --phase build and compile"
            " apart",
        )
    return json.dumps({"include": entries}, separators=(",", ":")) + "\n"


def _runner(step: Step) -> list[str]:
    """Hosted runners build; a runner of your own has the GPU, and a label that says which."""
    if not step.gpu:
        return HOSTED
    return ["self-hosted", "linux", "gpu", f"gpu-{step.gpu.lower()}"]


SCHEDULER = Scheduler(name="github", summary="a GitHub Actions matrix", write=write)
