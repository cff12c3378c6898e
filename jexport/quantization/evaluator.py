"""Graphs on trial: written, run on the held-out texts, compared with the float graph.

Knows no treatment's reason and no goal: it measures what it is given and notes it in a journal.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jexport.artifacts.manifest import file_digest, sha256_of
from jexport.evaluation import parity
from jexport.gates import gate
from jexport.quantization.search import METRICS, Measured
from jexport.quantization.treatment import Treatment
from jexport.quantization.trial_log import Journal
from jexport.recipe import CompileSpec
from jexport.runtime.batches import plan_batches
from jexport.runtime.embedder import TEXT_VECTORS, TOKEN_VECTORS
from jexport.runtime.pool import finish, pool
from jexport.targets import Target
from jexport.types import Embedding, OnnxModel, Runner
from jexport.workspace.run import give_back_memory

if TYPE_CHECKING:
    from jexport.quantization.outlier_splitting import Copied

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
BATCH_TOKENS = 1024
TEXT_GATES = frozenset(
    {"cosine_min", "cosine_mean", "cosine_p1", "spearman", "top10_overlap", "language_loss"}
)
"""Gates that held-out texts can be held to; the others need token vectors, or texts run alone."""

Pad = Callable[[Sequence[Sequence[int]]], Mapping[str, NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The texts, tokenised as users will (prompt, truncation).

    calibration, held_out: token ids. languages: of the held-out texts. odd: texts that users send
    and no set has (the empty one); calibrated on, and judged apart. pad: a padded batch. about:
    what quantization.json says of the texts (names, digests, counts).
    """

    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    languages: Sequence[str]
    pad: Pad
    embedding: Embedding
    about: Mapping[str, Any]
    odd: Sequence[Sequence[int]] = ()


def vectors(
    runner: Runner,
    ids: Sequence[Sequence[int]],
    *,
    pad: Pad,
    embedding: Embedding,
    output: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Texts through a runner, pooled and normalised: float32 [texts, dimension].

    output: the graph's output to read, token vectors or text vectors.
    """
    rows_of: list[NDArray[np.float32] | None] = [None] * len(ids)
    done = 0
    for rows in plan_batches([len(one) for one in ids], BATCH_TOKENS):
        feeds = pad([ids[row] for row in rows])
        given = np.asarray(runner(feeds)[output], np.float32)
        if output == TOKEN_VECTORS:
            given = pool(given, feeds["attention_mask"], embedding.pooling)
            given = finish(given, dimensions=None, normalize=True)
        for row, vector in zip(rows, given, strict=True):
            rows_of[row] = vector
        done += len(rows)
        progress(done, len(ids))
    return np.stack([one for one in rows_of if one is not None])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Writes quantized graphs and measures them.

    judge: the target that runs graphs here. gates: by key, held on every group of the held-out
    texts (see gates.GATES). room: for graphs on trial. tables: whether tables become int8. copied:
    activations whose outliers are there several times.
    """

    model: OnnxModel
    material: Material
    judge: Target
    gates: Mapping[str, float]
    room: Path
    journal: Journal
    tables: bool = True
    copied: Sequence[Copied] = ()

    def write(self, treatments: Mapping[str, Treatment], folder: Path, precision: str) -> OnnxModel:
        """The float model with these treatments, written to `folder`."""
        import onnx_ir as ir

        from jexport.graph import storage
        from jexport.quantization import outlier_splitting
        from jexport.quantization.qdq import rewrite

        folder.mkdir(parents=True, exist_ok=True)
        graph = ir.load(self.model.path)
        outlier_splitting.copy(graph, self.copied, {})
        rewrite(graph, treatments, tables=self.tables)
        storage.save(graph, folder / GRAPH)
        digests = {
            name: file_digest(folder / name, root=folder).sha256 for name in (GRAPH, WEIGHTS)
        }
        return replace(
            self.model, path=folder / GRAPH, precision=precision, sha256=sha256_of(digests)
        )

    def truth(self, progress: Callable[[int, int], None]) -> NDArray[np.float32]:
        """The held-out texts, then the odd ones, by the float graph."""
        return self._vectors(self.model, progress)

    def trial(
        self, key: str, treatments: Mapping[str, Treatment], truth: NDArray[np.float32]
    ) -> Measured:
        """How far a graph with these treatments is from `truth`; by its key from the journal."""
        known = self.journal.recall(key)
        if known is not None:
            return Measured(metrics=known["metrics"], failures=tuple(known["failures"]))
        outcome = self.outcome(treatments, truth)
        failures = gate(outcome, self.gates) if self.gates else ()
        found = Measured(
            metrics={name: float(outcome["overall"][name]) for name in METRICS},
            failures=(*failures, *self._odd_failures(outcome)),
        )
        self.journal.keep(key, {"metrics": found.metrics, "failures": list(found.failures)})
        return found

    def outcome(
        self, treatments: Mapping[str, Treatment], truth: NDArray[np.float32]
    ) -> dict[str, Any]:
        """What parity.compare says of the held-out texts, by language, length and dimension."""
        room = self.room / "trial"
        made = self._vectors(self.write(treatments, room, "int8"))
        shutil.rmtree(room, ignore_errors=True)
        width = made.shape[1]
        sizes = {size for size in self.material.embedding.matryoshka if size < width} | {width}
        known = len(self.material.held_out)
        labels = parity.Labels(
            languages=tuple(self.material.languages),
            lengths=tuple(len(one) for one in self.material.held_out),
            dimensions=tuple(sorted(sizes)),
        )
        outcome = parity.compare(
            parity.Outputs(embeddings=truth[:known]),
            parity.Outputs(embeddings=made[:known]),
            labels,
        )
        if self.material.odd:
            outcome["odd"] = parity.invariance(truth[known:], made[known:])
        return outcome

    def _odd_failures(self, outcome: Mapping[str, Any]) -> list[str]:
        """Odd texts are groups of their own: each must reach what a group's mean must."""
        bound = self.gates.get("cosine_mean")
        if bound is None or "odd" not in outcome or outcome["odd"]["cosine_min"] >= bound:
            return []
        return [f"empty text: cosine {outcome['odd']['cosine_min']:.5f} is below {bound}"]

    @contextlib.contextmanager
    def _opened(self, model: OnnxModel) -> Iterator[Runner]:
        """Run a graph as its users will: with the engine's own operators."""
        folder = self.room / "compiled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        compiled = self.judge.build(model, CompileSpec(), folder)
        with self.judge.runner(compiled, "cpu", 0) as runner:
            yield runner
        shutil.rmtree(folder, ignore_errors=True)

    def _vectors(
        self, model: OnnxModel, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        output = TOKEN_VECTORS if model.signature.output(TOKEN_VECTORS) else TEXT_VECTORS
        with self._opened(model) as runner:
            made = vectors(
                runner,
                [*self.material.held_out, *self.material.odd],
                pad=self.material.pad,
                embedding=self.material.embedding,
                output=output,
                progress=progress,
            )
            del runner
        give_back_memory()
        return made
