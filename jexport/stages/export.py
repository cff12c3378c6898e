"""export: LoadedModel (merged) -> OnnxModel (standard ONNX that every engine can read).

Uses torch.onnx's dynamo exporter with dynamic batch and sequence, tidies the graph, and writes it
with its weights in one external-data file. Knows no engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import file_digest, sha256_of
from jexport.errors import (
    DimensionError,
    JexportError,
    RecipeError,
    UnsupportedCheckpointError,
    UnsupportedGraphError,
)
from jexport.recipe import ExportSpec
from jexport.types import LoadedModel, OnnxModel, Signature, TensorSpec

GRAPH = "model.onnx"
WEIGHTS = "model.onnx_data"
AXES = ("batch", "sequence")


def run(
    model: LoadedModel,
    spec: ExportSpec,
    *,
    precision: str,
    samples: Sequence[Sequence[int]],
    out_dir: Path,
    will_be_half: bool = False,
) -> OnnxModel:
    """Write out_dir/model.onnx and model.onnx_data.

    Args:
        model: a checkpoint with nothing left to merge.
        spec: [export] of the recipe.
        precision: 'fp32' or 'fp16'.
        samples: token ids of a few texts, whose activations are checked against float16's range
            before anything is converted to it.
        out_dir: takes the graph and its weights.
        will_be_half: the graph becomes float16 later (`in_half`): check the activations now.

    Returns:
        The graph: input_ids and attention_mask int64 [batch, sequence]; last_hidden_state float32
        [batch, sequence, dimension], sentence_embedding float32 [batch, dimension].

    Raises:
        DimensionError: spec.dimension is not a size of this model.
        OverflowRangeError: an activation does not fit float16.
        UnsupportedGraphError: the model cannot be traced.
        RecipeError: another precision.
        JexportError: what reading the weights raises (NotFiniteError, StateDictError, ...).
    """
    from jexport.graph import half, overflow, storage, tidy

    if precision not in ("fp32", "fp16"):
        raise RecipeError(
            f"export does not write {precision}",
            evidence="export writes fp32 and fp16; int8 is made from fp32 by quantize",
            fix="use --precision fp32 or fp16",
        )
    check_dimension(spec, model)
    spec = dataclasses.replace(spec, outputs=outputs_of(model, spec))
    encoder = _encoder(model, spec)
    keep_fp32 = half.Keep(spec.keep_fp32)
    if precision == "fp16" or will_be_half:
        overflow.check_texts(encoder, samples, keep_fp32)
    program = _trace(encoder, spec, model.embedding.max_tokens)
    graph = program.model
    _check_free(graph, type(encoder.model).__name__)
    tidy.tidy(graph)
    tidy.check(graph, allow_odd=not encoder.additive_mask)
    if precision == "fp16":
        half.to_float16(graph, keep_fp32)
    signature = _declare(graph, spec, model)
    storage.save(graph, out_dir / GRAPH)
    _release(program, encoder)
    del program, graph, encoder
    return _described(model, spec, signature, precision, out_dir)


def _described(
    model: LoadedModel, spec: ExportSpec, signature: Signature, precision: str, out_dir: Path
) -> OnnxModel:
    """The graph in out_dir, with its digest."""
    import onnx_ir as ir

    digests = {name: file_digest(out_dir / name, root=out_dir).sha256 for name in (GRAPH, WEIGHTS)}
    assert ir.load(out_dir / GRAPH).opset_imports[""] == spec.opset
    return OnnxModel(
        path=out_dir / GRAPH,
        signature=signature,
        precision=precision,
        opset=spec.opset,
        sha256=sha256_of(digests),
        max_tokens=model.embedding.forward_tokens,
        # A graph does not know where a prompt ends.
        pooling="" if model.head or not model.embedding.include_prompt else model.embedding.pooling,
        normalize=model.embedding.normalize,
    )


def _encoder(model: LoadedModel, spec: ExportSpec) -> Any:
    """The checkpoint's module as it is traced, once it gives the module's own hidden states.

    Where the simplified form does not (a causal mask taken for a bidirectional one, say), the
    module is read again and traced as it is. Raises UnsupportedGraphError.
    """
    from jexport.graph import head, probe, traceable

    def wrapped(module: Any, *, simplified: bool) -> Any:
        return traceable.Encoder(
            module, embedding, spec.outputs, spec.dimension, after=after, simplified=simplified
        ).eval()

    embedding = model.embedding
    after = head.Head(model.head) if model.head else None
    module = _assembled(model)
    texts = probe.of(module, max_tokens=embedding.forward_tokens)
    own = probe.own_states(module, texts)
    encoder = wrapped(module, simplified=True)
    if not probe.agrees(encoder, texts, own):
        encoder = wrapped(_assembled(model), simplified=False)
        if not probe.agrees(encoder, texts, own):
            raise probe.not_itself(encoder, texts, own)
    return encoder


def _assembled(model: LoadedModel) -> Any:
    """The checkpoint's module; what its own code raises becomes an error that names it."""
    from jexport.graph import trace_errors

    try:
        return model.assemble(model.weights)
    except JexportError:
        raise
    except Exception as error:
        if trace_errors.is_the_machines(error):
            raise
        kind = model.config.get("model_type")
        raise trace_errors.unsupported(
            error, None, what=f"the model (model_type {kind!r}) cannot be made from its config.json"
        ) from error


def in_half(model: OnnxModel, spec: ExportSpec, out_dir: Path) -> OnnxModel:
    """The same graph, its float32 operators in float16 where half.py allows.

    Activations are not measured here: `run` has checked them, or the graph is only timed.

    Args:
        model: a float32 or int8 graph.
        spec: [export] of the recipe: which layers keep float32.
        out_dir: takes the graph and its weights.

    Returns:
        The graph in out_dir; its precision and signature are still those of `model`.
    """
    import onnx_ir as ir

    from jexport.graph import half, storage

    graph = ir.load(model.path)
    half.to_float16(graph, half.Keep(spec.keep_fp32))
    storage.save(graph, out_dir / GRAPH)
    digests = {name: file_digest(out_dir / name, root=out_dir).sha256 for name in (GRAPH, WEIGHTS)}
    return dataclasses.replace(model, path=out_dir / GRAPH, sha256=sha256_of(digests))


def outputs_of(model: LoadedModel, spec: ExportSpec) -> tuple[str, ...]:
    """What the model's graph gives: where modules follow its pooling, text vectors and no others.

    A server that finds token vectors would pool them, and leave these modules out.

    Args:
        model: the opened checkpoint.
        spec: [export] of the recipe.

    Returns:
        `spec.outputs`, or ('sentence_embedding',).
    """
    return ("sentence_embedding",) if model.head else spec.outputs


def check_dimension(spec: ExportSpec, model: LoadedModel) -> None:
    """Refuse what a graph of this model cannot give.

    Args:
        spec: [export] of the recipe.
        model: the opened checkpoint.

    Raises:
        DimensionError: the model was not trained to be cut to spec.dimension.
        UnsupportedCheckpointError: the graph is to pool and cannot: it does not know where a prompt
            ends.
    """
    if "sentence_embedding" in outputs_of(model, spec) and not model.embedding.include_prompt:
        raise UnsupportedCheckpointError(
            "this model leaves its prompt out of the pooling, which a graph cannot do",
            evidence="its Pooling has include_prompt = false; export.outputs has "
            "sentence_embedding",
            fix='set export.outputs = ["last_hidden_state"] in the recipe',
        )
    sizes = (*model.embedding.matryoshka, model.embedding.dimension)
    if spec.dimension and spec.dimension not in sizes:
        raise DimensionError(
            f"export.dimension = {spec.dimension} is not a size of this model",
            evidence=f"its sizes: {', '.join(str(s) for s in sizes)}",
            fix="choose one of them, or 0 for the full size",
        )


def as_shipped(model: LoadedModel, spec: ExportSpec) -> LoadedModel:
    """The model as its graph shows it: one that gives cut vectors only has their size.

    Args:
        model: the opened checkpoint.
        spec: [export] of the recipe.

    Returns:
        The model itself where nothing is cut, or token vectors are given too.
    """
    size = spec.dimension
    if not size or "last_hidden_state" in outputs_of(model, spec):
        return model
    embedding = dataclasses.replace(
        model.embedding,
        dimension=size,
        matryoshka=tuple(d for d in model.embedding.matryoshka if d <= size),
    )
    return dataclasses.replace(model, embedding=embedding)


def _release(program: Any, module: Any) -> None:
    """Free the weights themselves: torch's tracer keeps its nodes, and they keep tensors, for good.

    At full size 2.3 GB stayed resident after every name of ours was gone.
    """
    for node in program.exported_program.graph.nodes:
        node.meta.clear()
    for tensor in (*module.parameters(), *module.buffers()):
        try:
            tensor.untyped_storage().resize_(0)
        except RuntimeError:  # memory that numpy has seen, or a map: let go of it instead
            tensor.data = tensor.new_empty(0)


def _trace(encoder: Any, spec: ExportSpec, max_tokens: int) -> Any:
    """Torch's ONNX program. Raises UnsupportedGraphError for whatever the exporter raises."""
    from jexport.graph import trace_errors

    try:
        return _export(encoder, spec, max_tokens)
    except JexportError:
        raise
    except Exception as error:  # torch, its exporter and a model's code raise what they like
        if trace_errors.is_the_machines(error):
            raise
        raise trace_errors.unsupported(error, encoder) from error


def _export(encoder: Any, spec: ExportSpec, max_tokens: int) -> Any:
    import torch

    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    ids = torch.full((2, min(16, max_tokens)), 4, dtype=torch.int64)
    names = ("input_ids", "attention_mask")
    with _quiet(), torch.no_grad():
        return torch.onnx.export(
            encoder,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            opset_version=spec.opset,
            input_names=names,
            output_names=spec.outputs,
            dynamic_shapes={name: {0: batch, 1: sequence} for name in names},
            optimize=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings are about its internals (torchvision, axis names)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_free(graph: Any, name: str) -> None:
    """Refuse a graph that takes one batch size or length only: the trace made it a constant."""
    from jexport.graph import trace_errors

    fixed = [
        f"{value.name}: {AXES[axis]} is {size}"
        for value in graph.graph.inputs
        for axis, size in enumerate(value.shape or ())
        if isinstance(size, int)
    ]
    if fixed:
        raise UnsupportedGraphError(
            f"{name} cannot be exported as a graph",
            evidence="torch's trace holds for the traced shape only; " + ", ".join(fixed),
            fix=trace_errors.FIX,
        )


def _declare(graph: Any, spec: ExportSpec, model: LoadedModel) -> Signature:
    """Name the axes of inputs and outputs in the graph and say them in a Signature."""
    import onnx_ir as ir

    width = model.embedding.dimension
    shapes: dict[str, tuple[int | str, ...]] = {
        "last_hidden_state": ("batch", "sequence", width),
        "sentence_embedding": ("batch", spec.dimension or width),
    }
    inputs = tuple(
        TensorSpec(name=str(value.name), dtype="int64", shape=("batch", "sequence"))
        for value in graph.graph.inputs
    )
    assert [s.name for s in inputs] == ["input_ids", "attention_mask"], inputs
    assert [str(v.name) for v in graph.graph.outputs] == list(spec.outputs)
    for value in graph.graph.outputs:
        value.shape = ir.Shape(shapes[str(value.name)])
        assert value.dtype == ir.DataType.FLOAT, f"{value.name} is {value.dtype}"
    graph.producer_name, graph.producer_version = "jexport", ""
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=shapes[name]) for name in spec.outputs
    )
    return Signature(inputs=inputs, outputs=outputs)
