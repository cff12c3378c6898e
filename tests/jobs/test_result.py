"""result: how a job that ended is told, whichever executor ran it."""

from __future__ import annotations

import pytest

from jexport.errors import ParityError
from jexport.jobs.matrix import Job
from jexport.jobs.result import JobResult
from jexport.workspace.run import Event

JOB = Job(task="a", target="onnx", precision="fp32")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ParityError("a gate failed", evidence="e", fix="f"), "failed: a gate failed"),
        (ValueError("first\nsecond"), "failed: first"),
        (ValueError(), "failed: ValueError"),
    ],
)
def test_a_failed_job_is_told_as_failed(error: Exception, text: str) -> None:
    events: list[tuple[Job, Event]] = []
    result = JobResult(job=JOB, artifact=None, error=error, seconds=2.5, attempts=2)
    assert result.announce(lambda job, event: events.append((job, event))) is result
    assert events == [(JOB, Event(kind="end", stage="", text=text, seconds=2.5))]
