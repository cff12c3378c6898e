"""The modules after the transformer: how token vectors become a text's vector.

As sentence-transformers 6.2 reads them. One pooling, normalised or not, is told by its name: every
runtime does that by itself. Whatever else there is (Dense, LayerNorm, several poolings ...) becomes
the `head` of the model, which goes into the graph. What becomes of each key is in keys.py.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.checkpoints import keys, sentence_files, shards
from jexport.checkpoints.native_class import mismatch
from jexport.checkpoints.transformer_files import count, is_there, optional_json
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.types import HeadModule

POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
"""Old flags, in the order in which vectors of several poolings are joined."""

NEW_POOLING_NAMES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
"""Version 6 writes `pooling_mode` with these names instead of the flags above."""

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last")

TANH = "torch.nn.modules.activation.Tanh"
"""Of a Dense module that names no activation, or one that is not torch's."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What follows the transformer.

    Args:
        mode: one of POOLINGS, or several joined by '+'.
        normalize: whether the text's vector then gets length 1.
        width: of the token vectors, 0 where no file says it.
        dimension: of a text's vector, 0 for that of the token vectors.
        include_prompt: False leaves the prompt's tokens out of the pooling.
        head: all of it as modules, where that is more than one pooling and its normalisation.
        modules: the same in words, a line each.
        other_widths: folders of Dense modules that modules.json leaves out: other sizes of vectors.
        files: what was read.
    """

    mode: str
    normalize: bool
    width: int = 0
    dimension: int = 0
    include_prompt: bool = True
    head: tuple[HeadModule, ...] = ()
    modules: tuple[str, ...] = ()
    other_widths: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def read(folder: Path, *, own_transformer: bool = False, trust_code: bool = False) -> Stack | None:
    """How token vectors become a text's vector, by modules.json and its modules' files.

    Args:
        folder: the checkpoint's own.
        own_transformer: takes a Transformer class that is the checkpoint's own.
        trust_code: whether the checkpoint's code may run, with which sentence-transformers takes
            activations that are not torch's.

    Returns:
        The stack, no weight read yet; None without modules.json.

    Raises:
        CheckpointError: a file is missing or broken, or does not say a width.
        StateDictError: a module's weights are not those of its config.json.
        UnsupportedCheckpointError: a module, mode or key that jexport would have to leave out.
    """
    listed = sentence_files.modules(folder)
    if listed is None:
        return None
    sentence_files.check_kinds(listed, own_transformer=own_transformer)
    files = [folder / sentence_files.MODULES]
    after = [one for one in listed[1:] if one.kind != "Dropout"]
    for one in listed[1:]:
        path = folder / one.home / "config.json"
        if is_there(path):
            files.append(path)
        if one.kind == "Dropout":
            keys.check(keys.DROPOUT, optional_json(path), where=f"{one.home}/{path.name}")
    kinds = [one.kind for one in after]
    if listed and sentence_files.is_static(listed[0]):
        return _static(folder, after, files)
    if kinds[:1] != ["Pooling"] or "Pooling" in kinds[1:]:
        raise _unsupported(
            "does not pool once, right after its transformer",
            evidence=f"{sentence_files.MODULES} lists: {', '.join(one.kind for one in listed)}",
            fix="supported: Transformer, one Pooling, then Dense, LayerNorm, Normalize, Dropout",
        )
    stack = _pooling(folder, after[0].home)
    head = [stack.head[0]]
    for one in after[1:]:
        head.append(_module(folder, one, _width(head[-1]), trust_code=trust_code))
        files += _weight_files(folder / one.home) if head[-1].weights else []
    plain = len(stack.mode.split("+")) == 1 and set(kinds[1:]) <= {"Normalize"}
    if not plain and not stack.include_prompt:
        raise _unsupported(
            "leaves its prompt out of the pooling, and has modules after it",
            evidence=f"{after[0].home}/config.json: include_prompt = false; modules: "
            f"{', '.join(kinds)}. They are in the graph, which does not know where a prompt ends",
            fix="set include_prompt to true, if vectors with the prompt are what you want",
        )
    return dataclasses.replace(
        stack,
        normalize=kinds[-1] == "Normalize",
        dimension=_width(head[-1]),
        head=() if plain else tuple(head),
        modules=() if plain else tuple(map(described, head)),
        other_widths=_left_out(folder, listed),
        files=tuple(files),
    )


def _static(folder: Path, after: Sequence[sentence_files.Module], files: Sequence[Path]) -> Stack:
    """A table of token vectors takes their mean itself; only a Normalize may follow."""
    for one in after:
        path = folder / one.home / "config.json"
        keys.check(keys.NORMALIZE, optional_json(path), where=f"{one.home}/{path.name}")
    return Stack(mode="mean", normalize=bool(after), files=tuple(files))


def described(module: HeadModule) -> str:
    """A module in words.

    Args:
        module: any.

    Returns:
        Such as 'Dense 768 > 512, Tanh'.
    """
    config = module.config
    if module.kind == "Pooling":
        return f"Pooling {'+'.join(config['pooling_mode'])}"
    if module.kind != "Dense":
        return module.kind
    parts = [f"Dense {config['in_features']} > {config['out_features']}"]
    parts += [] if config["bias"] else ["no bias"]
    parts += [str(config["activation_function"]).rsplit(".", 1)[-1]]
    parts += ["residual"] if config["use_residual"] else []
    return ", ".join(parts)


def _width(module: HeadModule) -> int:
    """Size of the vectors that a module gives; a Normalize has it in `dimension`, too."""
    config = module.config
    if module.kind == "Pooling":
        return int(config["embedding_dimension"]) * len(config["pooling_mode"])
    return int(config["out_features" if module.kind == "Dense" else "dimension"])


def _pooling(folder: Path, home: str) -> Stack:
    """The stack as far as its pooling, which is its only module."""
    path = folder / home / "config.json"
    if not is_there(path):
        raise CheckpointError(
            "the Pooling module has no config.json",
            evidence=f"{path} is missing",
            fix="download the checkpoint again",
        )
    settings = optional_json(path)
    where = f"{home}/{path.name}"
    keys.check(keys.POOLING, settings, where=where)
    named = settings.get("pooling_mode")
    if "pooling_mode" not in settings:
        # Without any flag sentence-transformers takes the mean, too.
        modes = [mode for key, mode in POOLING_MODES.items() if settings.get(key)] or ["mean"]
    else:
        modes = [
            NEW_POOLING_NAMES.get(str(mode), str(mode))
            for mode in (named if isinstance(named, list) else [named])
        ]
    if not modes or not set(modes) <= set(POOLINGS):
        raise _unsupported(
            "pools in a way that jexport does not have",
            evidence=f"{where} asks for: {', '.join(modes) or 'nothing'}",
            fix=f"supported: {', '.join(POOLINGS)}, and several of them joined",
        )
    widths = [key for key in ("embedding_dimension", "word_embedding_dimension") if key in settings]
    if not widths:
        raise CheckpointError(
            "the Pooling module does not say its width",
            evidence=f"{where} has no embedding_dimension; sentence-transformers does not open it",
            fix="add it: the model's hidden_size",
        )
    width = count(settings, widths[0])
    config = {"embedding_dimension": width, "pooling_mode": modes}
    return Stack(
        mode="+".join(modes),
        normalize=False,
        width=width,
        include_prompt=bool(settings.get("include_prompt", True)),
        head=(HeadModule(kind="Pooling", config=config, weights={}),),
    )


def _module(
    folder: Path, module: sentence_files.Module, width: int, *, trust_code: bool
) -> HeadModule:
    """A module after the pooling, its vectors of `width` values checked against its weights."""
    path = folder / module.home / "config.json"
    where = f"{module.home}/{path.name}"
    settings = optional_json(path)
    if module.kind == "Normalize":
        keys.check(keys.NORMALIZE, settings, where=where)
        return HeadModule(kind="Normalize", config={"dimension": width}, weights={})
    if not is_there(path):
        raise CheckpointError(
            f"the {module.kind} module has no config.json",
            evidence=f"{path} is missing",
            fix="download the checkpoint again",
        )
    if module.kind == "LayerNorm":
        keys.check(keys.LAYER_NORM, settings, where=where)
        size = _size(settings, "dimension", where)
        config: dict[str, Any] = {"dimension": size}
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (size,), "norm.bias": (size,)}
    else:
        keys.check(keys.DENSE, settings, where=where)
        config, shapes = _dense(settings, where, trust_code=trust_code)
        size = config["in_features"]
    if size != width:
        raise CheckpointError(
            f"the {module.kind} module does not fit the one before it",
            evidence=f"{where}: it takes vectors of {size}, and gets vectors of {width}",
            fix="give the files that belong together",
        )
    return HeadModule(
        kind=module.kind, config=config, weights=_weights(folder / module.home, shapes)
    )


def _size(settings: Mapping[str, Any], key: str, where: str) -> int:
    """A size that a module's config.json states. Raises CheckpointError, which names the file."""
    size = settings.get(key)
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"{where} does not say a size",
            evidence=f"{key} = {size!r:.80}",
            fix="download the checkpoint again",
        )
    return size


def _dense(
    settings: Mapping[str, Any], where: str, *, trust_code: bool
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A Dense module's config in full, and the shapes of its weights by name."""
    columns, rows = _size(settings, "in_features", where), _size(settings, "out_features", where)
    named = settings.get("activation_function", TANH)
    if not isinstance(named, str) or not named.startswith("torch."):
        if trust_code:
            raise _unsupported(
                "has an activation of its own code",
                evidence=f"{where}: activation_function = {named!r:.80}",
                fix="build without --trust-remote-code, if Tanh, which sentence-transformers takes "
                "then, is what you want",
            )
        named = TANH
    kind = activation(named, where)
    config = {
        "in_features": columns,
        "out_features": rows,
        "bias": bool(settings.get("bias", True)),
        "activation_function": f"{kind.__module__}.{kind.__qualname__}",
        "use_residual": bool(settings.get("use_residual", False)),
    }
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (rows, columns)}
    if config["bias"]:
        shapes["linear.bias"] = (rows,)
    if config["use_residual"] and rows != columns:
        shapes["residual.weight"] = (rows, columns)
    for name, weight in kind().state_dict().items():
        shapes[f"activation_function.{name}"] = tuple(weight.shape)
    return config, shapes


def activation(named: str, where: str) -> Any:
    """The class of torch that a Dense module names; nothing else is imported.

    Args:
        named: its path, which begins with 'torch.'.
        where: the file that names it, for the message.

    Returns:
        A class of torch modules that takes no argument.

    Raises:
        UnsupportedCheckpointError: there is none of that name.
    """
    import torch

    module, _, name = named.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        ready = isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind() is not None
        problem: Exception | str = "" if ready else "no class of torch modules"
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        problem = error
    if problem:
        raise _unsupported(
            "names an activation that torch does not have",
            evidence=f"{where}: activation_function = {named!r:.80}: {problem}",
            fix="name a class such as torch.nn.modules.activation.Tanh",
        )
    return kind


def _weights(home: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Readers of a module's weights, which are exactly these."""
    entries = shards.tensors(home)
    shared = shapes.keys() & entries.keys()
    odd = [
        f"{name} {list(entries[name].shape)}, not {list(shapes[name])}"
        for name in shared
        if entries[name].shape != shapes[name]
    ]
    if odd or len(shared) < len(shapes) or len(shared) < len(entries):
        error = mismatch(shapes.keys() - shared, entries.keys() - shared, odd)
        error.evidence = f"{home.name}:\n{error.evidence}"
        raise error
    return {name: shards.reader(name, entry) for name, entry in entries.items()}


def _weight_files(home: Path) -> list[Path]:
    return shards.files(home, shards.tensors(home))


def _left_out(folder: Path, listed: Sequence[sentence_files.Module]) -> tuple[str, ...]:
    """Folders of Dense modules beside those that are listed, of the same place in the stack.

    As of stella: 2_Dense_256 beside 2_Dense_1024, each for vectors of its own size.
    """
    named = {one.home for one in listed}
    starts = {one.home.split("_")[0] for one in listed if one.kind == "Dense" and one.home}
    return tuple(
        path.parent.name
        for path in sorted(folder.glob("*Dense*/config.json"))
        if path.parent.name not in named and path.parent.name.split("_")[0] in starts
    )


def _unsupported(what: str, *, evidence: str, fix: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"this sentence-transformers model {what}", evidence=evidence, fix=fix
    )
