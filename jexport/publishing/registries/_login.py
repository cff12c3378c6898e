"""The user's own login at an OCI registry, as `docker login`, podman and ORAS keep it.

Reads DOCKER_CONFIG or ~/.docker/config.json and podman's auth.json; asks a credential helper when
one is named. Knows no HTTP. What it returns is never printed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HELPER_S = 30
DOCKER_HUB = ("registry-1.docker.io", "docker.io", "index.docker.io", "https://index.docker.io/v1/")


def login(host: str) -> tuple[str, str] | None:
    """The credentials for a registry's host.

    Args:
        host: with its port, if it has one.

    Returns:
        User and password (or token), None when there are none.
    """
    names = DOCKER_HUB if host in DOCKER_HUB else (host, f"https://{host}", f"https://{host}/v1/")
    for config in _configs():
        for name in names:
            program = config.get("credHelpers", {}).get(name)
            stored = config.get("auths", {}).get(name)
            if program is None and stored is not None:
                program = config.get("credsStore")
            credentials = _helper(program, name) if program else None
            credentials = credentials or _kept(stored)
            if credentials:
                return credentials
    return None


def _configs() -> Iterator[Mapping[str, Any]]:
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [docker / "config.json"]
    places += [Path(runtime) / "containers" / "auth.json"] if runtime else []
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            config = json.loads(place.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                yield config


def _kept(entry: Any) -> tuple[str, str] | None:
    try:
        user, colon, password = base64.b64decode(entry["auth"]).decode().partition(":")
    except (TypeError, KeyError, ValueError, binascii.Error):
        return None
    return (user, password) if colon else None


def _helper(program: str, host: str) -> tuple[str, str] | None:
    """Ask docker-credential-<program>; what goes wrong there leaves the user logged out."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", program):
        return None
    try:
        done = subprocess.run(
            [f"docker-credential-{program}", "get"],
            input=host,
            capture_output=True,
            text=True,
            timeout=HELPER_S,
            check=True,
        )
        answer = json.loads(done.stdout)
        return answer["Username"], answer["Secret"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None
