"""The calibration and held-out texts of one task, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jexport.datasets import calibration, sampling
from jexport.evaluation.int8_checks import Vectors
from jexport.quantization.evaluator import CalibrationData, PoolingSpec, embed
from jexport.recipe import QuantizeSpec
from jexport.runtime.embedder import TEXT_VECTORS, TOKEN_VECTORS
from jexport.runtime.tokenise import TextTokenizer
from jexport.types import LoadedModel, Runner, TensorSpec


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """Calibration and held-out texts of one task, with the model that tokenizes and embeds them.

    Args:
        parts: the texts.
        model: gives prompt, pooling and the length limit.
        tokenizer: as the runtime uses it.
    """

    parts: calibration.Parts
    model: LoadedModel
    tokenizer: TextTokenizer

    @classmethod
    def of(cls, source: str, model: LoadedModel) -> TokenizedTexts:
        """The calibration set's texts for a model's task.

        Args:
            source: a shipped set's name, or a folder or file of texts.
            model: the checkpoint, opened for the task.

        Returns:
            The texts; nothing is tokenized yet.

        Raises:
            CalibrationError: as `calibration.parts`.
        """
        return cls(
            parts=calibration.parts(source, model.embedding.task),
            model=model,
            tokenizer=TextTokenizer.open(
                model.tokenizer_files[0].parent, max_tokens=model.embedding.max_tokens
            ),
        )

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the runtime will make them: tokenizer.json, prompt, truncation.

        Args:
            texts: without the prompt.

        Returns:
            The ids of each text, at most the length limit.
        """
        return self.tokenizer.model_ids(texts, prefix=self.model.embedding.prompt)

    @property
    def pooling(self) -> PoolingSpec:
        """What becomes of token vectors: a prompt with include_prompt = false is left out."""
        embedding = self.model.embedding
        prompt = "" if embedding.include_prompt else embedding.prompt
        return PoolingSpec(
            embedding=embedding,
            skip_tokens=self.tokenizer.prompt_tokens(prompt) if prompt else 0,
        )

    def held_out(self) -> list[list[int]]:
        """The held-out texts that have tokens."""
        return [
            ids for ids in self.tokens([one.text for one in self.parts.held_out.samples]) if ids
        ]

    def embed(self, runner: Runner, outputs: Sequence[TensorSpec]) -> Vectors:
        """Embed the held-out texts.

        Args:
            runner: an opened engine, or the checkpoint itself.
            outputs: of the runner; token vectors are pooled where it gives them.

        Returns:
            float32 [texts, dimension], cut as the checkpoint states and normalised; texts as in
            `held_out`.
        """
        names = [spec.name for spec in outputs]
        return embed(
            runner,
            self.held_out(),
            pad=self.tokenizer.pad,
            pooling=self.pooling,
            output=TOKEN_VECTORS if TOKEN_VECTORS in names else TEXT_VECTORS,
        )


def calibration_data(texts: TokenizedTexts, spec: QuantizeSpec) -> CalibrationData:
    """Texts of both parts as token ids, prompt included, cut to the recipe's length.

    Args:
        texts: of the build's task.
        spec: [quantize]: how many texts to calibrate on, and the most tokens of one.

    Returns:
        The texts, with an empty one to calibrate on where it has tokens.
    """
    limit = min(spec.max_tokens, texts.model.embedding.max_tokens)
    parts = texts.parts
    calibrated, cut = sampling.sample(
        parts.calibration, texts.tokens, count=spec.samples, max_tokens=limit
    )
    edge_cases = [ids for ids in texts.tokens([""]) if ids]  # users send empty texts too
    calibrated += edge_cases
    held = [
        (ids, sample)
        for sample, ids in zip(
            parts.held_out.samples,
            texts.tokens([sample.text for sample in parts.held_out.samples]),
            strict=True,
        )
        if ids
    ]
    held_ids = [sampling.cut_ids(ids, limit) for ids, _ in held]
    kinds = [sample.kind for _, sample in held]
    metadata = {
        "calibration": {
            "name": parts.calibration.name,
            "sha256": parts.calibration.sha256,
            "texts": len(calibrated),
            "tokens": sum(map(len, calibrated)),
            "cut": cut,
        },
        "held_out": {
            "name": parts.held_out.name,
            "sha256": parts.held_out.sha256,
            "texts": len(held_ids),
            "tokens": sum(map(len, held_ids)),
        },
    }
    return CalibrationData(
        calibration=calibrated,
        held_out=held_ids,
        languages=[sample.language for _, sample in held],
        texts=[sample.text for _, sample in held],
        kinds=kinds if any(kinds) else (),
        pad=texts.tokenizer.pad,
        pooling=texts.pooling,
        metadata=metadata,
        edge_cases=edge_cases,
    )
