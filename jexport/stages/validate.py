"""validate: two runners -> ParityReport (and an error when a gate fails).

The reference tokenises and runs as the checkpoint does, the candidate as its users will. Knows no
framework and no engine: only runners, token ids and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jexport import calibration, parity
from jexport.errors import ParityError, RecipeError
from jexport.flow import CalibrationSet, Embedding, ParityReport, Runner, Sample, Signature
from jexport.manifest import write_json
from jexport.recipe import ValidateSpec
from jexport.runtime.pool import finish, pool

REPORT = "parity.json"
BATCH_TOKENS = 1024
ALONE_TEXTS = 48
"""Texts that are also run alone, to see whether a text's vector depends on its batch."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the comparison: its token ids (prompt included) and its forward pass."""

    tokenize: Callable[[list[str]], list[list[int]]]
    open: Callable[[], AbstractContextManager[Runner]]


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
    gates = spec.gates.get(precision)
    if not gates:
        raise RecipeError(
            f"the recipe has no gates for {precision}",
            evidence=f"validate.gates has: {', '.join(spec.gates)}",
            fix=f"add a table [validate.gates.{precision}]",
        )
    limit = min(spec.max_tokens, embedding.max_tokens)
    samples = calibration.within_budget(
        texts, candidate.tokenize, budget_tokens=spec.budget_tokens, max_tokens=limit
    )
    words = [sample.text for sample in samples]
    wanted, ids = reference.tokenize(words), candidate.tokenize(words)
    total = sum(map(len, wanted)) + sum(map(len, ids))
    count = _Counter(total, progress)
    with reference.open() as forward:
        truth = _outputs(forward, wanted, ("last_hidden_state",), pad_id, count)
    names = tuple(spec.name for spec in signature.outputs)
    alone_rows = _spread(ids, ALONE_TEXTS)
    with candidate.open() as forward:
        made = _outputs(forward, ids, names, pad_id, count)
        alone = [_one(forward, ids[row], names[0]) for row in alone_rows]
    metrics = _compare(truth, made, embedding, signature, samples, ids)
    metrics["batch"] = parity.invariance(
        np.stack([_vector(value, embedding) for value in alone]),
        np.stack([_vector(made[names[0]][row], embedding) for row in alone_rows]),
    )
    differing = [n for n, (a, b) in enumerate(zip(wanted, ids, strict=True)) if a != b]
    metrics["token_ids_differ"] = len(differing)
    failures = list(parity.gate(metrics, gates))
    if "sentence_embedding" in metrics:
        pooled = {key: v for key, v in gates.items() if not key.startswith(("batch_", "token_"))}
        failures += [
            f"sentence_embedding, {text}"
            for text in parity.gate(metrics["sentence_embedding"], pooled)
        ]
    report = ParityReport(passed=not failures, failures=tuple(failures), metrics=metrics)
    write_json(
        out_dir / REPORT,
        {
            "passed": report.passed,
            "failures": failures,
            "precision": precision,
            "gates": dict(gates),
            "texts": {"set": texts.name, "sha256": texts.sha256},
            "metrics": metrics,
        },
    )
    if failures:
        hint = f"; token ids differ in {len(differing)} texts" if differing else ""
        raise ParityError(
            f"validate: the artifact does not give the checkpoint's vectors ({precision}{hint})",
            evidence="\n".join([*failures[:8], *([f"and {len(failures) - 8} more"] if len(failures) > 8 else [])]),
            fix="look into the report; if the loss is meant, set other gates in the recipe "
            f"([validate.gates.{precision}])",
        )
    return report


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, tokens: int) -> None:
        self.done += tokens
        self.progress(self.done, self.total)


def _spread(ids: Sequence[Sequence[int]], count: int) -> list[int]:
    """Rows from the shortest to the longest, evenly: the longest would cost most of the time."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    steps = np.linspace(0, len(order) - 1, num=min(count, len(order)))
    return sorted({order[int(step)] for step in steps})


def _outputs(
    forward: Runner,
    ids: Sequence[Sequence[int]],
    names: Sequence[str],
    pad_id: int,
    count: _Counter,
) -> dict[str, list[np.ndarray]]:
    """Per output name, one array a text: token vectors [tokens, hidden] or a vector [dimension].

    Batches mix lengths on purpose (neighbours in length, but padded): that is what servers do.
    """
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    found: dict[str, list[Any]] = {name: [None] * len(ids) for name in names}
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(ids[order[stop]]) * (stop + 1 - start) <= BATCH_TOKENS:
            stop += 1
        rows = order[start:stop]
        answer = forward(_padded([ids[row] for row in rows], pad_id))
        for name in names:
            if name not in answer:
                raise ParityError(
                    f"validate: output '{name}' is missing",
                    evidence=f"the runner gave: {', '.join(answer) or 'nothing'}",
                    fix="build again; if it stays, report this model",
                )
            for place, row in enumerate(rows):
                value = np.asarray(answer[name][place], dtype=np.float32)
                found[name][row] = value[: len(ids[row])].copy() if value.ndim == 2 else value
        count.add(sum(len(ids[row]) for row in rows))
        start = stop
    return found


def _padded(ids: Sequence[Sequence[int]], pad_id: int) -> dict[str, np.ndarray]:
    longest = max(map(len, ids))
    input_ids = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _one(forward: Runner, ids: Sequence[int], name: str) -> np.ndarray:
    return np.asarray(forward(_padded([ids], 0))[name][0], dtype=np.float32)


def _vector(value: np.ndarray, embedding: Embedding) -> np.ndarray:
    """Token vectors [tokens, hidden] pooled; a vector that is pooled already as it is."""
    if value.ndim == 1:
        return value
    mask = np.ones((1, value.shape[0]), dtype=np.int64)
    pooled: np.ndarray = pool(value[None], mask, embedding.pooling)[0]
    return pooled


def _compare(
    truth: dict[str, list[np.ndarray]],
    made: dict[str, list[np.ndarray]],
    embedding: Embedding,
    signature: Signature,
    samples: Sequence[Sample],
    ids: Sequence[Sequence[int]],
) -> dict[str, Any]:
    languages = tuple(sample.language for sample in samples)
    lengths = tuple(len(tokens) for tokens in ids)
    tokens = tuple(truth["last_hidden_state"])
    whole = np.stack([_vector(value, embedding) for value in tokens])
    results: dict[str, dict[str, Any]] = {}
    for name, values in made.items():
        spec = signature.output(name)
        assert spec is not None
        width = spec.shape[-1]
        assert isinstance(width, int)
        sizes = sorted({d for d in embedding.matryoshka if d <= width} | {width})
        same_ids = all(a.shape == b.shape for a, b in zip(tokens, values, strict=True))
        pairs = name == "last_hidden_state" and same_ids
        results[name] = parity.compare(
            parity.Outputs(
                embeddings=finish(whole, dimensions=width, normalize=True),
                tokens=tokens if pairs else (),
            ),
            parity.Outputs(
                embeddings=np.stack([_vector(value, embedding) for value in values]),
                tokens=tuple(values) if pairs else (),
            ),
            parity.Labels(languages=languages, lengths=lengths, dimensions=tuple(sizes)),
        )
    first = next(iter(results))
    metrics = dict(results[first])
    if "sentence_embedding" in results and first != "sentence_embedding":
        metrics["sentence_embedding"] = results["sentence_embedding"]
    return metrics
