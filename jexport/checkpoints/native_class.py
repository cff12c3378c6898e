"""Both jina-embeddings-v3 layouts in transformers' native class: names, shapes, assembly, forward.

Name map: transformers 5.23 conversion_mapping.py["jina_embeddings_v3"]. The native model is built
on the meta device and given its weights one by one; its non-persistent buffers are made again on
the CPU, because a meta buffer holds no numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.errors import AdapterError, StateDictError, UnsupportedCheckpointError
from jexport.flow import LowRank, Runner, Tensors, WeightReader

if TYPE_CHECKING:
    import torch

LAYER_NAMES = {
    "mixer.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A matrix that carries a LoRA: its original module name, shape, and native parts.

    parts: (native weight name, row range or None); Wqkv has three, every other matrix one.
    """

    original: str
    shape: tuple[int, int]
    embedding: bool
    parts: tuple[tuple[str, tuple[int, int] | None], ...]


def adapted_matrices(config: Mapping[str, Any], *, pooler: bool) -> list[Adapted]:
    """Every Linear and Embedding of the model: each has a LoRA, also the pooler where there is one.

    The pooler is never run, but an adapter without its part was not saved whole.
    """
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])

    def one(original: str, rows: int, columns: int, *, embedding: bool = False) -> Adapted:
        part = (f"{native_module(original)}.weight", None)
        return Adapted(original=original, shape=(rows, columns), embedding=embedding, parts=(part,))

    vocabulary, types = int(config["vocab_size"]), int(config["type_vocab_size"])
    found = [
        one("embeddings.word_embeddings", vocabulary, hidden, embedding=True),
        one("embeddings.token_type_embeddings", types, hidden, embedding=True),
    ]
    for layer in range(int(config["num_hidden_layers"])):
        name = f"encoder.layers.{layer}"
        thirds = tuple(
            (f"layers.{layer}.self_attn.{p}_proj.weight", (n * hidden, (n + 1) * hidden))
            for n, p in enumerate("qkv")
        )
        found.append(
            Adapted(original=f"{name}.mixer.Wqkv", shape=(3 * hidden, hidden), embedding=False,
                    parts=thirds)  # fmt: skip
        )
        found.append(one(f"{name}.mixer.out_proj", hidden, hidden))
        found.append(one(f"{name}.mlp.fc1", inner, hidden))
        found.append(one(f"{name}.mlp.fc2", hidden, inner))
    if pooler:
        found.append(one("pooler.dense", hidden, hidden))
    return found


def native_module(name: str) -> str:
    """The native name of an original module (`Wqkv` apart); native names stay as they are."""
    if name.startswith("emb_ln"):
        return name.replace("emb_ln", "embeddings.LayerNorm", 1)
    stem = name.removeprefix("encoder.")
    if not stem.startswith("layers."):
        return name
    _, number, rest = stem.split(".", 2)
    return f"layers.{number}.{LAYER_NAMES.get(rest, rest)}"


def check_factor(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], *, what: str
) -> None:
    """Raise AdapterError unless a LoRA factor has the shape that rank and matrix ask for."""
    if shape != wanted:
        raise AdapterError(
            f"adapter matrix '{name}' has another shape or rank",
            evidence=f"it is {list(shape)}; {what} and the base model ask for {list(wanted)}",
            fix="give the adapter that was trained on this base model",
        )


def native_weights(
    names: Mapping[str, str], found: Mapping[str, shards.Entry], config: Mapping[str, Any]
) -> dict[str, WeightReader]:
    """Readers under native names for every weight of the model, the unused pooler left out.

    names: plain weight name ('...weight', '...bias') -> name in the file. Raises StateDictError
    when anything is missing, unexpected or of another shape.
    """
    hidden = int(config["hidden_size"])
    readers: dict[str, WeightReader] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for plain, raw in names.items():
        module, _, kind = plain.removeprefix("roberta.").rpartition(".")
        if module.endswith("mixer.Wqkv"):
            layer = module.removeprefix("encoder.").split(".")[1]
            _check_shapes({raw: found[raw].shape[:1]}, {raw: (3 * hidden,)})
            for n, part in enumerate("qkv"):
                native = f"layers.{layer}.self_attn.{part}_proj.{kind}"
                rows = (n * hidden, (n + 1) * hidden)
                readers[native] = shards.reader(raw, found[raw], rows=rows)
                shapes[native] = (hidden, *found[raw].shape[1:])
        else:
            native = f"{native_module(module)}.{kind}"
            readers[native] = shards.reader(raw, found[raw])
            shapes[native] = found[raw].shape
    wanted = {name: tuple(t.shape) for name, t in _skeleton(config).state_dict().items()}
    unused = [name for name in readers if name.startswith("pooler.dense.")]
    for name in unused:
        del readers[name], shapes[name]
    _check_shapes(shapes, wanted)
    return readers


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    missing, unexpected = set(wanted) - set(found), set(found) - set(wanted)
    mismatched = [
        f"{name} {list(found[name])} instead of {list(wanted[name])}"
        for name in sorted(set(found) & set(wanted))
        if found[name] != wanted[name]
    ]
    if missing or unexpected or mismatched:
        raise StateDictError(
            "the checkpoint's weights are not those of its config.json",
            evidence=f"missing: {shards.describe(missing) or 'none'}\n"
            f"unexpected: {shards.describe(unexpected) or 'none'}\n"
            f"mismatched: {shards.describe(mismatched) or 'none'}",
            fix="give the config.json and the weights of one and the same checkpoint",
        )


def _native_config(config: Mapping[str, Any]) -> Any:
    from transformers import JinaEmbeddingsV3Config

    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    # The native config class ignores rotary_emb_base and would run at its own default of 20000;
    # the authors' class defaults to 10000 when the key is absent from an original checkpoint.
    original = config.get("model_type") != "jina_embeddings_v3"
    theta = theta or config.get("rotary_emb_base") or (10_000.0 if original else 20_000.0)
    _refuse_options(config)
    wanted = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size",
              "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    return JinaEmbeddingsV3Config(
        **{key: config[key] for key in wanted if key in config},
        rope_parameters={"rope_theta": float(theta), "rope_type": "default"},
    )


def _refuse_options(config: Mapping[str, Any]) -> None:
    """Options of the original code that the native class does not have."""
    neutral = {
        "rotary_emb_interleaved": (False, None),
        "rotary_emb_scale_base": (None,),
        "rotary_emb_dim": (None, int(config["hidden_size"]) // int(config["num_attention_heads"])),
        "pad_vocab_size_multiple": (1, None),
        "position_embedding_type": ("rotary", None),
        "emb_pooler": (None, "mean", "cls"),
    }
    odd = [key for key, allowed in neutral.items() if key in config and config[key] not in allowed]
    if odd:
        raise UnsupportedCheckpointError(
            "this variant of the original layout cannot run in transformers' native class",
            evidence=", ".join(f"{key} = {config[key]!r}" for key in odd),
            fix="build it through its own code with --trust-remote-code",
        )


def _skeleton(config: Mapping[str, Any]) -> torch.nn.Module:
    import torch
    from transformers import JinaEmbeddingsV3Model

    native = _native_config(config)
    with torch.device("meta"):
        return JinaEmbeddingsV3Model(native, add_pooling_layer=False).eval()


def assemble(config: Mapping[str, Any], weights: Mapping[str, WeightReader]) -> torch.nn.Module:
    """A float32 JinaEmbeddingsV3Model (no pooler) with the given weights, read one by one."""
    import torch

    model: Any = _skeleton(config)
    for name, tensor in list(model.named_parameters()):
        value = weights[name]()
        if value.shape != tensor.shape:
            raise StateDictError(
                f"weight '{name}' has another shape than the model",
                evidence=f"{list(value.shape)} instead of {list(tensor.shape)}",
                fix="give the config.json and the weights of one and the same checkpoint",
            )
        parent, _, leaf = name.rpartition(".")
        setattr(
            model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False)
        )
    native = model.config
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(native)
    positions = torch.arange(native.max_position_embeddings).expand((1, -1))
    model.embeddings.position_ids = positions
    model.embeddings.token_type_ids = torch.zeros_like(positions)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"still on the meta device: {left}"
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def reference(
    config: Mapping[str, Any],
    weights: Mapping[str, WeightReader],
    adapter: Mapping[str, LowRank],
) -> Iterator[Runner]:
    """The native model with the adapter beside its matrices, as PEFT runs it: nothing merged.

    Independent of the merge stage: a wrong merge, or another task's adapter in it, shows against
    this. Attention is sdpa, so 8,192 tokens fit in memory.
    """
    import torch

    model: Any = assemble(config, weights)
    for name, delta in adapter.items():
        module = name.removesuffix(".weight")
        if not module.startswith("pooler."):
            model.get_submodule(module).register_forward_hook(_beside(delta))

    def run(feed: Tensors) -> Tensors:
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(feed["input_ids"]),
                attention_mask=torch.from_numpy(feed["attention_mask"]),
            )
        return {"last_hidden_state": out.last_hidden_state.numpy()}

    yield run
    model.to("meta")


def _beside(delta: LowRank) -> Any:
    """A forward hook that adds the low-rank path to a Linear's or an Embedding's output."""
    import torch

    up, down = delta.up(), delta.down()

    def add(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, torch.nn.Embedding):
            low = torch.nn.functional.embedding(inputs[0], up) @ down
        else:
            low = (inputs[0] @ down.T) @ up.T
        return output + low * delta.scaling

    return add
