"""The checkpoint's own vectors of the validation texts, kept in a file for another machine.

A portable artifact carries them, so that the machine that completes it needs neither the checkpoint
nor torch. One safetensors file: numbers only, no code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import ArtifactError

NAME = "reference.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The reference vectors of a set of texts, with the token ids that were embedded.

    Args:
        ids: token ids of each text, prompt included.
        vectors: float32 [texts, dimension], pooled and not normalised.
        languages: one a text.
        texts: name and digest of the set they are of.
    """

    ids: Sequence[Sequence[int]]
    vectors: NDArray[np.float32]
    languages: Sequence[str]
    texts: dict[str, str]


def write(stored: Stored, path: Path) -> None:
    """Write the file. The same values give the same bytes.

    Args:
        stored: what is written.
        path: of the file; one that is there is replaced.
    """
    from safetensors.numpy import save_file

    lengths = [len(one) for one in stored.ids]
    save_file(
        {
            "vectors": np.ascontiguousarray(stored.vectors, dtype=np.float32),
            "ids": np.array([i for one in stored.ids for i in one], dtype=np.int64),
            "lengths": np.array(lengths, dtype=np.int64),
        },
        str(path),
        metadata={
            "about": json.dumps(
                {"languages": list(stored.languages), "texts": stored.texts}, sort_keys=True
            )
        },
    )


def read(path: Path) -> Stored:
    """Read back what `write` wrote.

    Args:
        path: of the file.

    Returns:
        The vectors, with their texts' ids and languages.

    Raises:
        ArtifactError: it is not such a file, or not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as stream:
            vectors, ids, lengths = (
                stream.get_tensor(name) for name in ("vectors", "ids", "lengths")
            )
            about: Any = json.loads((stream.metadata() or {})["about"])
        fits = (
            lengths.ndim == 1
            and (lengths > 0).all()
            and ids.shape == (int(lengths.sum()),)
            and vectors.ndim == 2
            and len(vectors) == len(lengths) == len(about["languages"])
            and isinstance(about["texts"], dict)
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(path, repr(error)) from error
    if not fits:
        raise _unusable(path, "its parts are not of one number of texts")
    ends = np.cumsum(lengths)[:-1]
    return Stored(
        ids=[part.tolist() for part in np.split(ids, ends)],
        vectors=vectors,
        languages=[str(one) for one in about["languages"]],
        texts=about["texts"],
    )


def _unusable(path: Path, evidence: str) -> ArtifactError:
    return ArtifactError(
        f"the stored reference vectors cannot be used: {path.name}",
        evidence=evidence,
        fix="fetch the artifact again, or build it again",
    )
