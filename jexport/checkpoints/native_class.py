"""Both jina-embeddings-v3 layouts in transformers' native class: names, shapes, assembly, forward.

Name map: transformers 5.23 conversion_mapping.py["jina_embeddings_v3"]. The native model is built
on the meta device and given its weights one by one; its non-persistent buffers are made again on
the CPU, because a meta buffer holds no numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.checkpoints.native_config import native_config
from jexport.checkpoints.transformer_files import count, quiet_transformers
from jexport.errors import AdapterError, CheckpointError, StateDictError
from jexport.types import LowRank, WeightReader

if TYPE_CHECKING:
    import torch

LAYER_NAMES = {
    "mixer.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}
LAYER = re.compile(r"(?:encoder\.)?layers\.(\d+)\.(.+)")
FUSED = "mixer.Wqkv"
POOLER = "pooler.dense"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A matrix that carries a LoRA, in both layouts.

    Args:
        original: its module's name in the original layout, without `roberta.`.
        shape: of the original matrix, (rows, columns).
        embedding: whether it is an Embedding's; else a Linear's.
        parts: (native weight name, row range or None); Wqkv has three, every other matrix one.
    """

    original: str
    shape: tuple[int, int]
    embedding: bool
    parts: tuple[tuple[str, tuple[int, int] | None], ...]


def adapted_matrices(config: Mapping[str, Any], *, pooler: bool) -> list[Adapted]:
    """Every Linear and Embedding of the model: each has a LoRA, also the pooler where there is one.

    The pooler is never run, but an adapter without its part was not saved whole.

    Args:
        config: config.json of either layout; its sizes decide.
        pooler: whether there is one.

    Returns:
        In the model's order, embeddings first.

    Raises:
        CheckpointError: a size is missing, or no whole number above 0.
    """
    hidden, inner = count(config, "hidden_size"), count(config, "intermediate_size")

    def one(original: str, rows: int, columns: int, *, embedding: bool = False) -> Adapted:
        part = (f"{native_module(original)}.weight", None)
        return Adapted(original=original, shape=(rows, columns), embedding=embedding, parts=(part,))

    types = count(config, "type_vocab_size", 1)
    matrices = [
        one("embeddings.word_embeddings", count(config, "vocab_size"), hidden, embedding=True),
        one("embeddings.token_type_embeddings", types, hidden, embedding=True),
    ]
    for layer in range(count(config, "num_hidden_layers")):
        name = f"encoder.layers.{layer}"
        parts = tuple((f"{module}.weight", rows) for module, rows in _thirds(layer, hidden))
        fused, shape = f"{name}.{FUSED}", (3 * hidden, hidden)
        matrices.append(Adapted(original=fused, shape=shape, embedding=False, parts=parts))
        matrices.append(one(f"{name}.mixer.out_proj", hidden, hidden))
        matrices.append(one(f"{name}.mlp.fc1", inner, hidden))
        matrices.append(one(f"{name}.mlp.fc2", hidden, inner))
    if pooler:
        matrices.append(one(POOLER, hidden, hidden))
    return matrices


def _thirds(layer: int | str, hidden: int) -> list[tuple[str, tuple[int, int]]]:
    """The native modules in a fused Wqkv, each with its rows of it."""
    return [
        (f"layers.{layer}.self_attn.{letter}_proj", (n * hidden, (n + 1) * hidden))
        for n, letter in enumerate("qkv")
    ]


def native_module(name: str) -> str:
    """The native name of an original module (`Wqkv` apart); native names stay as they are.

    Args:
        name: of a module, without `roberta.` and `.weight`.

    Returns:
        Such as `layers.0.self_attn.o_proj` for `encoder.layers.0.mixer.out_proj`.
    """
    if name == "emb_ln":
        return "embeddings.LayerNorm"
    layer = LAYER.fullmatch(name)
    if layer is None:
        return name
    number, rest = layer.groups()
    return f"layers.{number}.{LAYER_NAMES.get(rest, rest)}"


def listed_tasks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The adapters that config.json lists, in the order of their index.

    Args:
        config: of either layout.

    Returns:
        `lora_adaptations`, () without it.

    Raises:
        CheckpointError: it is no list, or has a name twice.
    """
    listed = config.get("lora_adaptations")
    names = () if listed is None else listed
    if not isinstance(names, list | tuple) or len({str(name) for name in names}) != len(names):
        raise CheckpointError(
            "config.json does not list the adapters",
            evidence=f"lora_adaptations = {listed!r}",
            fix="give the config.json that belongs to these weights",
        )
    return tuple(str(name) for name in names)


def scaling(alpha: Any, rank: int, *, where: str) -> float:
    """What a LoRA delta is multiplied by.

    Args:
        alpha: `lora_alpha` as a config has it, which may be anything.
        rank: at least 1.
        where: the file that has them, for the message.

    Returns:
        alpha / rank.

    Raises:
        AdapterError: alpha is no finite number.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(
            "the adapter does not say how it is scaled",
            evidence=f"{where}: lora_alpha = {alpha!r}",
            fix="give a checkpoint whose adapters were saved whole",
        )
    return float(alpha) / rank


def one_each(
    named: Iterable[tuple[str, str]], expected: Iterable[str], *, what: str
) -> dict[str, str]:
    """Hold an adapter's factors against those that the model's matrices need.

    Args:
        named: factor and its name in the file.
        expected: every factor that has to be there, once; no other may be.
        what: the factors are, for the message.

    Returns:
        Name in the file by factor.

    Raises:
        AdapterError: a factor is missing, twice there or not expected.
    """
    factors: dict[str, str] = {}
    odd: set[str] = set()
    needed = set(expected)
    for factor, name in named:
        if factor in factors or factor not in needed:
            odd |= {name, factors.get(factor, name)}
        factors.setdefault(factor, name)
    missing = needed - set(factors)
    if missing or odd:
        raise AdapterError(
            f"{what} do not cover the model's matrices one by one",
            evidence=f"missing: {shards.describe(missing) or 'none'}\n"
            f"not expected: {shards.describe(odd) or 'none'}",
            fix="give a checkpoint whose adapters were saved whole",
        )
    return factors


def check_factor(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], *, what: str
) -> None:
    """Refuse a LoRA factor of another shape than rank and matrix ask for.

    Args:
        name: of the factor in the file.
        shape: that it has.
        expected: that it should have.
        what: says the rank, for the message.

    Raises:
        AdapterError: the two shapes differ.
    """
    if shape != expected:
        raise AdapterError(
            f"adapter matrix '{name}' has another shape or rank",
            evidence=f"it is {list(shape)}; {what} and the base model ask for {list(expected)}",
            fix="give the adapter that was trained on this base model",
        )


def native_weights(
    names: Iterable[tuple[str, str]],
    entries: Mapping[str, shards.Entry],
    config: Mapping[str, Any],
    *,
    pooler: bool,
) -> dict[str, WeightReader]:
    """Readers under native names for every weight of the model, the pooler's too if it has one.

    No embedding depends on the pooler and `assemble` never reads it: it is there for a target that
    writes the whole checkpoint again.

    Args:
        names: plain weight name ('...weight', '...bias') and name in the file.
        entries: of the files, by name in the file.
        config: config.json of either layout.
        pooler: whether the file has one, which then has to be whole.

    Returns:
        By native name; a fused Wqkv is read in three parts.

    Raises:
        StateDictError: a weight is missing, unexpected, twice there or of another shape.
        CheckpointError: a tensor's dtype holds no weights, or config.json is wrong.
    """
    hidden = count(config, "hidden_size")
    readers: dict[str, WeightReader] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    twice: list[str] = []
    for plain, raw in names:
        module, _, kind = plain.removeprefix("roberta.").rpartition(".")
        layer, shape = LAYER.fullmatch(module), entries[raw].shape
        parts: list[tuple[str, tuple[int, int] | None]] = [(native_module(module), None)]
        if layer is not None and layer[2] == FUSED:
            _check_shapes({raw: shape[:1]}, {raw: (3 * hidden,)})
            parts, shape = [*_thirds(layer[1], hidden)], (hidden, *shape[1:])
        for native, rows in parts:
            name = f"{native}.{kind}"
            twice += [raw] if name in readers else []
            readers[name] = shards.reader(raw, entries[raw], rows=rows)
            shapes[name] = shape
    expected = {name: tuple(t.shape) for name, t in _skeleton(config).state_dict().items()}
    if pooler:
        expected |= {f"{POOLER}.weight": (hidden, hidden), f"{POOLER}.bias": (hidden,)}
    _check_shapes(shapes, expected, twice)
    return readers


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    twice: Iterable[str] = (),
) -> None:
    missing, unexpected = set(expected) - set(shapes), {*(set(shapes) - set(expected)), *twice}
    mismatched = [
        f"{name} {list(shapes[name])} instead of {list(expected[name])}"
        for name in sorted(set(shapes) & set(expected))
        if shapes[name] != expected[name]
    ]
    if missing or unexpected or mismatched:
        raise mismatch(missing, unexpected, mismatched)


def mismatch(
    missing: Iterable[str] = (), unexpected: Iterable[str] = (), mismatched: Iterable[str] = ()
) -> StateDictError:
    """The error for a state dict that is not the model's.

    Args:
        missing: names that the model needs and the file lacks.
        unexpected: names that the model does not have.
        mismatched: names of another shape, which may say both shapes.

    Returns:
        To be raised; it has the first few names of each kind.
    """
    return StateDictError(
        "the checkpoint's weights are not those of its config.json",
        evidence=f"missing: {shards.describe(missing) or 'none'}\n"
        f"unexpected: {shards.describe(unexpected) or 'none'}\n"
        f"mismatched: {shards.describe(mismatched) or 'none'}",
        fix="give the config.json and the weights of one and the same checkpoint",
    )


def _skeleton(config: Mapping[str, Any]) -> torch.nn.Module:
    import torch
    from transformers import JinaEmbeddingsV3Model

    native = native_config(config)
    with torch.device("meta"), quiet_transformers():
        model: torch.nn.Module = JinaEmbeddingsV3Model(native, add_pooling_layer=False).eval()
    return model


def assemble(config: Mapping[str, Any], weights: Mapping[str, WeightReader]) -> torch.nn.Module:
    """A model of transformers' native class with the given weights, read one by one.

    Args:
        config: config.json of either layout.
        weights: by native name; those beside the model's parameters (the pooler's) stay unread.

    Returns:
        A float32 JinaEmbeddingsV3Model without pooler, on the CPU, in eval mode.

    Raises:
        StateDictError: a weight has another shape than the model.
        CheckpointError, NotFiniteError: a weight cannot be read, or holds a NaN or an infinity.
    """
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
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    native = model.config
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(native)
    positions = torch.arange(native.max_position_embeddings).expand((1, -1))
    model.embeddings.position_ids = positions
    model.embeddings.token_type_ids = torch.zeros_like(positions)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"still on the meta device: {left}"
    return model  # type: ignore[no-any-return]


def beside(delta: LowRank) -> Any:
    """A forward hook that adds the low-rank path to a Linear's or an Embedding's output.

    Args:
        delta: whose factors are read now, and kept as long as the hook.

    Returns:
        For `register_forward_hook`.
    """
    import torch

    up, down = delta.up(), delta.down()

    def add(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if isinstance(module, torch.nn.Embedding):
            low = torch.nn.functional.embedding(inputs[0], up) @ down
        else:
            low = (inputs[0] @ down.T) @ up.T
        summed: torch.Tensor = output + low * delta.scaling
        return summed

    return add
