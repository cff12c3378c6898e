"""From an artifact's folder to an Embedder: verify, read the manifest, open the engine.

Needs numpy, tokenizers and the target's engine only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport import targets
from jexport.artifacts import manifest
from jexport.artifacts.manifest import OPTIONAL
from jexport.errors import (
    ArtifactError,
    DeviceError,
    JexportError,
    UnknownTargetError,
    UnknownTaskError,
    UnsupportedGraphError,
)
from jexport.publishing import signing
from jexport.runtime.embedder import Embedder
from jexport.runtime.tokenise import TextTokenizer
from jexport.tasks import named_prompts
from jexport.types import CompiledModel, Embedding, Manifest, Runner, Signature, TensorSpec


def open_artifact(
    path: str | Path,
    *,
    task: str = "",
    device: str = "auto",
    threads: int = 0,
    verify: bool | signing.Policy = True,
    cuda_graphs: bool = False,
) -> Embedder:
    """Open an artifact's folder for embedding; close it, or use it in a `with` block.

    Args:
        path: a folder, or the ref of a published artifact ("oci://...@sha256:..."), which is pulled
            into the user's cache first; a digest that is there already needs no network. That cache
            keeps JEXPORT_CACHE_GIB (32) of what was opened last, and whatever is open in any
            process.
        task: refuse an artifact of another task; '' takes any.
        device: 'auto' (a GPU when the engine sees one that starts), 'cpu', 'cuda' or, for onnx,
            'cuda:1' and so on.
        threads: 0 for all cores.
        verify: check every file's SHA-256 first (about a second a GB); without it only the manifest
            is read. With a signing.Policy the signature and provenance beside the artifact are
            checked as well, all before any engine is imported.
        cuda_graphs: on a GPU, replay small batches of the same shape as CUDA graphs, for the
            shortest wait of one text; each shape keeps its memory, and batches take turns.

    Returns:
        An Embedder.

    Raises:
        UnknownTaskError: it is of another task.
        ArtifactError: a file is missing, changed or extra.
        SignatureError: it is not signed as `verify` asks.
        DependencyError: a library is missing.
        TokenizerError: its tokenizer cannot be read.
        ValueError: another device. For a ref also what pull.run() raises, and CacheError.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_local(path))
        if folder.is_dir():
            folder = folder.resolve()  # what is opened is what was checked, whatever `latest` does
        content = _manifest(folder, verify).content
        _check_task(task, content, folder)
        source = _Source(_pinned(path, folder), device, threads, verify, cuda_graphs)
        return _opened(folder, content, source, stack)


@dataclass(frozen=True)
class _Source:
    """What was opened and how, as `open_artifact` was asked; called, it opens it again.

    place: the folder, absolute and without links, or a ref with its digest: what a name stands for
    may have changed in the meantime.
    """

    place: str
    device: str
    threads: int
    verify: bool | signing.Policy
    cuda_graphs: bool

    def __call__(self) -> Embedder:
        """Open it again, in this process. Raises as `open_artifact`, and DeviceError."""
        if self.device != "cpu" and _holds_a_parents_gpu():
            raise DeviceError(
                "a GPU cannot be used in a process that was forked from one that used it",
                evidence="CUDA was started before the fork",
                fix="start processes with multiprocessing's 'spawn' (an Embedder can be passed to "
                "them), fork before the first artifact is opened, or use device='cpu'",
            )
        return open_artifact(
            self.place,
            device=self.device,
            threads=self.threads,
            verify=self.verify,
            cuda_graphs=self.cuda_graphs,
        )


def _pinned(path: str | Path, folder: Path) -> str:
    if not (isinstance(path, str) and "://" in path):
        return str(folder.resolve())
    from jexport.publishing import registries

    # A pulled release lies in a folder that is named by its digest (pull_cache.py).
    return registries.parse(path).at(folder.parent.name.replace("-", ":", 1))


def _holds_a_parents_gpu() -> bool:
    """Whether an NVIDIA device's file was open when this process was forked (Linux)."""
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/nvidia"):
                return True
    return False


def _opened(folder: Path, content: Any, wish: _Source, held: contextlib.ExitStack) -> Embedder:
    """held: what is to be released when the Embedder is closed; taken over at the end."""
    target = _target(content["target"], folder)
    if content["engine"]["facts"].get("portable") is True:
        raise ArtifactError(
            f"artifact {folder} has no engine yet",
            evidence=f"it was built with --until compile, for {target.name}",
            fix=f"on a machine with a GPU: jexport compile {folder}",
        )
    needs = target.requirements
    targets.check_installed(needs.run, extra=needs.extra, purpose="opening this artifact")
    compiled = compiled_model(folder, content)
    absent = [name for name in compiled.files if not (folder / name).is_file()]
    if absent:
        raise ArtifactError(
            f"artifact {folder} is not whole",
            evidence=f"missing: {', '.join(absent)}",
            fix="fetch it again, or build it again with `jexport build`",
        )
    embedding = embedding_of(content)
    tokenizer = TextTokenizer.open(folder, max_tokens=embedding.max_tokens)
    with _names_the_artifact(folder):
        runner = held.enter_context(_opener(target, wish)(compiled, wish.device, wish.threads))
    stack = contextlib.ExitStack()

    def streams() -> Sequence[Runner]:
        if target.runtime.streams is None:
            return ()
        return stack.enter_context(target.runtime.streams(compiled, wish.device, wish.threads))

    embedder = Embedder(
        tokenizer=tokenizer,
        runner=runner,
        embedding=embedding,
        outputs=[spec.name for spec in compiled.signature.outputs],
        release=stack.close,
        streams=streams,
        # A runner may say where it really runs: 'auto' is no device.
        batching=target.runtime.batching(compiled, getattr(runner, "device", wish.device)),
        reopen=wish,
    )
    stack.callback(held.pop_all().close)
    try:
        with _names_the_artifact(folder):
            embedder.warm_up()
    except BaseException:
        embedder.close()
        raise
    return embedder


@contextlib.contextmanager
def _names_the_artifact(folder: Path) -> Iterator[None]:
    """Note the folder on an engine's own errors."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, JexportError):
            error.add_note(f"jexport: opening {folder}; `jexport verify` checks its files")
        raise


def _opener(target: targets.Target, wish: _Source) -> Callable[..., Any]:
    """What opens the target's engine. Raises UnsupportedGraphError where it has no CUDA graphs."""
    if not wish.cuda_graphs:
        return target.runner
    if target.runtime.cuda_graphs is None:
        raise UnsupportedGraphError(
            f"the target '{target.name}' has no CUDA graphs to ask for",
            evidence="cuda_graphs=True",
            fix="leave cuda_graphs away, or use an artifact of the target onnx",
        )
    return target.runtime.cuda_graphs


def _manifest(folder: Path, verify: bool | signing.Policy) -> Manifest:
    if isinstance(verify, signing.Policy):
        return signing.verify(folder, verify)
    if not isinstance(verify, bool):  # a key's path would be true, and nothing would be checked
        raise TypeError(
            f"verify is {verify!r:.80}; give True, False or a jexport.publishing.signing.Policy"
        )
    return manifest.verify(folder) if verify else manifest.read(folder)


def _local(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    if isinstance(path, str) and "://" in path:
        from jexport.publishing import pull_cache

        return pull_cache.opened(path)
    return contextlib.nullcontext(Path(path))


def _check_task(task: str, content: Any, folder: Path) -> None:
    own = content["embedding"]["task"]
    if task not in ("", own, content["task"]):
        raise UnknownTaskError(
            f"artifact {folder} is not of the task '{task}'",
            evidence=f"it is of the task '{content['task']}': an artifact holds one, merged into "
            "its weights",
            fix=f"open the artifact of that task, or build it: jexport build --task {task}",
        )


def _target(name: str, folder: Path) -> targets.Target:
    try:
        return targets.load(name)
    except UnknownTargetError as error:
        raise ArtifactError(
            f"artifact {folder} is for an engine that this jexport does not have",
            evidence=f"its target is {name!r:.80}; there are: {', '.join(targets.names())}",
            fix="use the jexport that built it, or a newer one",
        ) from error


def embedding_of(content: Any) -> Embedding:
    """The Embedding that a manifest's content describes.

    Args:
        content: of the manifest, of any format that is read.

    Returns:
        How its texts become embeddings.
    """
    stated = content["embedding"]
    return Embedding(
        task=stated["task"],
        prompt=stated["prompt"],
        pooling=stated["pooling"],
        normalize=stated["normalize"],
        dimension=stated["dimension"],
        matryoshka=tuple(stated["matryoshka"]),
        max_tokens=stated["max_tokens"],
        **(_since_format_3(stated) if content["format"] >= 3 else _of_one_prompt(stated)),
        **_optional(stated),
    )


def _optional(stated: Any) -> dict[str, Any]:
    """Keys that are there only where they say something; a list of JSON as a tuple."""
    given = {key: stated[key] for key in OPTIONAL if key in stated}
    return {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}


def _since_format_3(stated: Any) -> dict[str, Any]:
    return {
        "prompts": dict(stated["prompts"]),
        "default_prompt_name": stated["default_prompt_name"],
        "similarity": stated["similarity"],
        "truncate_dim": stated["truncate_dim"],
        "include_prompt": stated["include_prompt"],
    }


def _of_one_prompt(stated: Any) -> dict[str, Any]:
    """What older manifests say: the task's prompt, under the names that its servers read."""
    task, prompt = stated["task"], stated["prompt"]
    return {
        "prompts": named_prompts(task, prompt),
        "default_prompt_name": task if prompt else "",
    }


def compiled_model(folder: Path, content: Any) -> CompiledModel:
    """The CompiledModel that a manifest's content describes.

    Args:
        folder: of the artifact.
        content: of its manifest.

    Returns:
        What the target's runner opens.
    """
    engine = content["engine"]

    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=s["name"], dtype=s["dtype"], shape=tuple(s["shape"]))
            for s in engine[key]
        )

    return CompiledModel(
        target=content["target"],
        precision=content["precision"],
        folder=folder,
        files=tuple(engine["files"]),
        signature=Signature(inputs=specs("inputs"), outputs=specs("outputs")),
        facts=engine["facts"],
    )
