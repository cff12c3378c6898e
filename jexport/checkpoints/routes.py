"""A Router of sentence-transformers: other modules for queries than for documents.

One route is opened as a checkpoint of its own: a folder of links whose modules.json has the route's
modules in the Router's place. Who reads it needs to know nothing of routes.

Source: `Router` of sentence-transformers 6.2 (`_resolve_route_name`, `load`, `save`).
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import sha256_of
from jexport.checkpoints import keys, sentence_files, tokenizer_backend
from jexport.checkpoints.sentence_files import MODULES, Module
from jexport.checkpoints.transformer_files import is_there, optional_json
from jexport.errors import CheckpointError, PromptError, UnsupportedCheckpointError, nearest

KINDS = ("Router", "Asym")
"""Asym is its name before version 5.1."""

CONFIG, OLD_CONFIG = "router_config.json", "config.json"
WEIGHTS = (".safetensors", ".bin")
TEXT = "text"
SIDES = ("query", "document")
"""The tasks that encode_query and encode_document ask a Router for."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A checkpoint as one of its uses sees it.

    Args:
        folder: the checkpoint's own, or one that has the route's modules only.
        routes: uses that the Router has a route for; empty without a Router.
        side: 'query' or 'document' where the route is that of one side of retrieval alone.
        files: of the checkpoint's own folder, what belongs to it beside the route's own files: the
            lists of modules, and the weights of the other routes.
    """

    folder: Path
    routes: tuple[str, ...] = ()
    side: str = ""
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Router:
    """A Router's own file.

    Args:
        path: of the file.
        types: class by module id.
        structure: module ids by route.
        mappings: route by (task, modality); None stands for any.
        default: the route where no task is named, None for none.
    """

    path: Path
    types: Mapping[str, str]
    structure: Mapping[str, list[str]]
    mappings: Mapping[Any, str]
    default: str | None

    def route(self, task: str) -> str | None:
        """The route of texts of a task, '' for no task; None where there is none."""
        named = task or None
        for key in ((named, TEXT), (named, None), (None, TEXT), (None, None)):
            if key in self.mappings:
                return self.mappings[key]
        if task in self.structure:
            return task
        if TEXT in self.structure:
            return TEXT
        return None if task else self.default

    @property
    def uses(self) -> tuple[str, ...]:
        """The tasks that have a route."""
        mapped = [
            key[0]
            for key in self.mappings
            if isinstance(key, tuple) and len(key) == 2 and key[0] and key[1] in (None, TEXT)
        ]
        named = (*self.structure, *mapped, *(one for one in SIDES if self.route(one)))
        return tuple(dict.fromkeys(named))


def resolve(folder: Path, use: str) -> Routed:
    """The checkpoint, or its Router's route for a use.

    Args:
        folder: the checkpoint's own.
        use: the task that the Router is asked for, '' for its default route.

    Returns:
        The folder itself where modules.json has no Router.

    Raises:
        PromptError: the Router has no such route, or needs to be told one.
        CheckpointError: its file is missing or broken.
        UnsupportedCheckpointError: it is nested, or has a key that would change a vector.
    """
    listed = sentence_files.modules(folder) or ()
    places = [at for at, one in enumerate(listed) if _is_router(one)]
    if not places:
        return Routed(folder=folder)
    if len(places) > 1:
        raise _nested(", ".join(listed[at].type for at in places))
    router = _read(folder, listed[places[0]])
    route = router.route(use)
    if route is None:
        raise _no_route(use, router.uses)
    home = Path(listed[places[0]].home)
    own = [
        Module(type=kind, kind=kind.rsplit(".", 1)[-1], home=(home / one).as_posix())
        for one in router.structure[route]
        for kind in (router.types[one],)
    ]
    if any(_is_router(one) for one in own):
        raise _nested(f"route '{route}' of {router.path.name}")
    modules = [*listed[: places[0]], *own, *listed[places[0] + 1 :]]
    sides = {side: router.route(side) for side in SIDES}
    is_apart = len(set(sides.values())) > 1
    return Routed(
        folder=_linked(folder, tuple(modules)),
        routes=router.uses,
        side=next((side for side in SIDES if is_apart and sides[side] == route), ""),
        files=(folder / MODULES, router.path, *_weights(folder / home, router)),
    )


def has_router(folder: Path) -> bool:
    """Whether modules.json has a Router.

    Args:
        folder: the checkpoint's own.

    Returns:
        False also without modules.json.
    """
    return any(_is_router(one) for one in sentence_files.modules(folder) or ())


def _is_router(module: Module) -> bool:
    return module.kind in KINDS and module.type.startswith("sentence_transformers.")


def _read(folder: Path, module: Module) -> _Router:
    home = folder / module.home
    path = next((home / name for name in (CONFIG, OLD_CONFIG) if is_there(home / name)), None)
    content = optional_json(path) if path else {}
    where = f"{module.home}/{path.name}" if path else f"{module.home}/{CONFIG}"
    keys.check(keys.ROUTER, content, where=where)
    types: Any = content.get("types")
    structure: Any = content.get("structure")
    parameters: Any = content.get("parameters") or {}
    is_whole = (
        isinstance(types, dict)
        and isinstance(structure, dict)
        and isinstance(parameters, dict)
        and bool(structure)
        and all(
            isinstance(one, list) and one and set(one) <= set(types) for one in structure.values()
        )
    )
    if path is None or not is_whole:
        raise CheckpointError(
            "the Router module does not say its routes",
            evidence=f"{where}: types {types!r:.200}, structure {structure!r:.200}",
            fix="download the checkpoint again",
        )
    keys.check(keys.ROUTER_PARAMETERS, parameters, where=f"{where}: parameters")
    mappings = _mappings(parameters.get("route_mappings") or {})
    default = parameters.get("default_route")
    lacking = {one for one in (default, *mappings.values()) if one is not None} - set(structure)
    if lacking:
        raise CheckpointError(
            "the Router names a route that it does not have",
            evidence=f"{where}: {', '.join(sorted(map(str, lacking)))}; it has: "
            f"{', '.join(structure)}",
            fix="name one of its routes there",
        )
    if default is None and parameters.get("allow_empty_key", True):
        default = next(iter(structure))
    return _Router(path=path, types=types, structure=structure, mappings=mappings, default=default)


def _mappings(stated: Mapping[str, str]) -> dict[Any, str]:
    """Routes by (task, modality); the library skips a key that it cannot read."""
    mappings: dict[Any, str] = {}
    for key, route in stated.items():
        try:
            mappings[ast.literal_eval(key)] = route
        except (ValueError, SyntaxError, TypeError):
            continue
    return mappings


def _weights(home: Path, router: _Router) -> list[Path]:
    """The weight files of all routes, so that the artifacts of two routes know each other's."""
    return sorted(
        path
        for one in router.types
        for path in (home / one).glob("*")
        if path.suffix in WEIGHTS and path.is_file()
    )


@functools.cache
def _linked(folder: Path, modules: tuple[Module, ...]) -> Path:
    """A folder of links to all that a checkpoint has, with another modules.json."""
    listing = [
        {"idx": at, "name": str(at), "path": one.home, "type": one.type}
        for at, one in enumerate(modules)
    ]
    own = folder.resolve()
    place = tokenizer_backend.work_dir() / f"route-{sha256_of([str(own), listing])[:32]}"
    place.mkdir()
    for path in own.iterdir():
        if path.name != MODULES:
            (place / path.name).symlink_to(path)
    (place / MODULES).write_text(json.dumps(listing), encoding="utf-8")
    return place


def _no_route(use: str, uses: tuple[str, ...]) -> PromptError:
    if not use:
        return PromptError(
            "this checkpoint embeds each use by other modules, and none of them is the default",
            evidence=f"its Router has: {', '.join(uses)}",
            fix=f"name one: --use {' or --use '.join(uses[:2])}",
        )
    return PromptError(
        f"unknown use '{use:.80}'",
        evidence=f"this checkpoint's Router has: {', '.join(uses)}",
        fix=nearest(use, uses),
    )


def _nested(evidence: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "this sentence-transformers model has a Router beside or inside of another",
        evidence=evidence,
        fix="save it with one Router",
    )
