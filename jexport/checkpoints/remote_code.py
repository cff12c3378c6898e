"""Running a checkpoint's own code: only when asked for, pinned, digested, repaired and checked.

For a known layout the authors' code becomes the parity reference; for an unknown layout it is what
gets exported. The breakages of the original jina-embeddings-v3 code under transformers 5, and what
is done about each, are named at the repairs below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.checkpoints import hub, shards
from jexport.checkpoints.sentence_transformer import check_report
from jexport.checkpoints.transformer_files import quiet_transformers
from jexport.errors import NotFiniteError, RemoteCodeError
from jexport.flow import FileDigest, LowRank, Runner, Tensors, WeightReader
from jexport.manifest import file_digest
from jexport.recipe import LoadSpec

if TYPE_CHECKING:
    import torch


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of no known layout brings code of its own."""
    return bool(config.get("auto_map", {}).get("AutoModel"))


def known_tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """An unknown layout has no task but `none`."""
    return ()


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """The weight files; their names mean nothing here, the remote class reads them itself."""
    paths = shards.find(folder)
    shards.entries(paths)
    return {}, {}, paths


def code_files(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec
) -> tuple[tuple[FileDigest, ...], str]:
    """Digest of every .py file that will run, and the 40-hex revision of a code repository.

    Raises RemoteCodeError when the code was not allowed, is not there or is not pinned.
    """
    auto_map = config.get("auto_map") or {}
    references = {
        str(name)
        for value in auto_map.values()
        for name in (value if isinstance(value, list) else [value])
        if name
    }
    if not spec.trust_remote_code:
        raise RemoteCodeError(
            "this checkpoint is of an unknown layout and brings code of its own",
            evidence=f"config.json auto_map: {', '.join(sorted(references)) or 'none'}",
            fix="read that code, then allow it with --trust-remote-code",
        )
    repositories = {name.split("--", 1)[0] for name in references if "--" in name}
    if not repositories:
        paths, root, revision = sorted(folder.rglob("*.py")), folder, ""
    elif len(repositories) == 1 and spec.code_revision:
        root, revision = hub.fetch(repositories.pop(), spec.code_revision, hub.CODE)
        paths = sorted(root.rglob("*.py"))
    else:
        raise RemoteCodeError(
            "the remote code is not pinned",
            evidence=f"auto_map names code in: {', '.join(sorted(repositories))}",
            fix="set load.code_revision in the recipe (or --code-revision) to the 40-hex commit "
            "that you read, or put the .py files beside the weights and name them in auto_map",
        )
    if not paths:
        raise RemoteCodeError(
            "there is no code to run",
            evidence=f"auto_map names {', '.join(sorted(references)) or 'nothing'}; "
            f"no .py file in {root}",
            fix="put the .py files beside the weights, or build without --trust-remote-code",
        )
    return tuple(file_digest(path, root=root) for path in paths), revision


def check_pinned(spec: LoadSpec, *, from_hub: bool) -> None:
    """Raise RemoteCodeError when code would run from a hub at whatever revision is newest."""
    if spec.trust_remote_code and from_hub and not spec.revision:
        raise RemoteCodeError(
            "remote code runs from a pinned revision only",
            evidence=f"load.model = {spec.model!r} has no revision",
            fix="set load.revision in the recipe (or --revision) to a 40-hex commit",
        )


def assemble(folder: Path, spec: LoadSpec) -> torch.nn.Module:
    """The remote class with its weights, float32, in eval mode, repaired and checked."""
    import torch
    from transformers import AutoModel

    with quiet_transformers(), _import_repair():
        try:
            model, report = AutoModel.from_pretrained(
                folder,
                trust_remote_code=True,
                code_revision=spec.code_revision or None,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except ImportError as error:
            raise RemoteCodeError(
                "the checkpoint's own code cannot be imported",
                evidence=str(error).strip(),
                fix="install what it needs, or build without --trust-remote-code",
            ) from error
        check_report(report)
        _repair_buffers(model, folder, spec)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
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


def _repair_buffers(model: Any, folder: Path, spec: LoadSpec) -> None:
    """Non-persistent buffers are not in the file, and transformers 5 leaves them uninitialised.

    Seen in the original code: inv_freq = [1.2e-38, 0, ...] and silently wrong vectors. Each such
    buffer is copied from an instance of the same class built on the CPU from the config alone,
    caches of what was computed from it are dropped, and RoPE frequencies are checked.
    """
    import torch
    from transformers import AutoModel

    stale = {
        name
        for prefix, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
        for name in [f"{prefix}.{leaf}".lstrip(".")]
    }
    if stale:
        fresh = AutoModel.from_config(
            model.config, trust_remote_code=True, code_revision=spec.code_revision or None
        )
        values = dict(fresh.named_buffers())
        for name, buffer in model.named_buffers():
            if name in stale and buffer is not None:
                buffer.data = values[name].detach().clone()
    for name, module in model.named_modules():
        if hasattr(module, "_compute_inv_freq") and hasattr(module, "inv_freq"):
            wanted = module._compute_inv_freq(torch.device("cpu"))
            module._seq_len_cached = 0
            for cache in ("_cos_cached", "_sin_cached", "_cos_k_cached", "_sin_k_cached"):
                if hasattr(module, cache):
                    setattr(module, cache, None)
            _check_frequencies(name, module.inv_freq, wanted)


def _check_frequencies(name: str, found: Any, wanted: Any) -> None:
    """RoPE frequencies fall from 1 towards 0 (RoFormer, arXiv 2104.09864) and are as computed."""
    import torch

    good = (
        found.shape == wanted.shape
        and bool(torch.isfinite(found).all())
        and bool(torch.allclose(found.float(), wanted.float(), rtol=1e-6, atol=0))
        and float(found.flatten()[0]) == 1.0
        and bool((found.flatten()[1:] < found.flatten()[:-1]).all())
    )
    if not good:
        raise RemoteCodeError(
            f"the repair of '{name}.inv_freq' did not hold",
            evidence=f"it starts {found.flatten()[:4].tolist()}, "
            f"its own formula gives {wanted.flatten()[:4].tolist()}",
            fix="build without --trust-remote-code, and report this checkpoint",
        )


@contextlib.contextmanager
def reference(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, task: str
) -> Iterator[Runner]:
    """The checkpoint's own forward pass; for the original layout with the task's adapter_mask."""
    import torch

    model: Any = assemble(folder, spec)
    extra: dict[str, Any] = {}
    index = list(config.get("lora_adaptations", ())).index(task) if task != tasks.NONE else None

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

    yield run
    model.to("meta")
