"""Every deliberate error, its exit code and its way out.

An error's text has three parts: what happened, the evidence, the way out. Only `cli/` prints it and
exits with its code; anything that is not a JexportError is a bug and keeps its traceback.
Codes 0 (success), 1 (bug) and 2 (wrong flags, from click) are not used here; 130 is Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from jexport.redact import hidden


class JexportError(Exception):
    """What happened, what shows it, and what to do about it."""

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, evidence: str, fix: str) -> None:
        self.what, self.evidence, self.fix = hidden(what), hidden(evidence), hidden(fix)
        super().__init__(self.what)

    def add_note(self, note: str) -> None:
        """One more line below; secrets are taken out of it as out of the rest.

        Args:
            note: the line.
        """
        super().add_note(hidden(note))

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {line}" for line in self.evidence.splitlines()]
        lines.append(f"  fix: {self.fix}")
        lines += getattr(self, "__notes__", [])
        return "\n".join(lines)


class UnknownTaskError(JexportError):
    """A task that the checkpoint does not have, or that an artifact is not of."""

    exit_code = 3


class UnknownTargetError(JexportError):
    """A target that no file in `targets/` makes."""

    exit_code = 4


class RecipeError(JexportError):
    """A recipe that cannot be read: unknown key, wrong type, value out of range."""

    exit_code = 5


class ParityError(JexportError):
    """The candidate is not the reference: a gate failed, or there was nothing to compare."""

    exit_code = 6

    missed_gates: tuple[str, ...] = ()
    """Where nothing but lost accuracy is wrong, which another int8 candidate may not have lost."""


class CheckpointError(JexportError):
    """A checkpoint file is missing, truncated or not safetensors."""

    exit_code = 7


class AdapterError(JexportError):
    """An adapter that does not fit its base: another rank, a matrix missing or of another shape."""

    exit_code = 8


class TokenizerError(JexportError):
    """A tokenizer that is missing or does not fit the embedding table."""

    exit_code = 9


class NotFiniteError(JexportError):
    """A NaN or an infinity in the weights."""

    exit_code = 10


class TextInputError(JexportError):
    """An input text that cannot be read: not UTF-8, not JSON, not a text."""

    exit_code = 11


class DiskFullError(JexportError):
    """No space left (or a quota reached) while writing."""

    exit_code = 12


class ArtifactError(JexportError):
    """An artifact with a changed, missing or extra file, or none at all."""

    exit_code = 13


class StateDictError(JexportError):
    """A state dict with a missing, unexpected or mismatched entry."""

    exit_code = 14


class DependencyError(JexportError):
    """A library that this step needs is not installed."""

    exit_code = 15


class UnsupportedGraphError(JexportError):
    """A graph that a target cannot take."""

    exit_code = 16


class PrecisionError(JexportError):
    """A precision that a target does not have, or a model that is quantized already."""

    exit_code = 17


class HubError(JexportError):
    """A model hub that cannot be reached, or an id or revision it does not have."""

    exit_code = 18


class RemoteCodeError(JexportError):
    """Remote code that was not allowed, is not pinned, or could not be repaired."""

    exit_code = 19


class OverflowRangeError(JexportError):
    """A weight or activation that does not fit float16."""

    exit_code = 20


class TextTooLongError(JexportError):
    """A text over the artifact's length limit where truncation was refused."""

    exit_code = 21


class UnsupportedCheckpointError(JexportError):
    """A checkpoint layout or an option of it that no file in `checkpoints/` reads."""

    exit_code = 22


class DimensionError(JexportError):
    """An embedding dimension the artifact does not offer."""

    exit_code = 23


class CalibrationError(JexportError):
    """A text set that is missing, empty or broken."""

    exit_code = 24


class QuantizationError(JexportError):
    """INT8 that cannot reach its goals, or not with the memory there is."""

    exit_code = 25


class OutputPathError(JexportError):
    """A place that cannot be written to."""

    exit_code = 26


class ProfileError(JexportError):
    """Optimization profiles that contradict themselves, or a batch that none of them takes."""

    exit_code = 27


class DeviceError(JexportError):
    """No GPU, a GPU or driver that does not fit, or too little of its memory."""

    exit_code = 28


class EngineError(JexportError):
    """An engine that could not be built, refitted or run."""

    exit_code = 29


class LayoutError(JexportError):
    """An artifact that a server's layout cannot take, or a layout that no file makes."""

    exit_code = 30


class PairError(JexportError):
    """Two artifacts whose vectors cannot be compared, or one that needs another beside it."""

    exit_code = 31


class ServingError(JexportError):
    """An engine that is not known, or that cannot load this artifact in this version."""

    exit_code = 32


class RegistryError(JexportError):
    """A registry that cannot be reached or written, a ref that it lacks, content that differs."""

    exit_code = 33


class MatrixError(JexportError):
    """A matrix that the system it is for cannot run: its size, a kind of GPU, a destination."""

    exit_code = 35


class ClusterError(JexportError):
    """A cluster that cannot be reached, has no machine for a job, or lost it too often."""

    exit_code = 36


class SignatureError(JexportError):
    """An artifact that is not signed, or not by whom it must be; a key that cannot be used."""

    exit_code = 34


class CacheError(JexportError):
    """Entries of the stage cache that are damaged or cannot be removed."""

    exit_code = 37


class MemoryNeedError(JexportError):
    """A build that needs more memory than there is."""

    exit_code = 38


class PromptError(JexportError):
    """A prompt that the artifact does not have."""

    exit_code = 41


class DiskError(JexportError):
    """A disk that cannot be written or read: an I/O error, or it is mounted read-only."""

    exit_code = 39


class DeviceMemoryError(JexportError):
    """The device's memory is full: one batch needs more than there is."""

    exit_code = 40


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known.

    Args:
        name: as it was given.
        known: names that there are.

    Returns:
        Such as `did you mean 'retrieval.query'?`, or the whole list when nothing is near.
    """
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + (", ".join(choices) if choices else "none")
