"""Running a checkpoint's own code: only when asked for, pinned, digested, repaired and checked.

For a known layout the authors' code becomes the parity reference; for an unknown layout it is what
gets exported. Code is where config.json's auto_map says: beside the weights, or in one repository
on a hub, at a pinned commit. The breakages of the original jina-embeddings-v3 code under
transformers 5, and what is done about each, are named at the repairs below.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.artifacts.manifest import file_digest
from jexport.checkpoints import hub, shards
from jexport.checkpoints.eager import torch_threads
from jexport.checkpoints.native_class import listed_tasks
from jexport.checkpoints.sentence_transformer import check_report
from jexport.checkpoints.transformer_files import (
    auto_tokenizer,
    is_there,
    optional_json,
    quiet_transformers,
    read_json,
)
from jexport.errors import CheckpointError, JexportError, NotFiniteError, RemoteCodeError
from jexport.recipe import LoadSpec
from jexport.types import FileDigest, Runner, Tensors

if TYPE_CHECKING:
    import torch


def auto_map(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a config.json or tokenizer_config.json names as code.

    Args:
        config: the file's content; an old tokenizer_config.json has a list instead of a table.

    Returns:
        By auto class, names such as `file.Class`, or `owner/name--file.Class` for code on a hub.

    Raises:
        CheckpointError: it names something that is no class.
    """
    classes = config.get("auto_map") or {}
    if isinstance(classes, list | tuple):  # old tokenizer_config.json: [slow class, fast class]
        classes = {"AutoTokenizer": classes}
    if not isinstance(classes, dict):
        raise _no_class(classes)
    named: dict[str, list[str]] = {}
    for auto, value in classes.items():
        for name in value if isinstance(value, list | tuple) else [value]:
            if name and not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise _no_class(value)
            if name:
                named.setdefault(str(auto), []).append(name)
    return named


def _no_class(value: object) -> CheckpointError:
    return CheckpointError(
        "auto_map names something that is no class",
        evidence=f"it says {value!r}",
        fix="give the config.json that belongs to this code",
    )


_NAME = re.compile(r"(?:[\w.-]+/[\w.-]+--)?\w+\.\w+")


def code_files(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec
) -> tuple[tuple[FileDigest, ...], str]:
    """The code that can run, once it is allowed, there and pinned.

    Args:
        folder: of config.json; every .py file below it counts when one of them is named.
        config: its config.json.
        spec: its trust_remote_code and code_revision decide.

    Returns:
        Digest of every .py file that can run; 40-hex commit of a code repository, '' without one.

    Raises:
        RemoteCodeError: the code was not allowed, is not there or is not pinned.
        CheckpointError: auto_map cannot be read.
        HubError, DependencyError: its repository cannot be fetched.
    """
    model_code = auto_map(config)
    tokenizer_code = auto_map(optional_json(folder / "tokenizer_config.json"))
    names = sorted({*_flat(model_code), *_flat(tokenizer_code)})
    if not spec.trust_remote_code:
        raise RemoteCodeError(
            "this checkpoint is of an unknown layout and brings code of its own",
            evidence=f"config.json auto_map: {', '.join(names)}",
            fix="read that code, then allow it with --trust-remote-code",
        )
    if "AutoModel" not in model_code:
        raise RemoteCodeError(
            "--trust-remote-code was given, and this checkpoint has no code to trust",
            evidence=f"{folder / 'config.json'} names no AutoModel in auto_map",
            fix="build without --trust-remote-code, or put the .py files beside the weights and "
            "name them in auto_map",
        )
    homes = _homes(names)
    if len(homes) > 1 or _homes(_flat(tokenizer_code)):
        raise RemoteCodeError(
            "the remote code cannot be pinned",
            evidence=f"it is named in: {', '.join(homes)}; one repository, which the tokenizer's "
            "code is not in, can have a code_revision",
            fix="put the .py files beside the weights and name them in auto_map",
        )
    code = _local_code(folder, names)
    if not homes:
        return code, ""
    hub.check_pinned(
        spec.code_revision, what=f"auto_map names code in {homes[0]}", key="load.code_revision"
    )
    root, revision = hub.fetch(homes[0], spec.code_revision, hub.CODE)
    return (*code, *_digests(root, names, home=homes[0])), revision


def _local_code(folder: Path, names: list[str]) -> tuple[FileDigest, ...]:
    """Digests of the .py files beside the weights, when any of them is named."""
    local = [name for name in names if "--" not in name]
    return _digests(folder, local) if local else ()


def _digests(root: Path, names: list[str], *, home: str = "") -> tuple[FileDigest, ...]:
    """Digest of every .py file below root, in which the named ones have to be."""
    needed = {
        f"{name.split('--')[-1].split('.')[0]}.py"
        for name in names
        if name.startswith(f"{home}--") or not home
    }
    absent = sorted(name for name in needed if not is_there(root / name))
    if absent:
        raise RemoteCodeError(
            "there is no code to run",
            evidence=f"auto_map names {', '.join(names)}; no {', '.join(absent)} in {root}",
            fix="put the .py files beside the weights, or build without --trust-remote-code",
        )
    digests = [file_digest(path, root=root) for path in sorted(root.rglob("*.py"))]
    prefix = f"{home}/" if home else ""
    return tuple(dataclasses.replace(one, path=f"{prefix}{one.path}") for one in digests)


def sizes(folder: Path, spec: LoadSpec) -> dict[str, Any]:
    """What the checkpoint's own config class makes of config.json; runs its code.

    Args:
        folder: of config.json.
        spec: its code_revision pins code on a hub.

    Returns:
        hidden_size, vocab_size and max_position_embeddings; None for what the class does not say.

    Raises:
        RemoteCodeError: the code fails, or asks for code that is not pinned.
    """
    with (
        quiet_transformers(),
        _import_repair(),
        _pinned_only(folder, spec),
        _own_code("read its config.json"),
    ):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=True, code_revision=spec.code_revision or None
        )
    names = ("hidden_size", "vocab_size", "max_position_embeddings")
    return {key: getattr(config, key, None) for key in names}


@contextlib.contextmanager
def _pinned_only(folder: Path, spec: LoadSpec) -> Iterator[None]:
    """Meanwhile transformers takes code from this folder, or from the pinned commit, or not at all.

    code_revision alone is not enough: the authors' constructor opens the tokenizer itself, which
    opens the config, whose code transformers (5.23) then takes from the newest commit.
    """
    from transformers import dynamic_module_utils

    find = dynamic_module_utils.get_cached_module_file
    homes = _homes(_flat(auto_map(read_json(folder / "config.json"))))

    def find_pinned(home: Any, file: str, *args: Any, **how: Any) -> Any:
        if Path(home).is_dir():  # transformers looks there first, whatever is on the hub
            if Path(home).resolve() == folder.resolve():
                return find(home, file, *args, **how)
            raise RemoteCodeError(
                "remote code asked for code of another folder",
                evidence=f"{file} in {home}, while the checkpoint is {folder}",
                fix="put the .py files beside the weights, or run jexport from another folder",
            )
        hub.check_pinned(
            spec.code_revision if [str(home)] == homes else "",
            what=f"{file} of {home} was asked for",
            key="load.code_revision",
        )
        return find(home, file, *args, **{**how, "revision": spec.code_revision})

    dynamic_module_utils.get_cached_module_file = find_pinned
    try:
        yield
    finally:
        dynamic_module_utils.get_cached_module_file = find


def _flat(named: Mapping[str, list[str]]) -> list[str]:
    return sorted({name for names in named.values() for name in names})


def _homes(names: list[str]) -> list[str]:
    """The hub's repositories among these names of code."""
    return sorted({name.split("--")[0] for name in names if "--" in name})


@contextlib.contextmanager
def allowed(folder: Path, spec: LoadSpec) -> Iterator[None]:
    """Meanwhile the checkpoint's code may be loaded, from where it is pinned and nowhere else.

    Args:
        folder: of config.json; code may come from it.
        spec: its code_revision pins code on a hub.

    Yields:
        Nothing; the model is opened inside.

    Raises:
        RemoteCodeError: the code fails, or asks for code that is not pinned.
    """
    with _import_repair(), _pinned_only(folder, spec), _own_code("open the model"):
        yield


def open_tokenizer(folder: Path, spec: LoadSpec) -> Any:
    """The tokenizer as the checkpoint's own code opens it.

    Args:
        folder: of the tokenizer's files and config.json.
        spec: its code_revision pins code on a hub.

    Returns:
        A tokenizer of transformers.

    Raises:
        TokenizerError: it cannot be opened.
        RemoteCodeError: it asks for code that is not pinned.
    """
    with _import_repair(), _pinned_only(folder, spec):
        return auto_tokenizer(folder, trust_remote_code=True)


@contextlib.contextmanager
def _own_code(doing: str) -> Iterator[None]:
    """Whatever the checkpoint's code raises is its fault, not jexport's: a RemoteCodeError."""
    try:
        yield
    except (JexportError, MemoryError):
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        missing = isinstance(error, ImportError)
        raise RemoteCodeError(
            f"the checkpoint's own code could not {doing}",
            evidence=f"{type(error).__name__}: {first}",
            fix="install what it needs, or build without --trust-remote-code"
            if missing
            else "build without --trust-remote-code, or mend that code",
        ) from error


def assemble(folder: Path, spec: LoadSpec) -> torch.nn.Module:
    """The remote class with its weights, repaired and checked.

    Args:
        folder: of config.json and weights.
        spec: its code_revision pins code on a hub.

    Returns:
        float32, on the CPU, in eval mode, without gradients.

    Raises:
        RemoteCodeError: the code fails, asks for code that is not pinned, or cannot be repaired.
        StateDictError: weights are missing, too many or of another shape.
        NotFiniteError: a weight is a NaN or an infinity, or a buffer that is not saved a NaN.
    """
    import torch
    from transformers import AutoModel

    names = shards.tensors(folder)
    with quiet_transformers(), _import_repair(), _pinned_only(folder, spec):
        with _own_code("build the model"):
            model, report = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=any(one.path.suffix != ".bin" for one in names.values()),
                trust_remote_code=True,
                code_revision=spec.code_revision or None,
            )
        check_report(report, names, prefix=getattr(model, "base_model_prefix", ""))
        with _own_code("build the model again from its config"):
            repair_buffers(model)
    saved = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # A buffer that is not saved may hold -inf on purpose: a mask.
        good = torch.isfinite(tensor) if name in saved else ~torch.isnan(tensor)
        if not bool(good.all()):
            raise NotFiniteError(
                f"'{name}' of the remote model holds a NaN or an infinity",
                evidence="seen after loading it through its own code",
                fix="download the checkpoint again",
            )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _import_repair() -> Iterator[None]:
    """What remote code written for transformers 4 misses in transformers 5, put back meanwhile.

    create_position_ids_from_input_ids: imported by the original embedding.py, gone in 5.0.
    all_tied_weights_keys: set by post_init(), which XLMRobertaLoRA.__init__ never calls.
    """
    from transformers import PreTrainedModel
    from transformers.models.xlm_roberta import modeling_xlm_roberta

    lent: list[tuple[Any, str]] = []
    for owner, name, value in (
        (modeling_xlm_roberta, "create_position_ids_from_input_ids", _position_ids),
        (PreTrainedModel, "all_tied_weights_keys", {}),
    ):
        if not hasattr(owner, name):
            setattr(owner, name, value)
            lent.append((owner, name))
    try:
        yield
    finally:
        for owner, name in lent:
            delattr(owner, name)


def _position_ids(input_ids: Any, padding_idx: int, past_key_values_length: int = 0) -> Any:
    """Positions counted from padding_idx + 1, padding left at padding_idx (RoBERTa's rule)."""
    mask = input_ids.ne(padding_idx).int()
    steps = mask.cumsum(dim=1).type_as(mask) + past_key_values_length
    return (steps * mask).long() + padding_idx


def repair_buffers(model: Any) -> None:
    """Give the buffers that are in no file their values again: transformers 5 leaves them unset.

    Seen in the original code: inv_freq = [1.2e-38, 0, ...] and silently wrong vectors. Each such
    buffer is copied from an instance of the same class built on the CPU from the config alone,
    caches of what was computed from it are dropped, and RoPE frequencies are checked.

    Args:
        model: of the remote class, with its weights; changed in place.

    Raises:
        RemoteCodeError: RoPE frequencies are still not those that its config asks for.
    """
    import torch

    stale = {
        f"{prefix}.{leaf}".lstrip(".")
        for prefix, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
        if getattr(module, leaf, None) is not None
    }
    if stale:
        # Not AutoModel.from_config: it hands code_revision on to the class (transformers 5.23).
        values = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
        for name, buffer in model.named_buffers():
            if name in stale:
                buffer.data = values[name].detach().clone()
    for name, module in model.named_modules():
        if hasattr(module, "_compute_inv_freq") and hasattr(module, "inv_freq"):
            expected = module._compute_inv_freq(torch.device("cpu"))
            module._seq_len_cached = 0
            for cache in ("_cos_cached", "_sin_cached", "_cos_k_cached", "_sin_k_cached"):
                if hasattr(module, cache):
                    setattr(module, cache, None)
            _check_frequencies(name, module.inv_freq, expected, model.config)


def _check_frequencies(
    name: str, actual: torch.Tensor, expected: torch.Tensor, config: Any
) -> None:
    """RoPE frequencies fall from 1 towards 0 (RoFormer, arXiv 2104.09864) and are as computed.

    They are rotary_emb_base ** (-2 n / size) where the config names that base.
    """
    import torch

    base = getattr(config, "rotary_emb_base", None)
    steps = torch.arange(actual.numel(), dtype=torch.float64) / actual.numel()
    formula = float(base) ** -steps if base else expected.flatten().double()
    good = (
        actual.shape == expected.shape
        and bool(torch.isfinite(actual).all())
        and bool(torch.allclose(actual.float(), expected.float(), rtol=1e-6, atol=0))
        and bool(torch.allclose(actual.flatten().double(), formula, rtol=1e-5, atol=0))
        and float(actual.flatten()[0]) == 1.0
        and bool((actual.flatten()[1:] < actual.flatten()[:-1]).all())
    )
    if not good:
        raise RemoteCodeError(
            f"the repair of '{name}.inv_freq' did not hold",
            evidence=f"it starts {actual.flatten()[:4].tolist()}, "
            f"its own code gives {expected.flatten()[:4].tolist()}, "
            f"its config asks for {formula[:4].tolist()}",
            fix="build without --trust-remote-code, and report this checkpoint",
        )


@contextlib.contextmanager
def reference(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, task: str
) -> Iterator[Runner]:
    """The checkpoint's own forward pass; for the original layout with the task's adapter_mask.

    Args:
        folder: of config.json and weights.
        config: its config.json; the task's place in its list is the mask's value.
        spec: its code_revision pins code on a hub.
        task: whose adapter is used; 'none' gives no mask.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, dim], on one thread.

    Raises:
        RemoteCodeError, StateDictError, NotFiniteError: as `assemble`.
    """
    import torch

    extra: dict[str, Any] = {}
    index = None
    if task != tasks.NONE:
        index = (listed_tasks(config) or tuple(tasks.JINA_V3_PROMPTS)).index(task)
    model: Any = assemble(folder, spec)

    def run(feed: Tensors) -> Tensors:
        if index is not None:
            rows = feed["input_ids"].shape[0]
            extra["adapter_mask"] = torch.full((rows,), index, dtype=torch.int32)
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(feed["input_ids"]),
                attention_mask=torch.from_numpy(feed["attention_mask"]),
                **extra,
            )
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
        return {"last_hidden_state": hidden.float().numpy()}

    with torch_threads(1):  # see eager.py
        try:
            yield run
        finally:
            model.to("meta")
