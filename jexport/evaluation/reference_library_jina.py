"""The reference model for jina-embeddings-v3: transformers' own class, PEFT, unmerged adapters.

modules.json of these checkpoints names the authors' code, so the parts are put together here: the
native class with the task's adapter active beside the base weights, AutoTokenizer's ids, and
sentence-transformers' own Pooling and Normalize. The original layout goes through transformers'
conversion of names; its stacked adapters become one PEFT adapter. With --trust-remote-code the
authors' own model runs instead. Nothing here is shared with what is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.checkpoints import remote_code
from jexport.errors import StateDictError
from jexport.recipe import LoadSpec

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LAYOUTS = ("jina_v3_original", "jina_v3_native")
PARAMETRIZED = ".parametrizations.weight"
OFFSET = 2
"""Positions of max_position_embeddings that no text can have, by the convention of RoBERTa."""


def assemble(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, task: str
) -> tuple[SentenceTransformer, str]:
    """The model for one task, put together from the checkpoint's files.

    Args:
        folder: the checkpoint.
        config: its config.json.
        spec: [load] of the recipe: whether the authors' own model runs instead.
        task: whose adapter is active; `none` for the base weights.

    Returns:
        The model in eval mode, and the prompt that config.json gives the task ('' where none).

    Raises:
        StateDictError: transformers does not find each weight.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    if spec.trust_remote_code:
        with remote_code.allowed(folder, spec):
            model, more = _authors(folder, config, spec, task)
    elif config.get("model_type") == "jina_embeddings_v3":
        model, more = _native(folder, task), {}
    else:
        model, more = _original(folder, config, task), {}
    width = int(config["hidden_size"])
    modules: list[Any] = [input_module(model, folder, more)]
    listed = json_file(folder / "modules.json", [])
    poolings = [one for one in listed if str(one["type"]).endswith(".Pooling")]
    if poolings:
        modules.append(Pooling.load(str(folder), subfolder=poolings[0]["path"]))
    else:
        modules.append(Pooling(width, "cls" if config.get("emb_pooler") == "cls" else "mean"))
    if not listed or any(str(one["type"]).endswith(".Normalize") for one in listed):
        modules.append(Normalize())
    instructions = {**tasks.JINA_V3_PROMPTS, **(config.get("task_instructions") or {})}
    settings = json_file(folder / "config_sentence_transformers.json", {}) if listed else {}
    built = SentenceTransformer(
        modules=modules, device="cpu", truncate_dim=settings.get("truncate_dim")
    ).eval()
    built.max_seq_length = _limit(folder, config)
    return built, str(instructions.get(task, ""))


def _limit(folder: Path, config: Mapping[str, Any]) -> int:
    """The window in tokens: what the files beside the weights state, within the positions."""
    window = int(config.get("max_position_embeddings") or 514) - OFFSET
    stated = (
        json_file(folder / "sentence_bert_config.json", {}).get("max_seq_length"),
        json_file(folder / "tokenizer_config.json", {}).get("model_max_length"),
    )
    first = next((one for one in stated if isinstance(one, int | float) and 0 < one < 1e9), window)
    return min(window, int(first))


def json_file(path: Path, absent: Any) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        absent: given where there is none.

    Returns:
        The content, unchecked.
    """
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else absent


def input_module(model: Any, folder: Path, more: Mapping[str, Any]) -> Any:
    """The first module: AutoTokenizer, then the model.

    Args:
        model: of transformers.
        folder: of the tokenizer.
        more: arguments of each forward pass, a whole number for each text.

    Returns:
        Takes texts, gives token_embeddings [batch, sequence, hidden].
    """
    import torch
    from transformers import AutoTokenizer

    class Input(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.max_seq_length: int | None = None

        def preprocess(self, texts: list[str], prompt: str | None = None, **_: Any) -> Any:
            return self.tokenizer(
                [(prompt or "") + text for text in texts],
                padding=True,
                truncation=True,
                max_length=self.max_seq_length,
                return_tensors="pt",
            )

        def forward(self, features: Any, **_: Any) -> Any:
            rows = len(features["input_ids"])
            out = self.model(
                input_ids=features["input_ids"],
                attention_mask=features["attention_mask"],
                **{
                    name: torch.full((rows,), value, dtype=torch.int32)
                    for name, value in more.items()
                },
            )
            hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
            return {**features, "token_embeddings": hidden}

    return Input()


def _authors(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, task: str
) -> tuple[Any, dict[str, int]]:
    """The authors' model, and the adapter_mask that picks the task's adapter in it."""
    model = remote_code.assemble(folder, spec)
    if task == tasks.NONE:
        return model, {}
    listed = list(config.get("lora_adaptations") or tasks.JINA_V3_PROMPTS)
    return model, {"adapter_mask": listed.index(task)}


def _native(folder: Path, task: str) -> Any:
    """The native layout as transformers' documentation opens it: load_adapter, set_adapter."""
    import torch
    from transformers import JinaEmbeddingsV3Model

    model, report = JinaEmbeddingsV3Model.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, add_pooling_layer=False
    )
    check_report(report)
    if task != tasks.NONE:
        name = task.replace(".", "_").replace("-", "_")
        loading = model.load_adapter(str(folder / name), adapter_name=name)
        check_report(vars(loading))
        model.set_adapter(name)
    return model.eval()


def _original(folder: Path, config: Mapping[str, Any], task: str) -> Any:
    """The original layout in the native class: names converted by transformers, LoRA by PEFT."""
    import torch
    from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

    stored = {name.removeprefix("roberta."): value for name, value in _tensors(folder).items()}
    base = {
        name.replace(f"{PARAMETRIZED}.original", ".weight"): value
        for name, value in stored.items()
        if ".lora_" not in name and not name.startswith("pooler.")
    }
    known = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    theta = float(config.get("rotary_emb_base") or 10_000.0)
    native = JinaEmbeddingsV3Config(
        **{**known, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )
    model, report = JinaEmbeddingsV3Model.from_pretrained(
        None,
        config=native,
        state_dict=base,
        dtype=torch.float32,
        output_loading_info=True,
        add_pooling_layer=False,
    )
    check_report(report)
    if task != tasks.NONE:
        _activate(model, stored, config, task)
    return model.eval()


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def _activate(model: Any, stored: Mapping[str, Any], config: Mapping[str, Any], task: str) -> None:
    """Put one of the stacked adapters beside the model's matrices, with PEFT.

    The stack's Linear factors are [tasks, rank, in] and [tasks, out, rank]; a Wqkv's B holds the
    rows of q, k and v, and all three share its A. PEFT keeps an Embedding's factors transposed.
    """
    import peft

    index = list(config.get("lora_adaptations") or tasks.JINA_V3_PROMPTS).index(task)
    factors: dict[str, Any] = {}
    for name, stack in stored.items():
        module, separator, side = name.partition(f"{PARAMETRIZED}.0.lora_")
        if not separator or module.startswith("pooler."):
            continue
        value = stack[index].float()
        module = module.replace("encoder.layers.", "layers.").replace(
            "mixer.out_proj", "self_attn.o_proj"
        )
        if module.endswith("_embeddings"):
            factors[f"base_model.model.{module}.lora_embedding_{side}"] = value.T.contiguous()
        elif module.endswith("mixer.Wqkv"):
            parts = value.chunk(3) if side == "B" else (value,) * 3
            for letter, part in zip("qkv", parts, strict=True):
                projection = module.replace("mixer.Wqkv", f"self_attn.{letter}_proj")
                factors[f"base_model.model.{projection}.lora_{side}.weight"] = part.contiguous()
        else:
            factors[f"base_model.model.{module}.lora_{side}.weight"] = value
    names = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in factors})
    model.add_adapter(
        peft.LoraConfig(
            r=int(config["lora_rank"]),
            lora_alpha=config["lora_alpha"],
            target_modules=names,
            inference_mode=True,
        ),
        adapter_name="task",
    )
    report = peft.set_peft_model_state_dict(model, factors, adapter_name="task")
    missing = [name for name in report.missing_keys if "lora_" in name]
    check_report({"missing_keys": missing, "unexpected_keys": report.unexpected_keys})
    model.set_adapter("task")


def check_report(report: Mapping[str, Any]) -> None:
    """Refuse what from_pretrained or load_adapter could not put in place; a pooler may be more.

    Args:
        report: its loading info.

    Raises:
        StateDictError: the file does not have the model's weights.
    """
    lacking = [str(name) for name in report["missing_keys"]]
    odd = [str(one[0]) for one in report.get("mismatched_keys") or ()]
    odd += [str(name) for name in report["unexpected_keys"] if "pooler." not in str(name)]
    if lacking or odd:
        raise StateDictError(
            "transformers does not read this checkpoint's weights as they are",
            evidence=f"missing: {', '.join(sorted(lacking)[:5]) or 'none'}\n"
            f"not expected, or of another shape: {', '.join(sorted(odd)[:5]) or 'none'}",
            fix="give the config.json and the weights of one and the same checkpoint",
        )
