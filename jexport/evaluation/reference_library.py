"""The reference library: sentence-transformers itself, text to vector, in float32 on the CPU.

It opens the checkpoint's folder with its own tokenizer, prompts, modules, truncation and
normalisation; jexport's reading of the checkpoint is held against it and has no part in it. What
a recipe changes on purpose (a prompt, a smaller length limit) is passed as the library's own
argument. For jina-embeddings-v3 and v5, whose modules.json names the authors' code,
reference_library_jina.py and reference_library_jina_v5.py put the model together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jexport.checkpoints import remote_code
from jexport.checkpoints.eager import torch_threads
from jexport.checkpoints.transformer_files import quiet_transformers
from jexport.errors import JexportError, UnsupportedCheckpointError
from jexport.evaluation import reference_library_jina, reference_library_jina_v5
from jexport.recipe import LoadSpec
from jexport.runtime.inference import TextBatch, in_text_order, plan_by_tokens, run_batches
from jexport.types import LoadedModel
from jexport.workspace.run import cores

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LIBRARY = "sentence-transformers"
ENCODE, QUERY, DOCUMENT = "encode", "encode_query", "encode_document"
SIDES = {"query": QUERY, "document": DOCUMENT}
USES = (ENCODE, QUERY, DOCUMENT)
"""The library's methods that give a text's vector; each may put another prompt before it."""

FILLERS = (" a", " 1", " the", "a", "1", ".")
"""Texts to repeat: one of them adds exactly one token a time in most tokenizers."""

TOGETHER = 16
"""Texts of one call that only tokenises: they are padded to the longest."""

NOT_STATED = 1 << 20
"""A limit of so many tokens is none: tokenizers without one say 1e30."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the library gives for one text.

    Args:
        vector: float32 [dimension], as `encode` returns it.
        tokens: float32 [tokens, hidden], without padding; None where the model has none.
    """

    vector: NDArray[np.float32]
    tokens: NDArray[np.float32] | None


class ReferenceLibrary:
    """An opened SentenceTransformer. Use through `opened`."""

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        uses: Sequence[str] = USES,
        prompt: str | None = None,
        use: str = "",
        at_once: int = 1,
    ) -> None:
        """Take a model.

        Args:
            model: in float32 and eval mode.
            uses: the methods that mean something for this checkpoint.
            prompt: put before each text by `encode`; None leaves it to the checkpoint.
            use: load.use of the recipe: the artifact's default, which `encode` then stands for.
            at_once: forward passes at the same time, each on one thread.
        """
        self.uses = uses
        self._model = model
        self._default = _default_call(model, prompt, use)
        self._input = _input_module(model, use)
        self._at_once = at_once
        preprocess, lock, forward = model.preprocess, threading.Lock(), model.forward

        def one_at_a_time(*words: Any, **named: Any) -> Any:
            # A fast tokenizer that is told to pad while it is in use raises "Already borrowed".
            with lock:
                return preprocess(*words, **named)

        model.preprocess = one_at_a_time
        # Before 6.1 `encode(output_value=None)` takes the nth letter of a feature that is a str.
        model.forward = lambda features, **named: _tensors(forward(features, **named))

    @property
    def max_tokens(self) -> int:
        """The library's length limit in tokens, special tokens included; 0 for none."""
        limit = self._input.max_seq_length
        return int(limit) if limit is not None and limit < NOT_STATED else 0

    @property
    def window(self) -> int:
        """Tokens that a layer of the model sees at most, on one side or both; 0 for all of them."""
        from jexport.graph import probe

        return max(probe.windows(getattr(self._model[0], "auto_model", None)), default=0)

    def added_tokens(self) -> list[str]:
        """The tokens that the tokenizer finds in a text before its model sees it."""
        if hasattr(self._input.tokenizer, "get_added_tokens_decoder"):  # of the tokenizers library
            decoder = self._input.tokenizer.get_added_tokens_decoder()
            return [str(decoder[number].content) for number in sorted(decoder)]
        added: dict[str, int] = getattr(self._input.tokenizer, "get_added_vocab", dict)()
        return sorted(added, key=added.__getitem__)

    def tokenize(self, texts: Sequence[str], use: str = ENCODE) -> list[list[int]]:
        """Token ids of each text, prompt and special tokens included, truncated.

        They are taken from a call of `use` whose forward pass is left out.

        Args:
            texts: any, an empty one too.
            use: the library's method, one of USES.

        Returns:
            The ids of each text, without padding.
        """
        import torch

        def no_pass(features: Any, **_: Any) -> Any:
            rows = features["offsets" if "offsets" in features else "input_ids"]
            pooled = torch.zeros(len(rows), 1)
            return _tensors({**features, "sentence_embedding": pooled})

        forward, self._model.forward = self._model.forward, no_pass
        try:
            answers = self._call(list(texts), use, batch_size=TOGETHER)
        finally:
            self._model.forward = forward
        return [_real(one, "input_ids").to(torch.int64).tolist() for one in answers]

    def encode(
        self,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        use: str = ENCODE,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        """Embed texts, batches of neighbours in length, each on one thread: the same bits always.

        Args:
            texts: each with at least one token.
            ids: what `tokenize` gave for them; only their lengths matter.
            use: the library's method, one of USES.
            progress: called after each batch with how many tokens it had.

        Returns:
            An answer a text, in the order of the texts.
        """

        def answer(_: int, batch: TextBatch[Sequence[int]]) -> list[Answer]:
            together = [texts[row] for row in batch.rows]
            return [_answer(one) for one in self._call(together, use, batch_size=len(together))]

        with torch_threads(1):
            answers = run_batches(plan_by_tokens(ids), range(self._at_once), answer)
            return in_text_order(
                answers, len(texts), lambda rows: progress(sum(len(ids[row]) for row in rows))
            )

    def limit(self, max_tokens: int) -> None:
        """Cut texts to a length: the library's own argument.

        Args:
            max_tokens: special tokens included.
        """
        if hasattr(self._input.tokenizer, "enable_truncation"):  # of the tokenizers library
            self._input.tokenizer.enable_truncation(max_tokens)
        else:
            self._input.max_seq_length = max_tokens

    def can_embed(self, text: str) -> bool:
        """Whether the model has a vector for a text of this length: a position table may end.

        Args:
            text: embedded alone by `encode`.

        Returns:
            False where the forward pass fails.
        """
        try:
            self._call([text], ENCODE, batch_size=1)
        except (IndexError, RuntimeError):
            return False
        return True

    def text_of(self, tokens: int) -> str:
        """A text of a given length, were it not truncated.

        Args:
            tokens: exactly so many, special tokens and prompt included.

        Returns:
            The text; '' where none is known.
        """
        unit, least = self._filler
        return unit.strip() + unit * (tokens - least) if unit and tokens >= least else ""

    @cached_property
    def _filler(self) -> tuple[str, int]:
        """A text to repeat that adds one token a time, and the tokens of the first; '' for none."""
        for unit in FILLERS:
            one, two, nine = map(len, self.tokenize([unit.strip() + unit * n for n in (0, 1, 8)]))
            if (two - one, nine - one) == (1, 8):
                return unit, one
        return "", 0

    def free(self) -> None:
        """Give the weights' memory back, whoever still holds the model."""
        self._model.to("meta")

    def _call(self, texts: list[str], use: str, *, batch_size: int) -> list[Any]:
        """Every feature of each text; padding is still in them."""
        named: dict[str, Any] = {"output_value": None, "show_progress_bar": False}
        if use == ENCODE:
            use, more = self._default
            named |= more
        method = getattr(self._model, use)
        with quiet():
            return list(method(texts, batch_size=batch_size, **named))


def _default_call(
    model: SentenceTransformer, prompt: str | None, use: str
) -> tuple[str, dict[str, Any]]:
    """The library's method and arguments for the texts of an artifact's use."""
    if use in SIDES:
        return SIDES[use], {}
    if not use:
        return ENCODE, {"prompt": prompt}
    named = {"prompt_name": use} if use in model.prompts else {}
    return ENCODE, {**named, **({"task": use} if _router(model) is not None else {})}


def _router(model: SentenceTransformer) -> Any:
    """The library's Router where texts go in by one, else None."""
    first = model[0]
    return first if hasattr(first, "_resolve_route") else None


def _input_module(model: SentenceTransformer, use: str) -> Any:
    """What has the tokenizer and its limit: the model, or the first module of a Router's route."""
    router = _router(model)
    if router is None:
        return model
    return router.sub_modules[router._resolve_route(task=use or None, modality="text")][0]


def _tensors(features: Any) -> dict[str, Any]:
    """The features of a batch that have a row a text; what else a module noted is left out.

    A StaticEmbedding's token ids are one row for all texts, with the place where each begins.
    """
    import torch

    rows = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    if "offsets" not in rows:
        return rows
    parts = torch.tensor_split(rows["input_ids"], rows.pop("offsets")[1:].tolist())
    padded = torch.zeros(len(parts), max(1, *(len(part) for part in parts)), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, part in enumerate(parts):
        padded[row, : len(part)], mask[row, : len(part)] = part, 1
    return {**rows, "input_ids": padded, "attention_mask": mask}


def _real(features: Any, name: str) -> Any:
    """The rows of a feature that are no padding, on whichever side it is."""
    if name not in features or "attention_mask" not in features:
        raise UnsupportedCheckpointError(
            f"{LIBRARY} gives no {name} for this checkpoint",
            evidence=f"its features: {', '.join(sorted(features))}",
            fix="give a text encoder (BERT, XLM-R, MiniLM ...)",
        )
    return features[name][features["attention_mask"].bool()]


def _answer(features: Any) -> Answer:
    tokens = None
    if "token_embeddings" in features:
        tokens = _real(features, "token_embeddings").float().numpy()
    vector = features["sentence_embedding"].float().numpy().copy()
    return Answer(vector=vector, tokens=tokens)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither transformers nor sentence-transformers talks: what they load is compared."""
    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def opened(loaded: LoadedModel, spec: LoadSpec) -> Iterator[ReferenceLibrary]:
    """Open the library on the checkpoint that `loaded` was read from.

    Args:
        loaded: says where the checkpoint is, its layout and task; nothing else of it is used.
        spec: [load] of the recipe: what it changes, and whether the checkpoint's code may run.

    Yields:
        The library; its weights are freed at the end.

    Raises:
        UnsupportedCheckpointError: the library cannot open or use the checkpoint.
    """
    task = loaded.embedding.task
    with _explained(), quiet(), torch_threads(1):
        if loaded.source.layout in reference_library_jina.LAYOUTS:
            model, prompt = reference_library_jina.assemble(
                loaded.folder, loaded.config, spec, task
            )
        elif loaded.source.layout in reference_library_jina_v5.LAYOUTS:
            model, prompt = reference_library_jina_v5.assemble(loaded.folder, task), None
        else:
            model, prompt = _assemble(loaded.folder, spec), None
    is_jina = loaded.source.layout in reference_library_jina.LAYOUTS
    if not is_jina:
        model.prompts |= {name: text for name, text in spec.prompts.items() if name != task}
    library = ReferenceLibrary(
        model,
        # A jina-embeddings-v3 checkpoint has no prompts by name: its task decides. The weights of a
        # Router's route are for one side.
        uses=(ENCODE,) if is_jina or loaded.embedding.side else USES,
        use=spec.use,
        prompt=spec.prompts.get(task, prompt),
        at_once=1 if spec.trust_remote_code else cores(),
    )
    if spec.max_tokens:
        library.limit(spec.max_tokens)
    try:
        with _explained():
            yield library
    finally:
        library.free()


def _assemble(folder: Path, spec: LoadSpec) -> SentenceTransformer:
    """What a user of the library opens: no network, and no code but where it is trusted."""
    import torch
    from sentence_transformers import SentenceTransformer

    def open_model(**model_kwargs: Any) -> SentenceTransformer:
        return SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs={"dtype": torch.float32, **model_kwargs},
        )

    if not spec.trust_remote_code:
        # A StaticEmbedding is opened in the dtype of its file, whatever dtype is asked for.
        return open_model().float().eval()
    with remote_code.allowed(folder, spec):
        model = open_model(**({"code_revision": spec.code_revision} if spec.code_revision else {}))
        remote_code.repair_buffers(model.transformers_model)
    return model.eval()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Whatever the library raises says that it cannot use this checkpoint, and so do we."""
    try:
        yield
    except (JexportError, MemoryError):
        raise
    except Exception as error:
        # Without a number it is not the system's: transformers' "Can't load image processor".
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedCheckpointError(
            f"{LIBRARY} cannot use this checkpoint, so nothing says what its vectors are",
            evidence=f"{type(error).__name__}: {first}",
            fix=f"mend the checkpoint until SentenceTransformer(folder).encode(...) of {LIBRARY} "
            "works with it",
        ) from error
