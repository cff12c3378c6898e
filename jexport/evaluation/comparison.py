"""The reference library's ids and vectors beside an artifact's, as numbers and words.

Every text's token ids are compared; those that were embedded have their vectors compared as well,
group by group. It holds nothing against a bound. Knows no framework and no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.artifacts.reference import Stored
from jexport.errors import ParityError
from jexport.evaluation import candidate as candidates
from jexport.evaluation import diagnosis, parity
from jexport.evaluation.candidate import ONE_BATCH, Candidate, Embedded, StoredIds
from jexport.evaluation.edge_texts import EDGE
from jexport.evaluation.reference_library import ENCODE, USES
from jexport.evaluation.reference_set import ReferenceSet
from jexport.runtime.inference import plan_by_tokens
from jexport.runtime.pool import finish
from jexport.types import Sample

HIDDEN = "last_hidden_state"
UNIT_LENGTH = 1e-3
"""How far from 1 the length of a normalised vector may be."""

ALONE_TEXTS = 48
"""Texts that are also run alone, to see whether a text's vector depends on its batch."""

EMBEDDER = "embedder"
"""Name of the group of all texts as the Embedder gives them."""

SHOWN = 8
"""Texts that are named, one of each likely key."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both sides: what the reference library gave, and the artifact's token ids of the same texts.

    Args:
        reference: texts, ids and vectors of the library.
        candidate: the artifact.
        ids: of each text, what the runtime gives its engine.
    """

    reference: ReferenceSet
    candidate: Candidate
    ids: tuple[list[int], ...]

    @classmethod
    def of(cls, reference: ReferenceSet, candidate: Candidate) -> Comparison:
        """Tokenise as the runtime does.

        Args:
            reference: the texts, and what the library gave for them.
            candidate: the artifact.

        Returns:
            Both sides, nothing run yet.

        Raises:
            ParityError: the artifact's tokenizer gives no token for a text that was embedded.
        """
        ids: list[list[int]] = [[] for _ in reference.samples]
        for use in USES:
            rows = [row for row, own in enumerate(reference.uses) if own == use]
            words = [reference.samples[row].text for row in rows]
            if words:
                candidate_ids = candidates.token_ids(candidate, words, use)
                for row, one in zip(rows, candidate_ids, strict=True):
                    ids[row] = one
        comparison = cls(reference=reference, candidate=candidate, ids=tuple(ids))
        if not all(comparison.ids[: len(reference.vectors)]):
            raise ParityError(
                "validate: the artifact's tokenizer gives no token for a text",
                evidence="\n".join(comparison.differences()),
                fix="look at tokenizer.json: sentence-transformers has tokens for this text",
            )
        return comparison

    @classmethod
    def of_stored(cls, stored: Stored, candidate: Candidate) -> Comparison:
        """Only vectors are compared: what is stored is the ids, not the texts.

        Args:
            stored: ids, languages and vectors of the texts.
            candidate: the artifact; it gets the ids as they were stored, without a prompt.

        Returns:
            Both sides, the ids the same on both.
        """
        ids = tuple(map(list, stored.ids))
        reference = ReferenceSet(
            samples=tuple(
                Sample(text=str(row), language=language)
                for row, language in enumerate(stored.languages)
            ),
            uses=(ENCODE,) * len(ids),
            ids=ids,
            vectors=stored.vectors,
            tokens=(),
            max_tokens=0,
            texts=stored.texts,
        )
        plain = dataclasses.replace(
            candidate,
            tokenizer=StoredIds(candidate.tokenizer, ids),
            embedding=dataclasses.replace(candidate.embedding, prompt=""),
        )
        return cls(reference=reference, candidate=plain, ids=ids)

    def differing(self) -> list[int]:
        """The texts whose token ids are not the same on both sides."""
        pairs = zip(self.reference.ids, self.ids, strict=True)
        return [row for row, (theirs, ours) in enumerate(pairs) if theirs != ours]

    def differences(self) -> list[str]:
        """What to say of them: other tokens are another model, whatever their vectors are."""
        rows, given = self.differing(), self.reference
        if not rows:
            return []
        tokenizer = self.candidate.tokenizer
        differences = [f"token ids differ in {len(rows)} of {len(self.ids)} texts"]
        seen: set[str] = set()
        for row in rows:
            likely = diagnosis.of_ids(
                given.samples[row].text,
                given.ids[row],
                self.ids[row],
                tokenize=lambda text: tokenizer.model_ids([text])[0],
                prompt=self.candidate.embedding.prompt if given.uses[row] == ENCODE else "",
                limits=(given.max_tokens, tokenizer.max_tokens),
            )
            if likely in seen or len(seen) == SHOWN:
                continue
            seen.add(likely)
            sides = diagnosis.shown(given.ids[row], self.ids[row], given.samples[row].text)
            about = f"text {row} (language '{given.samples[row].language}', {given.uses[row]})"
            differences.append(f"{about} {sides}; likely {likely}")
        return differences

    def measure(self, progress: Callable[[int, int], None]) -> tuple[dict[str, Any], list[str]]:
        """Run the candidate and compare each of its outputs.

        Args:
            progress: called after each batch with the tokens that are done and those of all texts.

        Returns:
            The metrics, as `parity.compare` makes them, with groups for edge texts and each use;
            and what a difference looks like, in words, where there is one.

        Raises:
            ParityError: as `Runtime.embed` and `parity.compare`, or the sizes of vectors differ.
        """
        given = self.reference
        total, done = sum(map(len, self.ids[: len(given.vectors)])), 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        with candidates.opened(self.candidate) as runtime:
            parts: list[Embedded] = []
            for use in USES:
                rows = self._rows(use)
                if rows:
                    parts.append(runtime.embed(*self._texts(rows), use, progress=count))
            embedded = _joined(parts)
            rows, batched = self._batched(embedded, runtime)
            alone = runtime.embed(*self._texts(rows), ENCODE, max_batch_tokens=1)
        metrics: dict[str, Any] = {}
        for spec in self.candidate.outputs:
            report = self._compared(embedded, spec.name)
            sides = [_vectors(one, spec.name) for one in (alone, batched)]
            report["batch"] = parity.invariance(*sides)
            metrics |= {spec.name: report} if metrics else report
        metrics[EMBEDDER] = _apart(_cut(given.vectors, embedded.vectors), embedded.vectors)
        metrics["token_ids_compared"] = len(self.ids)
        metrics["token_ids_differ"] = len(self.differing())
        return metrics, self._likely(embedded)

    def _rows(self, use: str) -> list[int]:
        """The embedded texts of one use."""
        count = len(self.reference.vectors)
        return [row for row in range(count) if self.reference.uses[row] == use]

    def _texts(self, rows: Sequence[int]) -> tuple[list[str], list[list[int]]]:
        """Texts, and the artifact's token ids of them."""
        return [self.reference.samples[row].text for row in rows], [self.ids[row] for row in rows]

    def _batched(self, alone: Embedded, runtime: candidates.Runtime) -> tuple[list[int], Embedded]:
        """Up to ALONE_TEXTS texts from the shortest to the longest, as they were in a batch.

        Only texts that had neighbours count; when none had, the two shortest are batched for this.
        """
        rows = self._rows(ENCODE)
        batches = plan_by_tokens([self.ids[row] for row in rows])
        near = sorted(rows[at] for batch in batches if len(batch.rows) > 1 for at in batch.rows)
        if near:
            chosen = [near[p] for p in _spread([len(self.ids[row]) for row in near], ALONE_TEXTS)]
            return chosen, alone.of(chosen)
        chosen = sorted(rows, key=lambda row: len(self.ids[row]))[:2]
        return chosen, runtime.embed(*self._texts(chosen), ENCODE, max_batch_tokens=ONE_BATCH)

    def _compared(self, embedded: Embedded, name: str) -> dict[str, Any]:
        """One output of the candidate beside the reference vectors, group by group."""
        given, vectors = self.reference, _vectors(embedded, name)
        if name != HIDDEN and self.candidate.embedding.truncate_dim:
            vectors = vectors[:, : self.candidate.embedding.truncate_dim]
        expected = _cut(given.vectors, vectors) if name != HIDDEN else given.vectors
        if vectors.shape[1] != expected.shape[1]:
            raise ParityError(
                "validate: the artifact's vectors have another size than the checkpoint's",
                evidence=f"sentence-transformers gives {expected.shape[1]} values, the artifact "
                f"{vectors.shape[1]}; likely truncate_dim (config_sentence_transformers.json) or a "
                "Dense module (modules.json)",
                fix="look at these files; if they are as they should be, report this checkpoint",
            )
        rows = given.rows(edge=False)
        pairs = bool(given.tokens) and name == HIDDEN and not self.differing()
        ours = embedded.outputs.get(name, ())
        report = parity.compare(
            parity.Outputs(
                embeddings=expected[rows],
                tokens=tuple(given.tokens[row] for row in rows) if pairs else (),
            ),
            parity.Outputs(
                embeddings=vectors[rows], tokens=tuple(ours[row] for row in rows) if pairs else ()
            ),
            self._labels(rows, vectors.shape[1]),
        )
        report["norms"] = parity.norms(expected[rows], vectors[rows])
        report["norms"]["unit"] = _unit(expected)
        groups = {EDGE: given.rows(edge=True)}
        groups |= {use: given.rows(edge=False, use=use) for use in USES if use != ENCODE}
        return report | {
            group: _apart(expected[own], vectors[own]) for group, own in groups.items() if own
        }

    def _labels(self, rows: Sequence[int], width: int) -> parity.Labels:
        sizes = {size for size in self.candidate.embedding.matryoshka if size < width} | {width}
        return parity.Labels(
            languages=tuple(self.reference.samples[row].language for row in rows),
            lengths=tuple(len(self.ids[row]) for row in rows),
            dimensions=tuple(sorted(sizes)),
        )

    def _likely(self, embedded: Embedded) -> list[str]:
        """Where ids are the same and the vectors are not nearly so: what may be behind it."""
        given = self.reference
        if self.differing():
            return []
        expected = _cut(given.vectors, embedded.vectors)
        apart = _apart(expected, embedded.vectors)
        if apart["cosine_min"] < diagnosis.FAR:
            ours = embedded.outputs.get(HIDDEN, ())
            pooling = self.candidate.embedding.pooling
            return [diagnosis.of_vectors(expected, given.tokens, ours, pooling=pooling)]
        if apart["largest_error"] > diagnosis.LENGTHS:
            return [diagnosis.of_lengths(expected, embedded.vectors)]
        return []


def _spread(lengths: Sequence[int], count: int) -> list[int]:
    """Places from the shortest to the longest, evenly: the longest cost most of the time."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    steps = np.linspace(0, len(order) - 1, num=min(count, len(order)))
    return sorted({order[int(step)] for step in steps})


def _joined(parts: Sequence[Embedded]) -> Embedded:
    return Embedded(
        vectors=np.concatenate([one.vectors for one in parts]),
        outputs={
            name: [value for one in parts for value in one.outputs[name]]
            for name in parts[0].outputs
        },
    )


def _vectors(embedded: Embedded, name: str) -> NDArray[np.float32]:
    """An output as vectors: token vectors as the Embedder makes one of them, others as they are."""
    return embedded.vectors if name == HIDDEN else np.stack(embedded.outputs[name])


def _cut(reference: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The reference vectors as a graph's own output shortens them (export.dimension).

    They are normalised again where the library normalises.
    """
    if vectors.shape[1] >= reference.shape[1]:
        return reference
    return finish(reference, dimensions=vectors.shape[1], normalize=_unit(reference))


def _unit(vectors: NDArray[np.float32]) -> bool:
    return bool(abs(np.linalg.norm(vectors, axis=1) - 1).max() < UNIT_LENGTH)


def _apart(reference: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
    """How far vectors are from those wanted: direction, then length."""
    report: dict[str, Any] = parity.invariance(reference, vectors)
    report["largest_error"] = parity.norms(reference, vectors)["largest_error"]
    return report
