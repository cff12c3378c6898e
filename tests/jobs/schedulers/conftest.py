"""The published schemas, read from wheels that `make setup` keeps as files (see the Makefile)."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

WHEELS = Path(sys.prefix) / "wheels"
KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict"


def _inside(wheel: str, name: str) -> Any:
    found = sorted(WHEELS.glob(wheel))
    assert found, f"no {wheel} in {WHEELS}; run `make setup`"
    with zipfile.ZipFile(found[-1]) as archive:
        return json.loads(archive.read(name))


@pytest.fixture(scope="session")
def workflow_problems() -> Callable[[Any], list[str]]:
    """What is wrong with a GitHub workflow, by SchemaStore's schema."""
    schema = _inside(
        "check_jsonschema-0.39.0-*.whl",
        "check_jsonschema/builtin_schemas/vendor/github-workflows.json",
    )
    kind = jsonschema.validators.validator_for(schema)
    checker = kind(schema)
    return lambda content: [str(problem.message) for problem in checker.iter_errors(content)]


@pytest.fixture(scope="session")
def job_problems() -> Callable[[Any], list[str]]:
    """What is wrong with a batch/v1 Job, by Kubernetes' schema; unknown keys are."""
    wheel = "kubernetes_validate-1.37.0-*.whl"
    schema = _inside(wheel, f"{KUBERNETES}/job-batch-v1.json")
    definitions = _inside(wheel, f"{KUBERNETES}/_definitions.json")
    known = Registry().with_resource(
        "/api/_definitions.json", Resource(contents=definitions, specification=DRAFT202012)
    )
    checker = jsonschema.Draft202012Validator(schema, registry=known)
    return lambda content: [str(problem.message) for problem in checker.iter_errors(content)]
