"""Kubernetes: one batch/v1 Job a step, as a stream of YAML documents for `kubectl apply -f -`.

Jobs know no order, so those that need another's artifact are suspended: they hold no GPU while it
is built. Artifacts stay on a volume claim that all Jobs share. Credentials are named, never shown.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jexport import errors
from jexport.artifacts import manifest
from jexport.errors import JexportError, MatrixError
from jexport.jobs.schedulers import Scheduler, Step, Wishes, _gpus, _yaml

WORK = "/work"
"""Where the claim is mounted: the working folder of every step."""

DOCKER = "/registry"
LONGEST_NAME = 63
"""Of a Job: its pods carry the name as a label."""

KEPT_S = 7 * 24 * 3600
"""How long a finished Job can be looked at."""

IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]*")
RETRIES = 2


def write(steps: Sequence[Step], wishes: Wishes) -> str:
    """The Jobs of these steps, each after the one it needs.

    Args:
        steps: of one matrix.
        wishes: all count; an image is needed.

    Returns:
        YAML.

    Raises:
        MatrixError: no image, a name that Kubernetes does not take, or a kind of GPU without a
            value of the label.
    """
    if not IMAGE.fullmatch(wishes.image):
        raise MatrixError(
            "Kubernetes needs a container image",
            evidence=f"--image is {wishes.image!r:.80}",
            fix="give --image HOST/NAME@sha256:DIGEST of an image that has jexport[build]",
        )
    for name in (wishes.claim, wishes.secret):
        if name and name != _dns(name):
            raise MatrixError(
                f"'{name:.80}' cannot be a name in Kubernetes",
                evidence="DNS-1123: small letters, digits and '-', at most 63",
                fix="give the name of a claim or a secret that there is",
            )
    return _yaml.stream(_job(step, wishes) for step in steps if step.phase in wishes.phases)


def _job(step: Step, wishes: Wishes) -> dict[str, Any]:
    labels = {
        "app.kubernetes.io/name": "jexport",
        "jexport/phase": step.phase,
        "jexport/target": _label(step.job.target),
        "jexport/task": _label(step.job.task),
        "jexport/precision": _label(step.job.precision),
    }
    spec = {
        "suspend": bool(step.needs),
        "backoffLimit": RETRIES,
        "ttlSecondsAfterFinished": KEPT_S,
        "podFailurePolicy": {"rules": _rules()},
        "template": {"metadata": {"labels": labels}, "spec": _pod(step, wishes)},
    }
    # A Job cannot be changed once it is there: another spec is another name.
    digest = manifest.sha256_of(spec)[:8]
    name = _dns(f"jexport-{step.name}")[: LONGEST_NAME - len(digest) - 1].rstrip("-")
    notes = {"jexport/step": step.name, **({"jexport/needs": step.needs} if step.needs else {})}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name}-{digest}", "labels": labels, "annotations": notes},
        "spec": spec,
    }


def _pod(step: Step, wishes: Wishes) -> dict[str, Any]:
    memory = f"{wishes.memory_gib}Gi"
    limits = {"memory": memory, **({"nvidia.com/gpu": 1} if step.gpu else {})}
    mounts = [{"name": "work", "mountPath": WORK}]
    volumes: list[dict[str, Any]] = [
        {"name": "work", "persistentVolumeClaim": {"claimName": wishes.claim}}
    ]
    variables = [{"name": "HF_HOME", "value": f"{WORK}/.huggingface"}]
    container: dict[str, Any] = {
        "name": "jexport",
        "image": wishes.image,
        "command": ["/bin/sh", "-ec", _script(step, wishes)],
        "workingDir": WORK,
        "resources": {"requests": {"cpu": 2, "memory": memory}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if wishes.secret and wishes.publish.startswith("oci://"):
        key = {"key": ".dockerconfigjson", "path": "config.json"}
        volumes.append(
            {"name": "registry", "secret": {"secretName": wishes.secret, "items": [key]}}
        )
        mounts.append({"name": "registry", "mountPath": DOCKER, "readOnly": True})  # type: ignore[dict-item]
        variables.append({"name": "DOCKER_CONFIG", "value": DOCKER})
    elif wishes.secret:
        container["envFrom"] = [{"secretRef": {"name": wishes.secret}}]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        **(_placed(step.gpu, wishes.gpu_label) if step.gpu else {}),
        "containers": [{**container, "env": variables, "volumeMounts": mounts}],
        "volumes": volumes,
    }


def _placed(kind: str, label: str) -> Mapping[str, Any]:
    """Onto a node with this kind of GPU; such nodes are often tainted against all others."""
    tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    return {"nodeSelector": {label: _gpus.value(kind, label)}, "tolerations": [tolerated]}


def _script(step: Step, wishes: Wishes) -> str:
    command = shlex.join(step.words)
    if not wishes.publish:
        return command
    # An assignment's exit code is its command's: the Job ends with jexport's own.
    publish = f'jexport publish "$made" {shlex.quote(wishes.publish)} {wishes.publish_flags}'
    return f"made=$({command})\n{publish.rstrip()}"


def _rules() -> list[dict[str, Any]]:
    """A lost node costs no attempt; what jexport refuses is not tried again."""
    lost = {"type": "DisruptionTarget", "status": "True"}
    codes = [1, 2, *sorted(kind.exit_code for kind in _refusals())]
    return [
        {"action": "Ignore", "onPodConditions": [lost]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "jexport", "operator": "In", "values": codes},
        },
    ]


def _refusals() -> list[type[JexportError]]:
    passing = (errors.HubError, errors.DiskFullError)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, JexportError) and kind not in passing]


def _dns(text: str) -> str:
    """DNS-1123: what may name an object."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:LONGEST_NAME].strip("-")


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:LONGEST_NAME].strip("-_.")


SCHEDULER = Scheduler(name="kubernetes", summary="Kubernetes Jobs, as YAML", write=write)
