"""The steps as JSON, for a scheduler of your own: {"steps": [...]}."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from jexport.jobs.schedulers import Scheduler, Step, Wishes


def write(steps: Sequence[Step], wishes: Wishes) -> str:
    """Every step with its job, its command as a list of words, and the step that it needs.

    Args:
        steps: of one matrix.
        wishes: phases and publishing count.

    Returns:
        JSON.
    """
    listed = [
        {
            "name": step.name,
            "phase": step.phase,
            **dataclasses.asdict(step.job),
            "command": list(step.words),
            "made": step.artifact,
            "needs": step.needs,
            "publish": wishes.publish,
            "publish_flags": wishes.publish_flags,
        }
        for step in steps
        if step.phase in wishes.phases
    ]
    return json.dumps({"steps": listed}, indent=2, ensure_ascii=False) + "\n"


SCHEDULER = Scheduler(name="json", summary="the steps as they are", write=write)
