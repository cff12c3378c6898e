"""The reference model for jina-embeddings-v5-text: transformers' class, PEFT, unmerged adapter.

modules.json of these checkpoints names the authors' code alone, so the parts are put together here:
transformers' Qwen3 or EuroBERT with the task's adapter active beside the base weights,
AutoTokenizer's ids, and sentence-transformers' own Pooling and Normalize, or the modules that a
fine-tune lists after its transformer. Nothing here is shared with what is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.evaluation.reference_library_jina import check_report, input_module, json_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LAYOUTS = ("jina_v5",)
PROMPTS = {"query": "Query: ", "document": "Document: "}


def assemble(folder: Path, task: str) -> SentenceTransformer:
    """The model for one task, put together from the checkpoint's files.

    Args:
        folder: the checkpoint.
        task: whose adapter is active; `none` for the base weights.

    Returns:
        The model in eval mode, with its prompts; each text is a document unless told otherwise.

    Raises:
        StateDictError: transformers does not find each weight.
    """
    from sentence_transformers import SentenceTransformer

    model = _model(folder, task)
    settings = json_file(folder / "config_sentence_transformers.json", {})
    built = SentenceTransformer(
        modules=[input_module(model, folder, {}), *_after(folder, model.config.hidden_size)],
        device="cpu",
        prompts={**PROMPTS, **(settings.get("prompts") or {})},
        default_prompt_name=settings.get("default_prompt_name") or "document",
        truncate_dim=settings.get("truncate_dim"),
    ).eval()
    limit = json_file(folder / "tokenizer_config.json", {}).get("model_max_length")
    positions: int = model.config.max_position_embeddings
    built.max_seq_length = min(positions, int(limit)) if limit else positions
    return built


def _after(folder: Path, width: int) -> list[Any]:
    """What turns token vectors into a text's: the authors' way, unless modules.json lists more."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from sentence_transformers.util import import_from_string

    listed = json_file(folder / "modules.json", [])[1:]
    if not listed:
        return [Pooling(width, "lasttoken"), Normalize()]
    classes: list[Any] = [import_from_string(one["type"]) for one in listed]
    return [
        kind.load(str(folder), subfolder=one["path"], local_files_only=True)
        for kind, one in zip(classes, listed, strict=True)
    ]


def _model(folder: Path, task: str) -> Any:
    """The native model as transformers' documentation opens it: load_adapter, set_adapter.

    A decoder is Qwen3 and an encoder EuroBERT; a config that does not say is a decoder's, as vLLM
    takes it.
    """
    import torch
    from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

    stated = json_file(folder / "config.json", {})
    known = {key: value for key, value in stated.items() if key not in ("auto_map", "model_type")}
    kinds = (Qwen3Config, Qwen3Model), (EuroBertConfig, EuroBertModel)
    config_class, model_class = kinds[0 if stated.get("is_decoder", True) else 1]
    model, report = model_class.from_pretrained(
        folder, config=config_class(**known), dtype=torch.float32, output_loading_info=True
    )
    check_report(report)
    if task != tasks.NONE:
        loading = model.load_adapter(str(folder / "adapters" / task), adapter_name="task")
        check_report(vars(loading))
        model.set_adapter("task")
    return model.eval()
