"""TOML -> frozen Recipe. Unknown keys are refused; every default of jexport lives here.

A recipe says where a model comes from, its tasks, targets, gates. Each table is named after the
stage that reads it. This module knows no framework and opens no checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jexport.errors import RecipeError, nearest
from jexport.gates import GATES, LEAST_EDGE_COSINE
from jexport.recipe_schema import plain, read_table
from jexport.redact import hidden
from jexport.tasks import NONE

DEFAULT_RECIPE = "jina-embeddings-v3"
NAME_CHARACTERS = 60
"""Longest name or version: folders are named after them, and 255 bytes is a file system's limit."""

NAME_RULE = f"up to {NAME_CHARACTERS} letters, digits, '.', '-' and '_', and no '.' first"
COMMIT_RULE = "a commit of 40 hex digits, or '' for the newest"

OUTPUTS = ("last_hidden_state", "sentence_embedding")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "int8-weights")
"""Those that a recipe may have gates for; which of them an engine takes, its target says."""

INT8_PRECISIONS = ("int8", "int8-weights")
"""Those that quantize makes, by calibration."""

EFFORTS = ("fast", "full")
GOALS = ("cosine_mean", "cosine_p1", "top10_overlap", "max_share")
"""Keys of [quantize] that [quantize.symmetric] may set, too."""

CUDA_STEPS = (
    "half_rotary",
    "half_residual",
    "skip_layer_norm",
    "fast_gelu",
    "split_projection",
    "packed_attention",
    "efficient_attention",
)
"""What compile.cuda may list, with 'all' for every one but packed_attention, which can be listed
beside it: it rules CUDA graphs out. graph/cuda_steps.py does them."""

HARDWARE_COMPATIBLE = ("", "same_compute_capability", "ampere_plus")
"""On which other GPUs a TensorRT engine must run: none, those of its own kind, Ampere and newer."""

OPSETS = range(18, 24)
"""18 is the lowest the exporter writes; from 20 on Gelu is one node; 23 is the newest all take."""

DEFAULT_GATES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": MappingProxyType(
            {"cosine_min": 0.99999, "batch_cosine_min": 0.99999, "largest_difference": 1e-4}
        ),
        # float32 but for the products' factors, which a GPU rounds to TF32's 10 bits, as many as
        # float16 has: 0.999997 was the lowest cosine on an H200. A CPU computes it as fp32.
        "tf32": MappingProxyType({"cosine_min": 0.9999, "batch_cosine_min": 0.9999}),
        "fp16": MappingProxyType({"cosine_min": 0.999, "batch_cosine_min": 0.999}),
        # Arithmetic in bfloat16, not the weights: DECISIONS.md has the numbers.
        "bf16": MappingProxyType(
            {"cosine_min": 0.998, "cosine_mean": 0.999, "batch_cosine_min": 0.998}
        ),
        "int8": MappingProxyType(
            {
                "cosine_min": 0.95,
                "edge_cosine_min": LEAST_EDGE_COSINE,
                "cosine_mean": 0.996,
                "cosine_p1": 0.99,
                "top10_overlap": 0.92,
                "group_loss": 0.004,
                "batch_cosine_min": 0.999999,
            }
        ),
        "int8-weights": MappingProxyType({"cosine_min": 0.999, "batch_cosine_min": 0.999999}),
    }
)


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """[load]: which checkpoint, and what to believe where its own files are silent.

    Args:
        model: a folder, or an id on the Hugging Face Hub.
        revision: commit on the hub, 40 hex digits; '' takes the newest and records it (not allowed
            with remote code).
        trust_remote_code: whether code of the checkpoint may run.
        code_revision: commit of a repository that the code comes from, as `revision`.
        max_tokens: longest text, special tokens included; 0 takes the checkpoint's limit.
        licence: SPDX id; '' takes the checkpoint's.
        prompts: prompt by task, instead of the checkpoint's; by another name, beside them.
        use: which prompt, or route of a Router, an artifact is built for: 'query', 'document', the
            name of another; '' for the checkpoint's default.
    """

    model: str = ""
    revision: str = ""
    trust_remote_code: bool = False
    code_revision: str = ""
    max_tokens: int = 0
    licence: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    use: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """[model]: what `jexport recipe list` says of a model; it decides nothing.

    Args:
        parameters: how many weights it has; 0 where the recipe does not say.
        dimension: size of its vectors; 0 where the recipe does not say.
        languages: codes of ISO 639-1, or 'multilingual'.
    """

    parameters: int = 0
    dimension: int = 0
    languages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """[export]: the graph that is written.

    Args:
        opset: of standard ONNX, one of OPSETS.
        outputs: 'last_hidden_state' (a vector a token), 'sentence_embedding' (one a text) or both.
        dimension: Matryoshka size of `sentence_embedding`, 0 for the full size.
        keep_fp32: parts of names of modules that stay float32 in an fp16 graph (such as
            'layers.3.mlp.fc2').
    """

    opset: int = 20
    outputs: tuple[str, ...] = ("last_hidden_state",)
    dimension: int = 0
    keep_fp32: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """[quantize]: how int8 is calibrated, and what it must reach.

    Args:
        calibration: a set in calibration_data/, a folder, or a .jsonl or .txt file.
        samples: how many of its texts.
        max_tokens: each is cut to so many tokens.
        smoothing: SmoothQuant's strength, 0 to 1.
        clip: share of the range that is kept of the second MLP matrix's input, above 0, up to 1.
        effort: 'fast', or 'full' (other strengths and clips, and the whole curve).
        cosine_mean: mean cosine that held-out texts must reach (each group of them reaches the
            gates of [validate], too).
        cosine_p1: cosine that 99 % of them must reach.
        top10_overlap: share of each text's ten nearest neighbours that must stay, 0 to 1.
        max_share: share of the linear layers' multiply-adds that may be at higher precision for it.
        pair_top10_overlap: share of the ten nearest passages of float queries that int8 queries
            must find.
        allow_slower: keep an int8 artifact that is not faster than the best float one.
        symmetric: goals that hold instead for engines that take the symmetric scheme only (trt),
            which loses more; keys: GOALS.
    """

    calibration: str = "everyday"
    samples: int = 1024
    max_tokens: int = 512
    smoothing: float = 0.85
    clip: float = 1.0
    effort: str = "fast"
    cosine_mean: float = 0.996
    cosine_p1: float = 0.99
    top10_overlap: float = 0.92
    max_share: float = 0.15
    pair_top10_overlap: float = 0.92
    allow_slower: bool = False
    symmetric: Mapping[str, float] = field(default_factory=dict)

    def goal(self, name: str, scheme: str) -> float:
        """A goal under a scheme.

        Args:
            name: one of GOALS.
            scheme: of the activations, one of quantization.quant_params.SCHEMES.

        Returns:
            What `symmetric` says of it under the symmetric scheme, else the key of that name.
        """
        own: float = getattr(self, name)
        return self.symmetric.get(name, own) if scheme == "symmetric" else own


@dataclass(frozen=True, kw_only=True)
class ProfileSpec:
    """One entry of compile.profiles: the shapes that TensorRT optimizes an engine for.

    Args:
        batch: texts of a batch: smallest, usual, largest.
        tokens: length of its longest text: smallest, usual, largest.
    """

    batch: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CompileSpec:
    """[compile]: the engine; from `profiles` on for TensorRT only.

    Args:
        fuse: replace standard operators by the engine's own, faster ones.
        skip_layer_norm: fuse residual sums into their LayerNormalization as well. onnxruntime's CPU
            kernel for it is slower than the two operators, so it is off; its CUDA kernel may not
            be.
        cuda: graph steps for CUDA alone (CUDA_STEPS, or 'all'), for the target onnx; none for a
            graph that runs anywhere. With any the artifact is built, validated and run on CUDA
            only.
        profiles: none for those that fit the model's length limit.
        timing_cache: a folder that keeps kernel timings between builds, '' for none.
        hardware_compatible: GPUs that the engine must run on, one of HARDWARE_COMPATIBLE.
        version_compatible: run with later TensorRT versions of the same major.
        workspace_gib: most scratch memory a kernel may use, in GiB; 0 for all there is.
        weight_stripped: keep the engine without its weights as well.
        refit_from: folder of an artifact that has such an engine, of another task, to be given this
            one's weights instead of building.
    """

    fuse: bool = True
    skip_layer_norm: bool = False
    cuda: tuple[str, ...] = ()
    profiles: tuple[ProfileSpec, ...] = ()
    timing_cache: str = ""
    hardware_compatible: str = ""
    version_compatible: bool = False
    workspace_gib: float = 0.0
    weight_stripped: bool = False
    refit_from: str = ""


@dataclass(frozen=True, kw_only=True)
class ValidateSpec:
    """[validate]: the texts that an artifact is compared on, and what it must reach.

    Args:
        texts: a set in calibration_data/.
        budget_tokens: how many tokens one pass over the texts may cost (every language stays in).
        max_tokens: longest text compared; attention costs its square.
        gates: bounds by precision and gate, see gates.GATES.
    """

    texts: str = "parity"
    budget_tokens: int = 8_192
    max_tokens: int = 2_048
    gates: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: DEFAULT_GATES)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a build needs to know besides the task, target and precision asked for.

    Args:
        name: of the model, and of its folder of artifacts.
        version: of the artifacts; a digest of what went in is put behind it.
        tasks: those that it ships; empty allows every one that there is.
        uses: names of prompts that a text may be embedded with, such as 'query' and 'document'.
        targets: those that it ships; empty allows every one.
        precisions: those that it ships; empty allows every one of the target.
        model: what is known of it without opening it.
        load: the checkpoint.
        export: the graph.
        quantize: int8.
        compile: the engine.
        validate: the comparison.

    Raises:
        RecipeError: it holds a password or a token.
    """

    name: str
    version: str = "0.1.0"
    tasks: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    model: ModelSpec = field(default_factory=ModelSpec)
    load: LoadSpec = field(default_factory=LoadSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    quantize: QuantizeSpec = field(default_factory=QuantizeSpec)
    compile: CompileSpec = field(default_factory=CompileSpec)
    validate: ValidateSpec = field(default_factory=ValidateSpec)

    def __post_init__(self) -> None:
        """Refuse a recipe that holds a secret: every key of it goes into manifests and reports."""
        for key, text in _texts(plain(self)):
            if hidden(text) != text:
                raise RecipeError(
                    f"recipe key '{key}' holds a password or a token",
                    evidence=text,
                    fix="take it out of the recipe; a hub's token belongs into the environment "
                    "(HF_TOKEN) or where `hf auth login` puts it",
                )

    def replace_load(self, **changes: Any) -> Recipe:
        """The same recipe with other [load] values.

        Args:
            changes: keys of [load] and their values.

        Returns:
            A new recipe; this one stays as it is.
        """
        return dataclasses.replace(self, load=dataclasses.replace(self.load, **changes))

    def replace_quantize(self, **changes: Any) -> Recipe:
        """The same recipe with other [quantize] values.

        Args:
            changes: keys of [quantize] and their values.

        Returns:
            A new recipe; this one stays as it is.
        """
        return dataclasses.replace(self, quantize=dataclasses.replace(self.quantize, **changes))

    def replace_compile(self, **changes: Any) -> Recipe:
        """The same recipe with other [compile] values.

        Args:
            changes: keys of [compile] and their values.

        Returns:
            A new recipe; this one stays as it is.
        """
        return dataclasses.replace(self, compile=dataclasses.replace(self.compile, **changes))

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included.

        Returns:
            JSON-ready tables by name.
        """
        tables: dict[str, Any] = plain(self)
        return tables


def recipe_folder() -> Path:
    """Where the shipped recipes are: beside the package in a checkout, inside it when installed.

    Returns:
        A folder of .toml files.
    """
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes.

    Returns:
        Sorted; `read` takes each.
    """
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def read(name_or_file: str) -> Recipe:
    """Read a recipe.

    Args:
        name_or_file: name of a shipped recipe, or the path of a .toml file.

    Returns:
        The recipe, its values checked.

    Raises:
        RecipeError: there is none of that name, it is not TOML, a key is unknown, or a value cannot
            be used.
    """
    path = Path(name_or_file)
    if name_or_file in names():
        path = recipe_folder() / f"{name_or_file}.toml"
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(
            f"no recipe '{name_or_file:.80}'",
            evidence=f"there is no shipped recipe of that name, nor a file: {error.strerror}",
            fix=_nearest(name_or_file) + "; or give the path of a .toml file",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"recipe {path.name} is not valid TOML", evidence=str(error), fix="mend that line"
        ) from error
    return from_table(table, origin=path.name)


def _nearest(name: str) -> str:
    """A hint for the name of a recipe, in whatever case, with or without the owner on the hub."""
    by_lower = {known.lower(): known for known in names()}
    hint = nearest(name.rsplit("/", 1)[-1].lower(), by_lower)
    for lower, known in by_lower.items():
        if hint == f"did you mean '{lower}'?":
            return f"did you mean '{known}'?"
    return "`jexport recipe list` shows those that there are"


def for_model(model: str) -> Recipe:
    """The defaults for a checkpoint that has no recipe.

    Args:
        model: a folder, or an id on the hub.

    Returns:
        A recipe named after it; a character that a recipe's name may not have becomes '-'.
    """
    folder = os.path.expanduser(model)
    local = os.path.isdir(folder)
    name = Path(folder).resolve().name if local else model.rstrip("/").rsplit("/", 1)[-1]
    plain = "".join(char if _may_name(char) else "-" for char in name)[:NAME_CHARACTERS]
    return Recipe(name=plain.lstrip(".") or "model", load=LoadSpec(model=model))


def from_table(table: Mapping[str, Any], *, origin: str) -> Recipe:
    """Build a Recipe from a parsed TOML table.

    Args:
        table: by key.
        origin: the file's name, for messages.

    Returns:
        The recipe; a recipe that sets one gate keeps the default gates of the other precisions.

    Raises:
        RecipeError: a key is unknown or a value cannot be used; names both.
    """
    recipe: Recipe = read_table(Recipe, table, origin=origin)
    # A recipe that sets one gate keeps the default gates of the other precisions.
    gates = MappingProxyType({**DEFAULT_GATES, **recipe.validate.gates})
    validate = dataclasses.replace(recipe.validate, gates=gates)
    return checked(dataclasses.replace(recipe, validate=validate), origin=origin)


class _Rule(NamedTuple):
    """What a value of a recipe has to be. key: as the recipe has it. allowed: in words."""

    key: str
    value: object
    good: bool
    allowed: str


def checked(recipe: Recipe, *, origin: str) -> Recipe:
    """The same recipe, once its values are known to make sense.

    Args:
        recipe: any.
        origin: the file's name, for messages.

    Returns:
        `recipe` itself.

    Raises:
        RecipeError: a value cannot be used; names its key and what is allowed.
    """
    rules = (
        *_model_rules(recipe),
        *_export_rules(recipe.export),
        *_quantize_rules(recipe.quantize),
        *_compile_rules(recipe.compile),
        *_validate_rules(recipe.validate, origin),
    )
    for key, value, good, allowed in rules:
        if not good:
            raise RecipeError(
                f"recipe key '{key}' has a value that cannot be used",
                evidence=f"{origin}: {key} = {plain(value)!r}",
                fix=f"allowed: {allowed}",
            )
    return recipe


def _model_rules(recipe: Recipe) -> Iterator[_Rule]:
    """Of what stands above the tables, and of [load]."""
    precisions, load = recipe.precisions, recipe.load
    yield _Rule("name", recipe.name, _may_name_folder(recipe.name), NAME_RULE)
    yield _Rule("version", recipe.version, _may_name_folder(recipe.version), NAME_RULE)
    known = set(precisions) <= set(PRECISIONS)
    yield _Rule("precisions", precisions, known, f"some of {', '.join(PRECISIONS)}")
    yield _Rule("load.revision", load.revision, _is_commit(load.revision), COMMIT_RULE)
    is_commit = _is_commit(load.code_revision)
    yield _Rule("load.code_revision", load.code_revision, is_commit, COMMIT_RULE)
    limit = load.max_tokens
    yield _Rule("load.max_tokens", limit, limit >= 0, "0 (the model's own) or more")
    yield _Rule(
        "load.prompts",
        tuple(load.prompts),
        not recipe.tasks or set(load.prompts) <= {*recipe.tasks, NONE, *recipe.uses},
        f"prompts of this recipe's tasks and uses: {', '.join((*recipe.tasks, *recipe.uses))}",
    )
    for key in ("parameters", "dimension"):
        size = getattr(recipe.model, key)
        yield _Rule(f"model.{key}", size, size >= 0, "0 (not said) or more")


def _export_rules(spec: ExportSpec) -> Iterator[_Rule]:
    opsets = f"{OPSETS[0]} to {OPSETS[-1]}"
    yield _Rule("export.opset", spec.opset, spec.opset in OPSETS, opsets)
    known = set() < set(spec.outputs) <= set(OUTPUTS) and _once(spec.outputs)
    yield _Rule("export.outputs", spec.outputs, known, f"one or both of {', '.join(OUTPUTS)}")
    size = spec.dimension
    yield _Rule("export.dimension", size, size >= 0, "0 (full size) or more")


def _quantize_rules(spec: QuantizeSpec) -> Iterator[_Rule]:
    yield _Rule("quantize.effort", spec.effort, spec.effort in EFFORTS, " or ".join(EFFORTS))
    yield _Rule("quantize.samples", spec.samples, spec.samples >= 1, "1 or more")
    yield _Rule("quantize.max_tokens", spec.max_tokens, spec.max_tokens >= 3, "3 or more")
    yield _Rule("quantize.smoothing", spec.smoothing, 0 <= spec.smoothing <= 1, "0 to 1")
    yield _Rule("quantize.clip", spec.clip, 0 < spec.clip <= 1, "above 0, up to 1")
    yield _Rule("quantize.max_share", spec.max_share, 0 <= spec.max_share <= 1, "0 to 1")
    goals = tuple(spec.symmetric)
    known = set(goals) <= set(GOALS)
    yield _Rule("quantize.symmetric", goals, known, f"some of {', '.join(GOALS)}")


def _compile_rules(spec: CompileSpec) -> Iterator[_Rule]:
    known = set(spec.cuda) <= {*CUDA_STEPS, "all"} and _once(spec.cuda)
    yield _Rule("compile.cuda", spec.cuda, known, f"'all', or some of {', '.join(CUDA_STEPS)}")
    yield _Rule(
        "compile.cuda",
        spec.cuda,
        spec.fuse or not spec.cuda,
        "none with compile.fuse = false: they go on from there",
    )
    yield _Rule(
        "compile.hardware_compatible",
        spec.hardware_compatible,
        spec.hardware_compatible in HARDWARE_COMPATIBLE,
        " or ".join(repr(name) for name in HARDWARE_COMPATIBLE),
    )
    gib = spec.workspace_gib
    is_amount = math.isfinite(gib) and gib >= 0
    yield _Rule("compile.workspace_gib", gib, is_amount, "0 (all there is) or more")
    for number, profile in enumerate(spec.profiles):
        for key, sizes in (("batch", profile.batch), ("tokens", profile.tokens)):
            yield _Rule(
                f"compile.profiles[{number}].{key}",
                sizes,
                len(sizes) == 3,
                "three numbers: smallest, usual, largest",
            )


def _validate_rules(spec: ValidateSpec, origin: str) -> Iterator[_Rule]:
    yield _Rule("validate.budget_tokens", spec.budget_tokens, spec.budget_tokens > 0, "1 or more")
    yield _Rule("validate.max_tokens", spec.max_tokens, spec.max_tokens >= 3, "3 or more")
    for precision, gates in _known_gates(spec.gates, origin).items():
        for key, bound in gates.items():
            name = f"validate.gates.{precision}.{key}"
            yield _Rule(name, bound, math.isfinite(bound), "a number")


def _known_gates(
    table: Mapping[str, Mapping[str, float]], origin: str
) -> Mapping[str, Mapping[str, float]]:
    """The same table, once it names only precisions and gates that there are."""
    keys: list[tuple[str, str, tuple[str, ...]]] = [(name, name, PRECISIONS) for name in table]
    for precision, gates in table.items():
        keys += [(f"{precision}.{key}", key, tuple(GATES)) for key in gates]
    for where, key, known in keys:
        if key not in known:
            raise RecipeError(
                f"unknown recipe key 'validate.gates.{where}'",
                evidence=f"in {origin}",
                fix=nearest(key, known),
            )
    return table


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a table of tables and lists, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{key}.{name}".lstrip("."), str(name)
            yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, key)


def _may_name(char: str) -> bool:
    return char.isalnum() or char in "._-"


def _may_name_folder(name: str) -> bool:
    return 0 < len(name) <= NAME_CHARACTERS and name[0] != "." and all(map(_may_name, name))


def _is_commit(revision: str) -> bool:
    return not revision or (len(revision) == 40 and set(revision) <= set("0123456789abcdef"))


def _once(values: tuple[str, ...]) -> bool:
    return len(set(values)) == len(values)
