"""validate: reference vectors and an artifact's runtime -> ParityReport (and an error).

Or vectors that a former run stored (`against`). Every text's token ids are compared, those that
were embedded have their vectors compared as well, and some of them go through the very Embedder
that users open. Knows no framework and no engine: only runners, texts, ids and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import write_json
from jexport.artifacts.reference import NAME as STORED
from jexport.artifacts.reference import Stored, write
from jexport.errors import ParityError, RecipeError
from jexport.evaluation.candidate import Candidate
from jexport.evaluation.comparison import EMBEDDER, HIDDEN, UNIT_LENGTH, Comparison
from jexport.evaluation.edge_texts import EDGE
from jexport.evaluation.reference_library import USES
from jexport.evaluation.reference_set import ReferenceSet
from jexport.gates import LEAST_EDGE_COSINE, GateFailure
from jexport.gates import failures as gate_failures
from jexport.recipe import ValidateSpec
from jexport.types import ParityReport, TensorSpec
from jexport.workspace.run import give_back_memory

REPORT = "parity.json"
OTHER_LENGTH = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 5e-2}
"""How far a vector's length may be from the checkpoint's, as a share, where it does not normalise;
by precision. int8 has INT8_LENGTH. Where it does, UNIT_LENGTH holds."""

INT8_LENGTH = 0.2
GROUPS = (EDGE, EMBEDDER, *USES)
"""Groups of texts beside the usual ones; they are held to the lowest cosine alone."""

SHOWN = 8
"""Failures that the error itself lists; the report has them all."""


def run(
    reference: Callable[[], ReferenceSet],
    candidate: Candidate,
    *,
    spec: ValidateSpec,
    precision: str,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParityReport:
    """Compare on texts of every language and length, and edge texts; write out_dir/parity.json.

    The report is on the disk before a ParityError is raised.

    Args:
        reference: gives the reference library's vectors; called once.
        candidate: the artifact.
        spec: [validate] of the recipe.
        precision: names the gates.
        out_dir: takes the report, and the reference vectors for a portable artifact.
        progress: called with tokens done and in all.

    Returns:
        The report, where every gate holds.

    Raises:
        ParityError: a gate fails, or nothing could be compared.
        RecipeError: the recipe has no gates for this precision.
    """
    about: dict[str, str] = {}

    def compared() -> Comparison:
        vectors = reference()
        give_back_memory()  # the reference library's weights, before the candidate brings its own
        about.update(vectors.texts)
        usual = vectors.rows(edge=False)
        stored = Stored(
            ids=[vectors.ids[row] for row in usual],
            vectors=vectors.vectors[usual],
            languages=[vectors.samples[row].language for row in usual],
            texts=dict(vectors.texts),
        )
        write(stored, out_dir / STORED)
        return Comparison.of(vectors, candidate)

    content = _report(_gates(spec, precision), precision, about)
    return _judged(compared, candidate.outputs, content, out_dir, progress)


def against(
    stored: Stored,
    candidate: Candidate,
    *,
    spec: ValidateSpec,
    precision: str,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ParityReport:
    """Compare with vectors that a former run stored; write out_dir/parity.json.

    There are neither texts nor token vectors: ids, and gates over tokens, were held where the
    artifact was built.

    Args:
        stored: ids and vectors that `run` wrote.
        candidate: the artifact.
        spec: [validate] of the recipe.
        precision: names the gates.
        out_dir: takes the report.
        progress: called with tokens done and in all.

    Returns:
        The report, where every gate holds.

    Raises:
        ParityError: a gate fails, or nothing could be compared.
        RecipeError: the recipe has no gates for this precision.
    """

    def compared() -> Comparison:
        return Comparison.of_stored(stored, candidate)

    gates = _gates(spec, precision)
    text_gates = {key: bound for key, bound in gates.items() if not key.startswith("token_")}
    content = _report(text_gates, precision, stored.texts)
    return _judged(compared, candidate.outputs, content, out_dir, progress)


def _gates(spec: ValidateSpec, precision: str) -> Mapping[str, float]:
    gates = spec.gates.get(precision)
    if not gates:
        raise RecipeError(
            f"the recipe has no gates for {precision}",
            evidence=f"validate.gates has: {', '.join(spec.gates)}",
            fix=f"add a table [validate.gates.{precision}]",
        )
    return gates


def _report(gates: Mapping[str, float], precision: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """A report of nothing yet. texts: may be filled later."""
    return {
        "passed": False,
        "failures": [],
        "precision": precision,
        "gates": dict(gates),
        "texts": texts,
        "metrics": {},
    }


def _judged(
    compared: Callable[[], Comparison],
    outputs: Sequence[TensorSpec],
    content: dict[str, Any],
    out_dir: Path,
    progress: Callable[[int, int], None],
) -> ParityReport:
    """Measure, write the report, check the gates. content: the report, with gates and precision."""
    gates, precision = content["gates"], content["precision"]
    try:
        comparison = compared()
        differences = comparison.differences()
        metrics, likely = comparison.measure(progress)
        content["metrics"] = metrics
        failed = _failures(metrics, gates, outputs, precision)
        failures = [*differences, *(one.words for one in failed)]
    except ParityError as broken:
        content["failures"] = [broken.what, *broken.evidence.splitlines()]
        write_json(out_dir / REPORT, content)
        raise
    content |= {"passed": not failures, "failures": failures}
    write_json(out_dir / REPORT, content)
    if failures:
        more = [f"and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
        other_model = bool(differences or likely)
        error = ParityError(
            f"validate: the artifact does not give the checkpoint's vectors ({precision})",
            evidence="\n".join([*(f"likely: {one}" for one in likely), *failures[:SHOWN], *more]),
            fix=_way_out(precision, differs=other_model),
        )
        error.missed_gates = () if other_model else tuple(failures)
        raise error
    return ParityReport(passed=True, failures=(), metrics=metrics)


def _way_out(precision: str, *, differs: bool) -> str:
    """What to do: gates are about lost accuracy, never about another text, prompt or module."""
    if differs:
        return (
            "look at the key that is named: the artifact computes something else than "
            "sentence-transformers does with this checkpoint, and no gate allows that; if the "
            "checkpoint is as it should be, report it"
        )
    return (
        "look into the report; if the loss is meant, set other gates in the recipe "
        f"([validate.gates.{precision}])"
    )


def refusals(
    reference: ReferenceSet, candidate: Candidate, *, spec: ValidateSpec, precision: str
) -> tuple[GateFailure, ...]:
    """The gates for which `run` would refuse a candidate: the same texts, vectors and bounds.

    What no candidate of a search can change, as another token id, is left to `run`.

    Args:
        reference: the reference library's vectors.
        candidate: what may become the artifact.
        spec: [validate] of the recipe.
        precision: names the gates.

    Returns:
        Those that fail; a NaN or a missing output counts as one.

    Raises:
        RecipeError: the recipe has no gates for this precision.
    """
    try:
        comparison = Comparison.of(reference, candidate)
    except ParityError:
        return ()
    try:
        metrics, _ = comparison.measure(lambda done, total: None)
        return tuple(_failures(metrics, _gates(spec, precision), candidate.outputs, precision))
    except ParityError as error:  # a NaN, an output that is missing
        return (
            GateFailure(goal=error.what, gap=math.inf, words=f"{error.what}: {error.evidence}"),
        )


def _failures(
    metrics: Mapping[str, Any],
    gates: Mapping[str, float],
    outputs: Sequence[TensorSpec],
    precision: str,
) -> list[GateFailure]:
    """The gates that failed, for each output; those over tokens only for last_hidden_state."""
    all_failures: list[GateFailure] = []
    for spec in outputs:
        first = spec is outputs[0]
        place = metrics if first else metrics[spec.name]
        output_gates = {
            key: bound
            for key, bound in gates.items()
            if spec.name == HIDDEN or not key.startswith("token_")
        }
        failures: list[GateFailure] = []
        if output_gates or len(outputs) == 1:  # no gate at all is an error there
            failures += gate_failures(place, output_gates)
        failures += _other_failures(place, gates, precision)
        all_failures += failures if first else [one.of(spec.name) for one in failures]
    return all_failures


def _other_failures(
    place: Mapping[str, Any], gates: Mapping[str, float], precision: str
) -> Iterator[GateFailure]:
    """Lengths, and the groups that have no gates of their own: edge texts, uses, the Embedder."""
    unit = place["norms"]["unit"]
    bound = UNIT_LENGTH if unit else OTHER_LENGTH.get(precision, INT8_LENGTH)
    least_use = gates.get("cosine_min", LEAST_EDGE_COSINE)
    least_edge = gates.get("edge_cosine_min", least_use)
    groups = [("", place["norms"])]
    groups += [(f"{name}: ", place[name]) for name in GROUPS if name in place]
    for name, group in groups:
        error = group["largest_error"]
        if not error <= bound:
            what = "not L2-normalised" if unit else "not the checkpoint's lengths"
            words = f"{name}lengths are off by {error:.3g}: {what}"
            yield GateFailure(goal=f"{name}lengths", gap=error - bound, words=words)
        lowest = group.get("cosine_min", 1.0)
        least = least_use if name.removesuffix(": ") in USES else least_edge
        if name and not lowest >= least:
            words = f"{name}cosine_min {lowest} is below {least}"
            yield GateFailure(goal=f"{name}cosine_min", gap=least - lowest, words=words)
