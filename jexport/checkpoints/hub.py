"""From a hub id to a local folder and the 40-hex commit that it holds.

Fetches safetensors, JSON and tokenizer files only: no pickle, no code (that is asked for apart).
"""

from __future__ import annotations

from pathlib import Path

from jexport.errors import DependencyError, HubError

WEIGHTS_AND_CONFIG = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")
CODE = ("*.py",)
NEVER = ("onnx/*", "openvino/*", "*.bin", "*.pt")


def fetch(model_id: str, revision: str, patterns: tuple[str, ...]) -> tuple[Path, str]:
    """Download (or find in the local cache) a snapshot; returns its folder and commit.

    Raises HubError when the hub cannot be reached and nothing is cached.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise DependencyError(
            "reading from a model hub needs huggingface_hub",
            evidence=str(error),
            fix='pip install "jexport[build]", or give --model FOLDER',
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            model_id,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=list(NEVER),
        )
    except Exception as error:  # httpx, requests and hub errors share no base class
        first_line = next(iter(str(error).splitlines()), "")
        raise HubError(
            f"cannot get '{model_id}' from the model hub",
            evidence=f"{type(error).__name__}: {first_line}",
            fix="check the id and the network, or give a local folder with --model FOLDER",
        ) from error
    return Path(folder), Path(folder).name
