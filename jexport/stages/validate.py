"""validate: two runners -> ParityReport (and an error when a gate fails).

Or one runner and the reference's stored vectors (`against`). The reference tokenises and runs as
the checkpoint does, the candidate as its users will. Knows no framework and no engine: only
runners, token ids and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jexport import parity, selection
from jexport.errors import ParityError, RecipeError
from jexport.flow import (
    CalibrationSet,
    Embedding,
    ParityReport,
    Runner,
    Sample,
    Signature,
    TensorSpec,
)
from jexport.gates import gate
from jexport.manifest import write_json
from jexport.recipe import ValidateSpec
from jexport.reference import NAME as STORED
from jexport.reference import Stored, write
from jexport.run import give_back_memory
from jexport.runtime.pool import finish, pool
from jexport.stages import _validate_runs as runs

REPORT = "parity.json"
HIDDEN = "last_hidden_state"
UNIT_LENGTH = 1e-3
"""How far a vector of sentence_embedding may be from length 1, where the checkpoint normalises."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the comparison: its token ids (prompt included) and its forward pass.

    at_once: from how many threads its runner may be called.
    """

    tokenize: Callable[[list[str]], list[list[int]]]
    open: Callable[[], AbstractContextManager[Runner]]
    at_once: int = 1


def run(
    reference: Side,
    candidate: Side,
    *,
    embedding: Embedding,
    signature: Signature,
    pad_id: int,
    texts: CalibrationSet,
    spec: ValidateSpec,
    precision: str,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParityReport:
    """Compare on texts of every language and length; write out_dir/parity.json; then judge.

    Raises ParityError when a gate fails or nothing could be compared, RecipeError when the recipe
    has no gates for this precision. The report is on the disk before anything is raised.
    """
    about = {"set": texts.name, "sha256": texts.sha256}

    def measured() -> tuple[dict[str, Any], list[str]]:
        chosen = _choose(reference, candidate, texts, spec, embedding.max_tokens)
        job = _Job(embedding=embedding, outputs=signature.outputs, pad_id=pad_id)
        count = runs.Counter(sum(map(len, [*chosen.reference, *chosen.candidate])), progress)
        truth = _truth(reference, chosen, job, count)
        stored = Stored(
            ids=chosen.reference,
            vectors=_vectors(truth, embedding),
            languages=[sample.language for sample in chosen.samples],
            texts=about,
        )
        write(stored, out_dir / STORED)
        metrics = _measure(truth, stored.vectors, candidate, chosen, job, count)
        return metrics, [*chosen.failures(), *_length_failures(metrics, job)]

    gates = _gates(spec, precision)
    return _judged(measured, gates, signature, precision, about, out_dir)


def against(
    stored: Stored,
    candidate: Side,
    *,
    embedding: Embedding,
    signature: Signature,
    pad_id: int,
    spec: ValidateSpec,
    precision: str,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParityReport:
    """Compare with vectors that a former run stored; the rest as `run`.

    There are no token vectors to compare: gates over tokens were held where the artifact was built.
    """

    def measured() -> tuple[dict[str, Any], list[str]]:
        samples = tuple(Sample(text="", language=language) for language in stored.languages)
        ids = [list(one) for one in stored.ids]
        chosen = _Texts(samples=samples, reference=ids, candidate=ids)
        job = _Job(embedding=embedding, outputs=signature.outputs, pad_id=pad_id)
        count = runs.Counter(sum(map(len, ids)), progress)
        metrics = _measure([], stored.vectors, candidate, chosen, job, count)
        return metrics, _length_failures(metrics, job)

    gates = _gates(spec, precision)
    kept = {key: bound for key, bound in gates.items() if not key.startswith("token_")}
    return _judged(measured, kept, signature, precision, stored.texts, out_dir)


def _gates(spec: ValidateSpec, precision: str) -> Mapping[str, float]:
    gates = spec.gates.get(precision)
    if not gates:
        raise RecipeError(
            f"the recipe has no gates for {precision}",
            evidence=f"validate.gates has: {', '.join(spec.gates)}",
            fix=f"add a table [validate.gates.{precision}]",
        )
    return gates


def _judged(
    measured: Callable[[], tuple[dict[str, Any], list[str]]],
    gates: Mapping[str, float],
    signature: Signature,
    precision: str,
    texts: Mapping[str, str],
    out_dir: Path,
) -> ParityReport:
    """Measure (metrics, and failures that no gate names), write the report, then judge."""
    content: dict[str, Any] = {
        "passed": False,
        "failures": [],
        "precision": precision,
        "gates": dict(gates),
        "texts": dict(texts),
        "metrics": {},
    }
    try:
        metrics, failures = measured()
        content["metrics"] = metrics
        failures += _failures(metrics, gates, signature.outputs)
    except ParityError as error:
        content["failures"] = [error.what, *error.evidence.splitlines()]
        write_json(out_dir / REPORT, content)
        raise
    content |= {"passed": not failures, "failures": failures}
    write_json(out_dir / REPORT, content)
    if failures:
        more = [f"and {len(failures) - 8} more"] if len(failures) > 8 else []
        raise ParityError(
            f"validate: the artifact does not give the checkpoint's vectors ({precision})",
            evidence="\n".join([*failures[:8], *more]),
            fix="look into the report; if the loss is meant, set other gates in the recipe "
            f"([validate.gates.{precision}])",
        )
    return ParityReport(passed=True, failures=(), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The texts of a comparison with their token ids on both sides."""

    samples: tuple[Sample, ...]
    reference: list[list[int]]
    candidate: list[list[int]]

    def differing(self) -> list[int]:
        """The texts whose ids are not the same."""
        pairs = zip(self.reference, self.candidate, strict=True)
        return [row for row, (ours, theirs) in enumerate(pairs) if ours != theirs]

    def failures(self) -> list[str]:
        """What to say of them: other tokens are another model, whatever their vectors are."""
        rows = self.differing()
        if not rows:
            return []
        ours, theirs = self.reference[rows[0]], self.candidate[rows[0]]
        pairs = zip(ours, theirs, strict=False)
        place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        return [
            f"token ids differ in {len(rows)} of {len(self.samples)} texts; first in text "
            f"{rows[0]} (language '{self.samples[rows[0]].language}') at token {place}: the "
            f"checkpoint has {ours[place : place + 3]} of {len(ours)}, the artifact "
            f"{theirs[place : place + 3]} of {len(theirs)}"
        ]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the candidate gives and how that becomes a vector."""

    embedding: Embedding
    outputs: tuple[TensorSpec, ...]
    pad_id: int


def _choose(
    reference: Side, candidate: Side, texts: CalibrationSet, spec: ValidateSpec, max_tokens: int
) -> _Texts:
    """Pick texts and tokenise them on both sides. Raises ParityError when there is none.

    The reference says how long a text is: a candidate that cuts too early would hide it.
    """
    limit = min(spec.max_tokens, max_tokens)
    samples = selection.within_budget(
        texts, reference.tokenize, budget_tokens=spec.budget_tokens, max_tokens=limit
    )
    if not samples:
        raise ParityError(
            "validate: there is no text to compare",
            evidence=f"set '{texts.name}' has {len(texts.samples)} texts; the limit is {limit} "
            "tokens, prompt included",
            fix="give validate.texts a set with texts, or raise validate.max_tokens",
        )
    words = [sample.text for sample in samples]
    return _Texts(
        samples=samples, reference=reference.tokenize(words), candidate=candidate.tokenize(words)
    )


def _truth(reference: Side, texts: _Texts, job: _Job, count: runs.Counter) -> list[np.ndarray]:
    """The reference's token vectors of each text."""
    width = job.embedding.dimension
    hidden = TensorSpec(name=HIDDEN, dtype="float32", shape=("batch", "sequence", width))
    with reference.open() as forward:
        truth = runs.outputs(
            forward, texts.reference, (hidden,), job.pad_id, count, reference.at_once
        )[HIDDEN]
    del forward
    give_back_memory()  # the reference's weights, before the candidate brings its own
    return truth


def _measure(
    truth: Sequence[np.ndarray],
    whole: np.ndarray,
    candidate: Side,
    texts: _Texts,
    job: _Job,
    count: runs.Counter,
) -> dict[str, Any]:
    """Run the candidate and compare each of its outputs.

    truth: the reference's token vectors, empty when they are not there. whole: pooled.
    """
    with candidate.open() as forward:
        made = runs.outputs(
            forward, texts.candidate, job.outputs, job.pad_id, count, candidate.at_once
        )
        alone, batched = runs.alone_and_batched(
            forward, texts.candidate, job.outputs, job.pad_id, made
        )
    results: dict[str, dict[str, Any]] = {}
    for name in made:
        vectors, wanted = _vectors(made[name], job.embedding), whole
        if name != HIDDEN:
            normalize = job.embedding.normalize
            wanted = finish(whole, dimensions=vectors.shape[1], normalize=normalize)
        pairs = bool(truth) and name == HIDDEN and not texts.differing()
        results[name] = parity.compare(
            parity.Outputs(embeddings=wanted, tokens=tuple(truth) if pairs else ()),
            parity.Outputs(embeddings=vectors, tokens=tuple(made[name]) if pairs else ()),
            _labels(texts, job.embedding, vectors.shape[1]),
        )
        results[name]["norms"] = parity.norms(wanted, vectors)
        results[name]["batch"] = parity.invariance(
            _vectors(alone[name], job.embedding), _vectors(batched[name], job.embedding)
        )
    metrics = results.pop(job.outputs[0].name)
    metrics["token_ids_differ"] = len(texts.differing())
    return metrics | results


def _labels(texts: _Texts, embedding: Embedding, width: int) -> parity.Labels:
    sizes = {size for size in embedding.matryoshka if size < width} | {width}
    return parity.Labels(
        languages=tuple(sample.language for sample in texts.samples),
        lengths=tuple(map(len, texts.candidate)),
        dimensions=tuple(sorted(sizes)),
    )


def _failures(
    metrics: Mapping[str, Any], gates: Mapping[str, float], outputs: Sequence[TensorSpec]
) -> list[str]:
    """The gates that failed, for each output; those over tokens only for last_hidden_state."""
    found: list[str] = []
    for spec in outputs:
        first = spec is outputs[0]
        place = metrics if first else metrics[spec.name]
        kept = {
            key: bound
            for key, bound in gates.items()
            if spec.name == HIDDEN or not key.startswith("token_")
        }
        if kept or len(outputs) == 1:  # no gate at all is an error there
            failures = gate(place, kept)
            found += failures if first else [f"{spec.name}, {text}" for text in failures]
    return found


def _length_failures(metrics: Mapping[str, Any], job: _Job) -> list[str]:
    """Pooled outputs that are not of length 1, where the checkpoint's own vectors are."""
    found = []
    for number, spec in enumerate(job.outputs):
        place = metrics[spec.name] if number else metrics
        error = place["norms"]["largest_error"]
        if job.embedding.normalize and spec.name != HIDDEN and not error <= UNIT_LENGTH:
            found.append(f"{spec.name}: lengths are off from 1 by {error:.3g}: not L2-normalised")
    return found


def _vectors(values: Sequence[np.ndarray], embedding: Embedding) -> np.ndarray:
    """One row a text: token vectors [tokens, hidden] pooled, vectors of a text as they are."""
    return np.stack([_vector(value, embedding) for value in values])


def _vector(value: np.ndarray, embedding: Embedding) -> np.ndarray:
    """Token vectors [tokens, hidden] pooled; a vector that is pooled already as it is."""
    if value.ndim == 1:
        return value
    mask = np.ones((1, value.shape[0]), dtype=np.int64)
    pooled: np.ndarray = pool(value[None], mask, embedding.pooling)[0]
    return pooled
