"""Provenance: a manifest -> the in-toto statement of what went into an artifact (SLSA v1).

Everything in it stands in the manifest; no time, host or path does. Knows no key and no signature.
The fields are those of https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from jexport.errors import SignatureError

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:jexport:build:1"
"""What the parameters and dependencies below mean; changes when they do."""

BUILDER = "urn:jexport:builder"


def statement(content: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The statement about an artifact.

    Args:
        content: of its manifest.
        files: SHA-256 by name of all files, manifest included.

    Returns:
        JSON-ready, an in-toto statement.
    """
    return {
        "_type": STATEMENT,
        "subject": [_named(name, digest) for name, digest in sorted(files.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {
                    "task": content["task"],
                    "target": content["target"],
                    "precision": content["precision"],
                    "recipe": _without_places(content["recipe"], content["checkpoint"]["name"]),
                },
                "internalParameters": {"tools": dict(content["tools"])},
                "resolvedDependencies": _dependencies(content),
            },
            "runDetails": {
                "builder": _builder(content),
                "metadata": {"invocationId": f"urn:jexport:inputs:{content['inputs_sha256']}"},
            },
        },
    }


def _named(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _dependencies(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint's files and code, and the texts that judged and calibrated."""
    checkpoint, inputs = content["checkpoint"], content.get("inputs", {})
    dependencies = [
        _named(f"checkpoint/{one['path']}", one["sha256"]) for one in checkpoint["files"]
    ]
    dependencies += [_named(f"code/{one['path']}", one["sha256"]) for one in checkpoint["code"]]
    if checkpoint["revision"]:
        revision = {"gitCommit": checkpoint["revision"]}
        dependencies.append({"name": f"checkpoint {checkpoint['name']}", "digest": revision})
    if checkpoint["code_revision"]:
        dependencies.append({"name": "code", "digest": {"gitCommit": checkpoint["code_revision"]}})
    texts = ("texts", "calibration", "held_out")
    return dependencies + [_named(f"texts/{key}", inputs[key]) for key in texts if key in inputs]


def _builder(content: Mapping[str, Any]) -> dict[str, Any]:
    version = content["tools"].get("jexport")
    code = content.get("inputs", {}).get("jexport")
    return {
        "id": BUILDER,
        **({"version": {"jexport": version}} if version else {}),
        **({"builderDependencies": [_named("jexport", code)]} if code else {}),
    }


def _without_places(recipe: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The recipe as built, without where things lay on the machine that built.

    A model is named as the manifest names it; what else may be a path keeps its last part.
    """
    kept_keys = {
        key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()
    }
    if "load" in kept_keys:
        kept_keys["load"]["model"] = checkpoint
    for table, key in (("quantize", "calibration"), ("compile", "refit_from")):
        if kept_keys.get(table, {}).get(key):
            kept_keys[table][key] = PurePath(re.sub(r"[\\/]+$", "", kept_keys[table][key])).name
    kept_keys.get("compile", {}).pop("timing_cache", None)
    return kept_keys


def check(statement: object, files: Mapping[str, str]) -> None:
    """Refuse a statement that is not SLSA provenance of exactly these files.

    Args:
        statement: JSON, as somebody else may have written it.
        files: SHA-256 by name, manifest included.

    Raises:
        SignatureError: it is about others, or no such statement.
    """
    subjects = statement.get("subject") if isinstance(statement, dict) else None
    if not isinstance(statement, dict) or not isinstance(subjects, list):
        raise _other("it is not an in-toto statement")
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT, PREDICATE):
        raise _other(
            f"it is a {statement.get('predicateType')!r:.60} of {statement.get('_type')!r:.60}"
        )
    problems = []
    for one in subjects:
        digest = one.get("digest") if isinstance(one, dict) else None
        if not isinstance(digest, dict):
            raise _other("a subject has no digest")
        problems.append((str(one.get("name")), str(digest.get("sha256"))))
    strange = sorted({name for name, _ in set(problems) ^ set(files.items())})
    if strange or len(problems) != len(files):
        raise _other(f"about other files: {', '.join(strange)[:200] or 'one of them twice'}")


def _other(evidence: str) -> SignatureError:
    return SignatureError(
        "the provenance is not this artifact's",
        evidence=evidence,
        fix="fetch the .attest folder again, or sign the artifact again",
    )
