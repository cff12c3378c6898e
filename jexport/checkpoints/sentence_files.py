"""The files that sentence-transformers adds: modules, prompts, length limit.

As versions 2 to 6.2 write them. What becomes of each key is in keys.py: a key that would change a
vector and that jexport does not have is refused, never left out. Knows no weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jexport.checkpoints import keys, module_kinds
from jexport.checkpoints.transformer_files import optional_json
from jexport.errors import CheckpointError, DependencyError, UnsupportedCheckpointError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMER = tuple(f"sentence_{kind}_config.json" for kind in KINDS)
"""Names that the Transformer module's own file has had; the first that is not empty is read."""

AFTER: Mapping[str, tuple[str, ...]] = {
    "Transformer": ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"),
    "StaticEmbedding": ("Normalize", "Dropout"),
}
"""Modules that are exported, by the first of them, which gives the token vectors."""

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
ARGUMENTS = (
    ("model_kwargs", "model_args", keys.MODEL_KWARGS),
    ("processor_kwargs", "tokenizer_args", keys.PROCESSOR_KWARGS),
    ("config_kwargs", "config_args", keys.CONFIG_KWARGS),
)
"""New name, old name and known keys of the arguments in sentence_bert_config.json."""

FETCHING = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
"""Arguments that sentence-transformers puts its own value over, or strips."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """One entry of modules.json.

    Args:
        type: the class, with its package.
        kind: the class, without its package.
        home: its folder, relative to the checkpoint's; '' for the same.
    """

    type: str
    kind: str
    home: str


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """What the Transformer module's own file says.

    Args:
        max_length: the length limit that it states over the tokenizer's own, 0 for none.
        do_lower_case: whether the tokenizer is to lower every text first.
        tokenizer: arguments for AutoTokenizer.
        config: arguments for AutoConfig.
        file: where it was read, None where there is no such file.
    """

    max_length: int = 0
    do_lower_case: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What config_sentence_transformers.json says.

    Args:
        prompts: by name; a null one is ''.
        default_prompt_name: of the prompt before every text, '' for none.
        similarity: one of SIMILARITIES.
        truncate_dim: size that vectors are cut to after normalisation, 0 for none.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    similarity: str = "cosine"
    truncate_dim: int = 0


def modules(folder: Path) -> tuple[Module, ...] | None:
    """The entries of modules.json.

    Args:
        folder: the checkpoint's own.

    Returns:
        In their order; None without the file.

    Raises:
        CheckpointError: it cannot be read, or leaves the folder.
        UnsupportedCheckpointError: an entry has a key that nobody knows, or two have one name.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text("utf-8"))
        listed = [
            Module(type=str(m["type"]), kind=str(m["type"]).rsplit(".", 1)[-1], home=str(m["path"]))
            for m in entries
        ]
        names = [str(m["name"]) for m in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {MODULES}", evidence=repr(error), fix="download the checkpoint again"
        ) from error
    for entry in entries:
        keys.check(keys.MODULES, entry, where=MODULES)
    if len(set(names)) < len(names):
        raise _unsupported(
            "has modules of one name, which replace each other",
            evidence=f"{MODULES} names: {', '.join(names)}",
            fix="number them",
        )
    if any(Path(one.home).is_absolute() or ".." in Path(one.home).parts for one in listed):
        raise CheckpointError(
            f"{MODULES} names a folder outside the checkpoint",
            evidence=", ".join(one.home for one in listed),
            fix="use a checkpoint from a source that you trust",
        )
    return tuple(listed)


def is_static(module: Module) -> bool:
    """Whether a module is sentence-transformers' StaticEmbedding: a table, no Transformer.

    Args:
        module: the first of modules.json.

    Returns:
        False for a class of that name that is the checkpoint's own.
    """
    return module.kind == "StaticEmbedding" and module.type.startswith("sentence_transformers.")


def transformer_home(folder: Path) -> Path:
    """Where config.json, weights and tokenizer are.

    Args:
        folder: the checkpoint's own.

    Returns:
        That folder, or the Transformer module's inside of it.

    Raises:
        CheckpointError: modules.json cannot be read, or leaves the folder.
        UnsupportedCheckpointError: the modules are others than jexport exports. This is raised
            before a config.json is looked for that such a checkpoint may not have.
    """
    listed = modules(folder)
    if listed is None:
        return folder
    # A class of the checkpoint's own keeps its files where its own code looks for them.
    if listed and not listed[0].type.startswith("sentence_transformers."):
        return folder
    check_kinds(listed, own_transformer=False)
    return folder / listed[0].home


def check_kinds(listed: Sequence[Module], *, own_transformer: bool) -> None:
    """Refuse a module that jexport would have to leave out.

    Args:
        listed: the entries of modules.json.
        own_transformer: takes a Transformer class that is the checkpoint's own.

    Raises:
        UnsupportedCheckpointError: there are such modules, or none at all; says what they are.
    """
    first = listed[0].kind if listed else ""
    after = AFTER.get(first, AFTER["Transformer"])
    known = [
        one.kind in (after if place else AFTER) and one.type.startswith("sentence_transformers.")
        for place, one in enumerate(listed)
    ]
    if not listed or not all(known[own_transformer:]):
        raise _unsupported(
            "has modules that jexport does not export",
            evidence=f"{MODULES} lists: {', '.join(one.type for one in listed) or 'none'}\n"
            + module_kinds.described(one.kind for one in listed),
            fix="supported: " + "; ".join(f"{one}, then {', '.join(AFTER[one])}" for one in AFTER),
        )


def transformer(home: Path) -> TransformerSettings:
    """What the Transformer module's own file says.

    Args:
        home: the module's folder.

    Returns:
        The defaults where there is no such file, or only empty ones.

    Raises:
        CheckpointError: a value of the wrong type.
        UnsupportedCheckpointError: a key that would change a vector and is not honoured.
    """
    path = next((home / name for name in TRANSFORMER if optional_json(home / name)), None)
    if path is None:
        return TransformerSettings()
    settings, where = optional_json(path), path.name
    keys.check(keys.TRANSFORMER, settings, where=where)
    _check_modalities(settings, where)
    given: dict[str, dict[str, Any]] = {}
    for new, old, known in ARGUMENTS:
        content = _table(settings, old if old in settings else new, where)
        keys.check(known, content, where=f"{where}: {new}")
        given[new] = {key: value for key, value in content.items() if key not in FETCHING}
    processing = _table(settings, "processing_kwargs", where)
    keys.check(keys.PROCESSING, processing, where=f"{where}: processing_kwargs")
    text = _table(processing, "text", where)
    keys.check(keys.PROCESSING_TEXT, text, where=f"{where}: processing_kwargs.text")
    limit = settings.get("max_seq_length")
    processor = given["processor_kwargs"]
    stated = text.get("max_length") or processor.pop("model_max_length", limit)
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, (int, float))):
        raise CheckpointError(
            f"{where} does not say a length limit",
            evidence=f"it says {stated!r}",
            fix="make it a whole number",
        )
    return TransformerSettings(
        max_length=int(stated) if stated is not None and 0 < stated < 1e9 else 0,
        do_lower_case=bool(settings.get("do_lower_case")),
        tokenizer=processor,
        config=given["config_kwargs"],
        file=path,
    )


def _check_modalities(settings: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedCheckpointError for another way of a text into the model, and out of it."""
    modalities = _table(settings, "modality_config", where)
    if "message" in modalities:
        raise _unsupported(
            "sends every text through its tokenizer's chat template",
            evidence=f"{where}: modality_config has 'message'",
            fix="save it with modality_config of 'text' alone, if texts without the template are "
            "what you want",
        )
    text = _table(modalities, "text", where)
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    odd = [
        f"modality_config.text.{key} = {value!r}"
        for key, value in text.items()
        if key != "format" and value != plain.get(key)
    ]
    if odd or (modalities and "text" not in modalities):
        raise _unsupported(
            "takes its token vectors from elsewhere than the last hidden state",
            evidence=f"{where}: {', '.join(odd) or 'modality_config has no text'}",
            fix="save the model without these options",
        )
    if modalities and settings.get("module_output_name") is None:
        raise CheckpointError(
            f"{where} has modality_config and no module_output_name",
            evidence="sentence-transformers does not open it",
            fix='add "module_output_name": "token_embeddings"',
        )


def settings(folder: Path) -> Settings:
    """What config_sentence_transformers.json says, where modules.json is beside it.

    Args:
        folder: the checkpoint's own.

    Returns:
        The defaults for what it does not say; without modules.json, as in the library, for all.

    Raises:
        CheckpointError: a value of the wrong type, or a default prompt that is not there.
        UnsupportedCheckpointError: a key that would change a vector and is not honoured.
        DependencyError: a requirement that is not met.
    """
    if not (folder / MODULES).is_file():
        return Settings()
    content = optional_json(folder / PROMPTS)
    keys.check(keys.SENTENCE_TRANSFORMER, content, where=PROMPTS)
    _check_requirements(content.get("requirements") or {})
    prompts = {
        str(name): "" if text is None else text
        for name, text in _table(content, "prompts", PROMPTS).items()
    }
    odd = [f"{name} = {text!r}" for name, text in prompts.items() if not isinstance(text, str)]
    if odd:
        raise CheckpointError(
            "a prompt of the checkpoint is no text",
            evidence=f"{PROMPTS}: {', '.join(odd)}",
            fix="make it a string",
        )
    name = content.get("default_prompt_name")
    known = {"query": "", "document": "", **prompts}
    if name is not None and name not in known:
        raise CheckpointError(
            f"the checkpoint's default prompt '{name}' is not among its prompts",
            evidence=f"{PROMPTS} has: {', '.join(known) or 'none'}",
            fix="add it there, or set default_prompt_name to null",
        )
    size = content.get("truncate_dim")
    if size is not None and (type(size) is not int or size < 1):
        raise CheckpointError(
            "truncate_dim of the checkpoint is no size",
            evidence=f"{PROMPTS}: truncate_dim = {size!r}",
            fix="make it a whole number of at least 1, or null",
        )
    similarity = content.get("similarity_fn_name")
    return Settings(
        prompts=prompts,
        default_prompt_name=name or "",
        similarity=similarity if similarity in SIMILARITIES else "cosine",
        truncate_dim=size or 0,
    )


def _check_requirements(needs: Any) -> None:
    """Raise DependencyError where sentence-transformers would raise ImportError."""
    from importlib import metadata

    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if not isinstance(needs, dict):
        raise _no_table("requirements", needs, PROMPTS)
    for name, requirement in needs.items():
        specifier = (
            requirement.get("specifier", "") if isinstance(requirement, dict) else requirement
        )
        try:
            version = metadata.version(str(name))
            met = SpecifierSet(str(specifier or "")).contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, met = "not installed", False
        except InvalidSpecifier as error:
            raise CheckpointError(
                "a requirement of the checkpoint cannot be read",
                evidence=f"{PROMPTS}: {error}",
                fix="write it as pip does, such as '>=5.0'",
            ) from error
        if not met:
            raise DependencyError(
                f"the checkpoint's authors ask for {name} {specifier}",
                evidence=f"{PROMPTS}: requirements; here: {version}",
                fix=f'pip install "{name}{specifier or ""}"',
            )


def _table(settings: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise _no_table(key, value, where)
    return dict(value or {})


def _no_table(key: str, value: Any, where: str) -> CheckpointError:
    return CheckpointError(
        f"'{key}' in a file of the checkpoint is no table",
        evidence=f"{where}: {key} = {value!r}",
        fix="download the checkpoint again",
    )


def _unsupported(what: str, *, evidence: str, fix: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"this sentence-transformers model {what}", evidence=evidence, fix=fix
    )
