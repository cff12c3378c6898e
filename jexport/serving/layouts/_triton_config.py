"""An artifact's manifest -> the config.pbtxt that serves it in Triton, and its warm-up inputs.

Knows the fields of Triton's model_config.proto and what its onnxruntime and tensorrt backends do
with them; knows no folder. The text is written by hand so that packaging needs no protobuf; tests
parse it back with Triton's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jexport.errors import LayoutError
from jexport.serving.layouts import DEVICES, Wishes

BACKENDS = {"onnx": ("onnxruntime", "onnxruntime_onnx"), "trt": ("tensorrt", "tensorrt_plan")}
"""Backend and platform by target."""

TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
MASK = "attention_mask"
WARMUP = "warmup"
"""Triton reads the files that warm-up inputs name from this folder beside the versions."""

MAX_BATCH = {"cpu": 8, "gpu": 32}
"""Of onnx artifacts. Triton joins requests of equal length without looking at how long they are, so
this bounds memory; on a CPU a batch of 1,024 tokens is as fast as a larger one (DECISIONS.md)."""

QUEUE_DELAY_US = 1000
HEAD = "# Written by jexport; the SHA-256 of all below: "


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one TensorRT optimization profile takes.

    Args:
        batch: (min, opt, max) of texts.
        tokens: (min, opt, max) of tokens in each.
    """

    batch: tuple[int, int, int]
    tokens: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """One inference before the model counts as ready.

    Args:
        batch: how many texts.
        tokens: in each.
        padded: the last quarter is masked out.
    """

    batch: int
    tokens: int
    padded: bool = False

    def mask_file(self, dtype: str) -> str:
        """Name of the file with one row of the mask.

        Args:
            dtype: of the engine's input.

        Returns:
            The name, another one for each length, padding and type.
        """
        return f"{MASK}_{self.tokens}{'_padded' if self.padded else ''}_{dtype}"

    def mask(self, dtype: str) -> bytes:
        """One row of the mask; Triton repeats it for every text of the batch.

        Args:
            dtype: of the engine's input, as numpy names it.

        Returns:
            `tokens` numbers, little endian.
        """
        row = np.ones(self.tokens, dtype=np.dtype(dtype).newbyteorder("<"))
        if self.padded:
            row[self.tokens - self.tokens // 4 :] = 0
        return row.tobytes()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one artifact is served.

    Args:
        device: 'cpu' or 'gpu'.
        max_batch: the most texts that Triton joins.
        preferred: sizes at which a batch runs without waiting for more; empty for onnx.
        profiles: numbers of those that Triton opens; empty for onnx.
        warmups: run before the model counts as ready.
        notes: what the user should know of it.
    """

    device: str
    max_batch: int
    preferred: tuple[int, ...]
    profiles: tuple[int, ...]
    warmups: tuple[Warmup, ...]
    notes: tuple[str, ...] = ()


def plan(content: Mapping[str, Any], wishes: Wishes) -> Plan:
    """Decide how an artifact is served.

    Args:
        content: its manifest.
        wishes: what the user asks for.

    Returns:
        The decision.

    Raises:
        LayoutError: Triton could not serve it so.
        ValueError: the device is not one of DEVICES, or max_batch is below 0.
    """
    if wishes.device not in DEVICES or wishes.max_batch < 0:
        raise ValueError(f"{wishes}: device is one of {', '.join(DEVICES)}, max_batch 0 or more")
    return _plan_trt(content, wishes) if content["target"] == "trt" else _plan_onnx(content, wishes)


def _plan_onnx(content: Mapping[str, Any], wishes: Wishes) -> Plan:
    for_cuda = content["engine"]["facts"].get("cuda")
    options = for_cuda["provider_options"] if for_cuda else {}
    if for_cuda and (options or wishes.device == "cpu"):
        raise LayoutError(
            "an artifact that is made for CUDA cannot be served so by Triton",
            evidence=f"its backend has no place for: {', '.join(options)}"
            if options
            else "the CPU was asked for",
            fix="leave --device out, or build it without compile.cuda",
        )
    device = "gpu" if for_cuda or wishes.device == "gpu" else "cpu"
    largest = wishes.max_batch or MAX_BATCH[device]
    limit = content["embedding"]["max_tokens"]
    # A padded batch and one without padding take two branches of the graph.
    warmups = (
        Warmup(batch=1, tokens=min(32, limit)),
        Warmup(batch=largest, tokens=min(128, limit), padded=True),
    )
    oldest = content["engine"]["runs_on"].get("onnxruntime", "")
    note = f"Triton's onnxruntime must be {oldest}" if oldest else ""
    return Plan(
        device=device,
        max_batch=largest,
        preferred=(),
        profiles=(),
        warmups=warmups,
        notes=(note,) if note else (),
    )


def _plan_trt(content: Mapping[str, Any], wishes: Wishes) -> Plan:
    if wishes.device == "cpu":
        raise LayoutError(
            "a TensorRT engine cannot be served on the CPU",
            evidence=f"{content['name']}, {content['task']}: target trt",
            fix="leave --device out, or build with --target onnx",
        )
    profiles = profiles_of(content)
    safe = largest_batch(profiles)
    if wishes.max_batch > safe:
        raise LayoutError(
            f"the engine's profiles do not take batches of {wishes.max_batch}",
            evidence=f"every length that they take, they take in batches of up to {safe}",
            fix=f"ask for --max-batch {safe} or less, or build with larger profiles",
        )
    largest = wishes.max_batch or safe
    # The backend sets each profile to at most max_batch_size texts when it loads, and fails for one
    # that begins above.
    usable = [number for number, one in enumerate(profiles) if one.batch[0] <= largest]
    notes = []
    offered = max(one.batch[2] for one in profiles)
    if largest < offered:
        notes.append(
            f"batches of up to {largest}, though a profile takes {offered}: Triton joins requests "
            "by shape alone, and a batch that no profile takes fails"
        )
    return Plan(
        device="gpu",
        max_batch=largest,
        preferred=tuple(sorted({min(profiles[n].batch[1], largest) for n in usable} - {1})),
        profiles=tuple(usable),
        warmups=tuple(
            Warmup(batch=min(profiles[n].batch[1], largest), tokens=profiles[n].tokens[1])
            for n in usable
        ),
        notes=tuple(notes),
    )


def profiles_of(content: Mapping[str, Any]) -> list[Profile]:
    """The optimization profiles of a trt artifact.

    Args:
        content: its manifest.

    Returns:
        At least one, in the engine's order.

    Raises:
        LayoutError: the manifest has none, or not as [min, opt, max].
    """
    profiles = []
    stated = content["engine"]["facts"].get("profiles")
    for one in stated if isinstance(stated, list) else ():
        batch, tokens = (_rising(one, axis) for axis in ("batch", "tokens"))
        if not batch or not tokens:
            raise LayoutError(
                "the artifact's profiles cannot be read",
                evidence=f"{one!r:.120} is not a batch and tokens of [min, opt, max]",
                fix="build the engine again with this jexport",
            )
        profiles.append(Profile(batch=batch, tokens=tokens))
    if not profiles:
        raise LayoutError(
            f"{content['name']}, {content['task']}: the engine has no optimization profiles",
            evidence="the manifest's engine.facts.profiles is empty or missing",
            fix="build the engine again with this jexport",
        )
    return profiles


def _rising(profile: object, axis: str) -> tuple[int, int, int] | None:
    """(min, opt, max) of one axis, None when that is not what is there."""
    values = profile.get(axis) if isinstance(profile, dict) else None
    if not isinstance(values, list) or [type(n) for n in values] != [int, int, int]:
        return None
    low, best, high = values
    return (low, best, high) if 1 <= low <= best <= high else None


def largest_batch(profiles: Sequence[Profile]) -> int:
    """The largest N so that 1 to N texts of any length that a profile takes fit some profile.

    Triton's dynamic batching joins requests of one length up to max_batch_size and does not look at
    profiles; a batch between or above them fails with every request in it.

    Args:
        profiles: at least one.

    Returns:
        N, at least 1.

    Raises:
        LayoutError: a length is taken only in batches of several texts.
    """
    reaches = {}
    for start in {one.tokens[0] for one in profiles} | {one.tokens[2] + 1 for one in profiles}:
        ranges = sorted(
            (one.batch[0], one.batch[2])
            for one in profiles
            if one.tokens[0] <= start <= one.tokens[2]
        )
        reach = 0
        for low, high in ranges:
            reach = max(reach, high) if low <= reach + 1 else reach
        if ranges:
            reaches[start] = reach
    alone = min(reaches, key=lambda tokens: (reaches[tokens], tokens))
    if not reaches[alone]:
        raise LayoutError(
            f"no profile takes a single text of {alone} tokens",
            evidence="; ".join(f"batch {p.batch}, tokens {p.tokens}" for p in profiles),
            fix="build the engine with profiles whose smallest batch is 1",
        )
    return reaches[alone]


def text(name: str, content: Mapping[str, Any], plan: Plan, versions: Mapping[int, str]) -> str:
    """config.pbtxt, sealed.

    Args:
        name: the model's.
        content: manifest of the version that is served.
        plan: how.
        versions: what each version folder holds, by its number.

    Returns:
        The file's text.

    Raises:
        LayoutError: an input or output that Triton cannot batch.
    """
    engine = content["engine"]
    backend, platform = BACKENDS[content["target"]]
    body = [
        "# A changed config is never replaced. Each version folder is an artifact of jexport as it",
        "# was built: `jexport verify` checks it, examples/triton_client.py reads tokenizer and",
        "# prompt from it. Requests are joined when their lengths are equal: pad to a multiple.",
        f"name: {quoted(name)}",
        f"platform: {quoted(platform)}",
        f"backend: {quoted(backend)}",
        f"default_model_filename: {quoted(engine['files'][0])}",
        f"max_batch_size: {plan.max_batch}",
        "version_policy { latest { num_versions: 1 } }",
        *(f"input {_tensor(spec)}" for spec in engine["inputs"]),
        *(f"output {_tensor(spec)}" for spec in engine["outputs"]),
        *_batching(plan),
        *_instances(content["target"], plan),
        *(line for one in plan.warmups for line in _warmup(one, engine["inputs"])),
        *(_parameter(key, value) for key, value in _parameters(content, plan, versions)),
    ]
    return sealed("\n".join(body) + "\n")


def sealed(body: str) -> str:
    """A config with the line that tells whether anyone has changed it.

    Args:
        body: the config.

    Returns:
        That line, then the config.
    """
    return f"{HEAD}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def is_sealed(config: str) -> bool:
    """Whether a config is as jexport wrote it.

    Args:
        config: the file's text.

    Returns:
        False where anybody changed it, or wrote it by hand.
    """
    first, _, body = config.partition("\n")
    return first.startswith(HEAD) and sealed(body) == config


def quoted(value: str) -> str:
    """A string in protobuf's text format: UTF-8 bytes that are not plain ASCII in octal.

    Args:
        value: any text.

    Returns:
        The string with its quotes.
    """
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in value.encode())
    return f'"{"".join(plain)}"'


def _tensor(spec: Mapping[str, Any]) -> str:
    first, *rest = spec["shape"]
    if not isinstance(first, str) or spec["dtype"] not in TYPES or not rest:
        raise LayoutError(
            f"Triton cannot batch '{spec['name']}'",
            evidence=f"it is {spec['dtype']} {spec['shape']}; the first axis must be dynamic",
            fix="build the artifact again with this jexport",
        )
    dims = ", ".join(str(-1 if isinstance(size, str) else size) for size in rest)
    return f"{{ name: {quoted(spec['name'])} data_type: {TYPES[spec['dtype']]} dims: [ {dims} ] }}"


def _batching(plan: Plan) -> Iterable[str]:
    yield "dynamic_batching {"
    if plan.preferred:
        yield f"  preferred_batch_size: [ {', '.join(map(str, plan.preferred))} ]"
    yield f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}"
    yield "}"


def _instances(target: str, plan: Plan) -> Iterable[str]:
    profiles = ", ".join(f'"{number}"' for number in plan.profiles)
    listed = f" profile: [ {profiles} ]" if profiles else ""
    yield f"instance_group {{ count: 1 kind: KIND_{plan.device.upper()}{listed} }}"
    if target == "onnx" and plan.device == "cpu":
        # Extended optimizations fuse residual sums into a slower kernel, and the backend cannot
        # switch off that one alone: 8 x 128 MiniLM on two cores took 361 ms with all of them, 313
        # with the basic ones (int8: 226 and 188). The artifact brings its own fused operators.
        yield "optimization { graph { level: -1 } }"


def _warmup(one: Warmup, inputs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    shape = f"{one.batch} x {one.tokens}{', padded' if one.padded else ''}"
    yield f"model_warmup {{ name: {quoted(shape)} batch_size: {one.batch}"
    for spec in inputs:
        # Token id 0 is in every vocabulary; random_data would not be.
        source = "zero_data: true"
        if spec["name"] == MASK:
            source = f"input_data_file: {quoted(one.mask_file(spec['dtype']))}"
        kind = TYPES[spec["dtype"]]
        yield (
            f"  inputs {{ key: {quoted(spec['name'])} "
            f"value {{ data_type: {kind} dims: [ {one.tokens} ] {source} }} }}"
        )
    yield "}"


def _parameters(
    content: Mapping[str, Any], plan: Plan, versions: Mapping[int, str]
) -> Iterable[tuple[str, str]]:
    if content["target"] == "onnx":
        # 0 is every core: one instance with all of them, not one instance a core (DECISIONS.md).
        yield from (("intra_op_thread_count", "0"), ("inter_op_thread_count", "0"))
        yield "enable_mem_pattern", "0"  # lengths vary from batch to batch
    embedding = content["embedding"]
    yield "jexport.name", content["name"]
    yield "jexport.task", content["task"]
    yield "jexport.precision", content["precision"]
    yield "jexport.embedding_space", embedding["space"]
    yield "jexport.max_tokens", str(embedding["max_tokens"])
    if plan.profiles:
        every = profiles_of(content)
        used = [{"batch": every[n].batch, "tokens": every[n].tokens} for n in plan.profiles]
        yield "jexport.profiles", json.dumps(used)
    for number, held in sorted(versions.items()):
        yield f"jexport.version.{number}", held


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"
