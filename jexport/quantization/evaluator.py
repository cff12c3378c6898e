"""Quantized graphs: written, run on the held-out texts, compared with the float graph.

Knows no reason for a layer's precision and no goal: it measures what it is given and keeps that in
a trial log.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jexport.artifacts.manifest import file_digest, sha256_of
from jexport.evaluation import parity
from jexport.gates import LEAST_EDGE_COSINE, GateFailure, failures
from jexport.quantization.layer_quantization import LayerQuantization
from jexport.quantization.search import METRICS, NAMED, Measurement
from jexport.quantization.trial_log import TrialLog
from jexport.recipe import CompileSpec
from jexport.runtime.embedder import TEXT_VECTORS, TOKEN_VECTORS
from jexport.runtime.inference import Pad, in_text_order, plan_by_tokens, run_padded
from jexport.runtime.pool import finish, pool, without_prompt
from jexport.targets import Target
from jexport.types import Embedding, OnnxModel, Runner
from jexport.workspace.run import give_back_memory

if TYPE_CHECKING:
    from jexport.quantization.channel_shifting import ChannelShift
    from jexport.quantization.outlier_splitting import ChannelSplit

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
TEXT_GATES = frozenset(
    {
        "cosine_min",
        "cosine_mean",
        "cosine_p1",
        "group_loss",
        "spearman",
        "top10_overlap",
        "language_loss",
    }
)
"""Gates that held-out texts can be held to; the others need token vectors, or texts run alone."""

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class PoolingSpec:
    """What becomes of token vectors, as in the Embedder.

    Args:
        embedding: the pooling, and the size that vectors are cut to.
        skip_tokens: first tokens of each text that are not pooled (a prompt's, see
            runtime.pool.without_prompt).
    """

    embedding: Embedding
    skip_tokens: int = 0

    def vectors(self, values: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """One vector a text, of length 1.

        Args:
            values: float32 [batch, sequence, dimension], or [batch, dimension] pooled already.
            mask: int64 [batch, sequence] of 0 and 1.

        Returns:
            float32 [batch, dimension], or [batch, truncate_dim] where the embedding has one.
        """
        if values.ndim == 3:
            mask = without_prompt(mask, self.skip_tokens)
            values = pool(values, mask, self.embedding.pooling, skipped=self.skip_tokens)
        return finish(values, dimensions=self.embedding.truncate_dim or None, normalize=True)


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The texts of an int8 build, tokenised as users' texts will be (prompt, truncation).

    Args:
        calibration: token ids of each text that statistics are collected on.
        held_out: token ids of each text that graphs are compared on.
        languages: of the held-out texts.
        pad: makes a padded batch.
        pooling: what becomes of token vectors.
        metadata: what quantization.json says of the texts (names, digests, counts).
        edge_cases: token ids of texts that users send and no set has (the empty one); calibrated
            on, and compared apart.
        texts: the held-out texts themselves, for messages; () where they are not known.
        kinds: of the held-out texts, '' for usual ones; () where none is of a kind.
    """

    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    languages: Sequence[str]
    pad: Pad
    pooling: PoolingSpec
    metadata: Mapping[str, Any]
    edge_cases: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    kinds: Sequence[str] = ()


def embed(
    runner: Runner,
    ids: Sequence[Sequence[int]],
    *,
    pad: Pad,
    pooling: PoolingSpec,
    output: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.float32]:
    """Texts through a runner: pooled, cut and normalised, in the direction that users get.

    Args:
        runner: runs the graph.
        ids: token ids of each text.
        pad: makes a padded batch.
        pooling: what becomes of token vectors.
        output: the graph's output to read, token vectors or text vectors.
        progress: told texts done and in all.

    Returns:
        float32 [texts, dimension], as PoolingSpec.vectors.
    """
    done = 0

    def count(rows: Sequence[int]) -> None:
        nonlocal done
        done += len(rows)
        progress(done, len(ids))

    batches = run_padded(runner, plan_by_tokens(ids), pad=pad)
    pooled = (
        (batch, pooling.vectors(np.asarray(outputs[output], np.float32), mask))
        for batch, mask, outputs in batches
    )
    return np.stack(in_text_order(pooled, len(ids), count))


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Writes quantized graphs and measures them against the float graph.

    Args:
        model: the float graph.
        data: its texts.
        runtime: the target that runs graphs here, the reference runtime.
        gates: by key, held on every group of the held-out texts (see gates.GATES).
        work_dir: for the graphs of trials.
        trial_log: what was measured before.
        tables: whether embedding tables become int8.
        splits: activations with split outlier channels.
        shifts: activations with shifted channels.
    """

    model: OnnxModel
    data: CalibrationData
    runtime: Target
    gates: Mapping[str, float]
    work_dir: Path
    trial_log: TrialLog
    tables: bool = True
    splits: Sequence[ChannelSplit] = ()
    shifts: Sequence[ChannelShift] = ()

    def write(
        self, quantizations: Mapping[str, LayerQuantization], folder: Path, precision: str
    ) -> OnnxModel:
        """The float model with its layers quantized, in a file of its own.

        Args:
            quantizations: by layer's name.
            folder: for the graph and its weights; created where it is not there.
            precision: that the written model states.

        Returns:
            The quantized model, with the digest of its files.
        """
        import onnx_ir as ir

        from jexport.graph import storage
        from jexport.quantization.channel_shifting import shift_channels
        from jexport.quantization.outlier_splitting import split_channels
        from jexport.quantization.qdq import insert_qdq

        folder.mkdir(parents=True, exist_ok=True)
        graph = ir.load(self.model.path)
        shift_channels(graph, self.shifts, {})
        split_channels(graph, self.splits, {})
        insert_qdq(graph, quantizations, tables=self.tables)
        storage.save(graph, folder / GRAPH)
        digests = {
            name: file_digest(folder / name, root=folder).sha256 for name in (GRAPH, WEIGHTS)
        }
        return replace(
            self.model, path=folder / GRAPH, precision=precision, sha256=sha256_of(digests)
        )

    def reference_vectors(self, progress: Callable[[int, int], None]) -> NDArray[np.float32]:
        """The held-out texts, then the edge cases, by the float graph.

        Args:
            progress: called with the texts that are done and those in all.

        Returns:
            float32 [texts, dimension].
        """
        return self._embed(self.model, progress)

    def measure(
        self,
        key: str,
        quantizations: Mapping[str, LayerQuantization],
        reference: NDArray[np.float32],
    ) -> Measurement:
        """How far a quantized graph is from the float one, or what the trial log says of it.

        Args:
            key: the trial's, in the log.
            quantizations: by layer's name.
            reference: from reference_vectors.

        Returns:
            Metrics over all held-out texts and the gates that groups of them failed.
        """
        logged = _logged(self.trial_log.get(key))
        if logged is not None:
            return logged
        vectors = self.vectors(quantizations)
        comparison = self._compare(vectors, reference)
        failed = failures(comparison, self.gates) if self.gates else ()
        failed = (*failed, *self._edge_case_failures(comparison))
        measurement = Measurement(
            metrics={name: float(comparison["overall"][name]) for name in METRICS},
            failures=failed,
            lowest=self._lowest(vectors, reference, failed),
        )
        self.trial_log.append(key, asdict(measurement))
        return measurement

    def compare(
        self, quantizations: Mapping[str, LayerQuantization], reference: NDArray[np.float32]
    ) -> dict[str, Any]:
        """How far a quantized graph is from the float one, whatever the trial log says.

        Args:
            quantizations: by layer's name.
            reference: from reference_vectors.

        Returns:
            What parity.compare says of the held-out texts, by language, length and dimension;
            "odd" is parity.invariance of the edge cases.
        """
        return self._compare(self.vectors(quantizations), reference)

    def vectors(self, quantizations: Mapping[str, LayerQuantization]) -> NDArray[np.float32]:
        """The held-out texts, then the edge cases, by a quantized graph.

        Args:
            quantizations: by layer's name.

        Returns:
            float32 [texts, dimension].
        """
        folder = self.work_dir / "trial"
        vectors = self._embed(self.write(quantizations, folder, "int8"))
        shutil.rmtree(folder, ignore_errors=True)
        return vectors

    def _compare(
        self, vectors: NDArray[np.float32], reference: NDArray[np.float32]
    ) -> dict[str, Any]:
        width = vectors.shape[1]
        sizes = {size for size in self.data.pooling.embedding.matryoshka if size < width} | {width}
        held_out = len(self.data.held_out)
        labels = parity.Labels(
            languages=tuple(self.data.languages),
            lengths=tuple(len(one) for one in self.data.held_out),
            dimensions=tuple(sorted(sizes)),
            kinds=tuple(self.data.kinds),
        )
        comparison = parity.compare(
            parity.Outputs(embeddings=reference[:held_out]),
            parity.Outputs(embeddings=vectors[:held_out]),
            labels,
        )
        if self.data.edge_cases:
            comparison["odd"] = parity.invariance(reference[held_out:], vectors[held_out:])
        return comparison

    def _edge_case_failures(self, comparison: Mapping[str, Any]) -> list[GateFailure]:
        """Edge cases are single texts: each must reach what a single text must."""
        bound = self.gates.get("cosine_min", LEAST_EDGE_COSINE)
        value = comparison["odd"]["cosine_min"] if "odd" in comparison else 1.0
        if value >= bound:
            return []
        words = f"empty text: cosine {value:.5f} is below {bound}"
        return [GateFailure(goal="empty text: cosine", gap=bound - value, words=words)]

    def _lowest(
        self,
        vectors: NDArray[np.float32],
        reference: NDArray[np.float32],
        failed: Sequence[GateFailure],
    ) -> tuple[str, ...]:
        """The held-out texts of the lowest cosines, in words: of the languages and kinds that
        failed, if any.
        """
        count = len(self.data.held_out)
        cosines = (vectors[:count].astype(np.float64) * reference[:count]).sum(axis=1)
        goals = [one.goal for one in failed]

        def missed(row: int) -> bool:
            groups = [f"language '{self.data.languages[row]}':"]
            groups += [f"kind '{self.data.kinds[row]}':"] if self.data.kinds else []
            return any(goal.startswith(tuple(groups)) for goal in goals)

        order = np.argsort(cosines)
        rows = [row for row in order if missed(int(row))] or list(order)
        return tuple(self._in_words(int(row), float(cosines[row])) for row in rows[:NAMED])

    def _in_words(self, row: int, cosine: float) -> str:
        text = self.data.texts[row] if self.data.texts else f"held-out text {row}"
        about = f"{self.data.languages[row]}, {len(self.data.held_out[row])} tokens"
        return f"{shorten(text, SHOWN_CHARACTERS, placeholder='...')!r} ({about}) {cosine:.5f}"

    @contextlib.contextmanager
    def _opened(self, model: OnnxModel) -> Iterator[Runner]:
        """Run a graph as its users will: with the engine's own operators."""
        folder = self.work_dir / "compiled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        compiled = self.runtime.build(model, CompileSpec(), folder)
        with self.runtime.runner(compiled, "cpu", 0) as runner:
            yield runner
        shutil.rmtree(folder, ignore_errors=True)

    def _embed(
        self, model: OnnxModel, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        output = TOKEN_VECTORS if model.signature.output(TOKEN_VECTORS) else TEXT_VECTORS
        with self._opened(model) as runner:
            vectors = embed(
                runner,
                [*self.data.held_out, *self.data.edge_cases],
                pad=self.data.pad,
                pooling=self.data.pooling,
                output=output,
                progress=progress,
            )
            del runner
        give_back_memory()
        return vectors


def _logged(entry: Mapping[str, Any] | None) -> Measurement | None:
    """A measurement from the trial log; None where there is none, or one of another form."""
    try:
        return (
            Measurement(
                metrics=entry["metrics"],
                failures=tuple(GateFailure(**one) for one in entry["failures"]),
                lowest=tuple(entry["lowest"]),
            )
            if entry is not None
            else None
        )
    except (KeyError, TypeError):
        return None
