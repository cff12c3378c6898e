"""Servers: who else loads an artifact, from which versions on, and the one line that starts it.

`jexport serve-with` prints the line, `make test-servers` runs it, and docs/servers.md shows it.
This package knows what an artifact says about itself; it imports and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jexport.errors import ServingError, nearest
from jexport.serving.servers.ways import ENGINES, Way

FOR_CUDA = ("jexport", "onnxruntime", "triton")
"""Engines whose line opens an onnx artifact that is made for CUDA alone; the others' open a CPU."""

GRAPH_TOKENIZED = ("openvino-genai", "openvino-model-server")
"""Engines that tokenise with openvino_tokenizer.xml; all others of that target take the json."""

JINA_TYPES = ("jina_embeddings_v3", "nomic_bert")
"""What config.json of a merged jina-embeddings-v3 says that it is."""


def is_for_cuda(content: Mapping[str, Any]) -> bool:
    """Whether an onnx artifact with this manifest runs on CUDA and nowhere else.

    Args:
        content: the manifest's.

    Returns:
        False for every other target, though it may need a GPU, too.
    """
    return content["target"] == "onnx" and "cuda" in content["engine"]["facts"]


def way(name: str, content: Mapping[str, Any]) -> Way:
    """How an engine loads an artifact.

    Args:
        name: the engine's, a key of ENGINES.
        content: the artifact's manifest.

    Returns:
        The way for its target.

    Raises:
        ServingError: the engine is not known, or does not load such artifacts.
    """
    if name not in ENGINES:
        raise ServingError(
            f"no engine is called '{name}'",
            evidence=f"there are: {', '.join(ENGINES)}",
            fix=nearest(name, ENGINES),
        )
    engine = ENGINES[name]
    target = content["target"]
    form = engine.ways.get(target)
    if form is None:
        able = [other for other, one in ENGINES.items() if target in one.ways]
        raise ServingError(
            f"{engine.title} does not load artifacts of the target '{target}'",
            evidence=f"it loads: {', '.join(engine.ways)}; '{target}' is for: {', '.join(able)}",
            fix=f"build one that it loads: --target {next(iter(engine.ways))}",
        )
    served_by = content["engine"]["facts"].get("served_by", [name])
    if name not in served_by and name != "jexport":
        raise ServingError(
            f"{engine.title} has no class for this artifact's architecture",
            evidence=f"it is a {content['engine']['facts']['model_type']} that reads both ways",
            fix=f"serve it with {' or '.join(served_by)}, or build --target onnx",
        )
    if is_for_cuda(content) and name not in FOR_CUDA:
        raise ServingError(
            f"the line of {engine.title} opens an artifact on the CPU, and this one is for CUDA",
            evidence=f"graph steps: {', '.join(content['engine']['facts']['cuda']['steps'])}",
            fix=f"serve it with {' or '.join(FOR_CUDA)}, or build it without compile.cuda",
        )
    modules = content["embedding"].get("modules")
    if modules and form.pools_itself:
        able = [one for one, other in ENGINES.items() if target in other.ways]
        raise ServingError(
            f"{engine.title} pools token vectors itself, and would leave modules of this one out",
            evidence="; ".join(modules),
            fix="serve it with "
            + " or ".join(one for one in able if not ENGINES[one].ways[target].pools_itself),
        )
    pooling = content["embedding"]["pooling"]
    if form.poolings and pooling not in form.poolings:
        raise ServingError(
            f"{engine.title} cannot pool as this artifact needs",
            evidence=f"the artifact pools '{pooling}', {engine.title}: {', '.join(form.poolings)}",
            fix="use another engine: `jexport serve-with jexport ARTIFACT` is one that does",
        )
    return form


def versions(name: str, content: Mapping[str, Any]) -> Mapping[str, str]:
    """Packages, and the versions of them that load an artifact.

    Args:
        name: the engine's.
        content: the artifact's manifest.

    Returns:
        Versions as pip writes them, by package; empty where none is known.

    Raises:
        ServingError: as `way` does.
    """
    offered = way(name, content)
    of_jina = content["engine"]["facts"].get("model_type") in JINA_TYPES
    return {**offered.needs, **(offered.jina if of_jina else {})}


def notes(name: str, content: Mapping[str, Any]) -> list[str]:
    """What the line does not say: versions, prompts, normalisation and size, the engine's own.

    Args:
        name: the engine's.
        content: the artifact's manifest.

    Returns:
        A line each.

    Raises:
        ServingError: as `way` does.
    """
    how, known = way(name, content), versions(name, content)
    prompt = content["embedding"]["prompt"]
    lines = []
    if known:
        lines.append(
            "needs " + ", ".join(f"{package} {version}" for package, version in known.items())
        )
    if prompt and not how.prompts:
        lines.append(f"does not put the prompt before texts; put there yourself: {prompt!r}")
    graph = content["engine"]["facts"].get("tokenizer_graph", {})
    if name in GRAPH_TOKENIZED and graph.get("differs_on_characters"):
        listed = ", ".join(graph["differs_on_characters"])
        lines.append(f"its tokenizer is a graph, which gives other ids for texts with {listed}")
    return [*lines, *_differences(how, content), *([how.note] if how.note else [])]


def _differences(offered: Way, content: Mapping[str, Any]) -> list[str]:
    """Where the engine does otherwise than the checkpoint does."""
    embedding = content["embedding"]
    lines = []
    named = {
        name: text
        for name, text in embedding.get("prompts", {}).items()
        if text and text != embedding["prompt"]
    }
    if named and offered.named:
        lines.append(f"other prompts ({', '.join(named)}): {offered.named}")
    elif named:
        listed = ", ".join(f"{name} {text!r}" for name, text in named.items())
        lines.append(f"knows no prompt by its name; put there yourself: {listed}")
    if offered.normalizes and not embedding["normalize"]:
        lines.append(
            "brings every vector to length 1, which the checkpoint does not "
            f"({embedding.get('similarity', 'cosine')}): {offered.normalizes}"
        )
    if embedding.get("truncate_dim") and not offered.cuts:
        lines.append(
            f"gives all {embedding['dimension']} dimensions; the checkpoint cuts vectors to the "
            f"first {embedding['truncate_dim']}"
        )
    return lines


def check_version(name: str, content: Mapping[str, Any], package: str, version: str) -> None:
    """Refuse a version of the engine, or of what it stands on, not known to load an artifact.

    Args:
        name: the engine's.
        content: the artifact's manifest.
        package: one of those that `versions` names.
        version: as pip writes it.

    Raises:
        ServingError: names the versions that do; also as `way` does.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    known = versions(name, content)
    title = ENGINES[name].title
    if package not in known:
        raise ServingError(
            f"which versions of '{package}' load this artifact is not known",
            evidence=f"for {title} it depends on: {', '.join(known) or 'no package'}",
            fix=nearest(package, known) if known else "leave the version away",
        )
    try:
        number = Version(version)
    except InvalidVersion as error:
        raise ServingError(
            f"'{version}' is no version",
            evidence=str(error),
            fix=f"write it as pip does: {package}==1.2.3",
        ) from error
    if not SpecifierSet(known[package]).contains(number, prereleases=True):
        raise ServingError(
            f"{package} {version} is not known to load this artifact",
            evidence=f"target '{content['target']}'; versions that do: {known[package]}",
            fix=f'pip install "{package}{known[package]}", or build for another target',
        )
