"""What torch raised while a model ran or was traced, as an error that names module and operator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from jexport.errors import UnsupportedGraphError

OPERATOR = re.compile(
    r"\b(?:torch\.ops\.)?(aten|prims|prim|higher_order|torchvision)(?:\.|::)(\w+)"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m|\[\d+m")
FRAME = re.compile(r'File "[^"]*/((?:transformers|transformers_modules)/[^"]+)", line (\d+)')
NOISE = ("- ", "(Refer", "## ", "While executing", "Use tlparse", "Original traceback")
EVIDENCE_LINES = 3
TEXT_ENCODER = "give a text encoder (BERT, XLM-R, MiniLM ...)"
FIX = (
    "build with --target hf or vllm, which take the weights and no graph, or give an encoder that"
    " exports (docs/other-models.md says which)"
)


def is_the_machines(error: Exception) -> bool:
    """Whether an error is about memory or the disk, and says nothing about a model.

    transformers also raises OSError, without a number, for a file that it misses.

    Args:
        error: what was raised.

    Returns:
        True for MemoryError and for an OSError with a number.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno is not None
    )


def unsupported(error: BaseException, module: Any, *, what: str = "") -> UnsupportedGraphError:
    """The error to raise for whatever torch, its exporter or a model's own code raised.

    Args:
        error: what was raised; its causes are read too.
        module: the torch module that was run.
        what: the headline; '' for one about the graph.

    Returns:
        The error, with the place in the module and the operator where they are known.
    """
    chain = list(_chain(error))
    text = "\n".join(str(one) for one in chain)
    place = _place(chain, module) or _file(text)
    operator = _operator(text)
    root = chain[-1]
    experts = _experts(module) if isinstance(module, torch.nn.Module) else ""
    lines = [
        f"in {place}" if place else "",
        f"at operator {operator}" if operator else "",
        f"a mixture of experts ({experts}): which of them run depends on the text" * bool(experts),
    ]
    message = _first_lines(str(root)) or _first_lines(text) or "no message"
    return UnsupportedGraphError(
        what or f"{type(getattr(module, 'model', module)).__name__} cannot be exported as a graph",
        evidence="\n".join(
            [line for line in lines if line] + [f"{type(root).__name__}: {message}"]
        ),
        fix=TEXT_ENCODER if what else FIX,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, the first cause last."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _place(chain: list[BaseException], module: Any) -> str:
    """The innermost part of the module that was at work, by name, class and line of code."""
    if not isinstance(module, torch.nn.Module):
        return ""
    names = {id(one): name for name, one in module.named_modules()}
    for error in reversed(chain):
        place = ""
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if id(owner) in names and isinstance(owner, torch.nn.Module):
                name = names[id(owner)].removeprefix("model.") or "the model"
                file = trace.tb_frame.f_code.co_filename.rsplit("/", 1)[-1]
                place = f"{name} ({type(owner).__name__}), {file} line {trace.tb_lineno}"
            trace = trace.tb_next
        if place:
            return place
    return ""


def _experts(module: torch.nn.Module) -> str:
    """The class of the first module that holds experts, '' for a dense model."""
    kinds = (type(one).__name__ for one in module.modules())
    return next((kind for kind in kinds if "Expert" in kind or "SparseMoe" in kind), "")


def _file(text: str) -> str:
    """The model's own line of code, where a message quotes a traceback."""
    frames: list[tuple[str, str]] = FRAME.findall(text)
    return f"{frames[-1][0]} line {frames[-1][1]}" if frames else ""


def _operator(text: str) -> str:
    match = OPERATOR.search(text)
    return f"{match[1]}::{match[2]}" if match else ""


def _first_lines(text: str) -> str:
    """The first lines of a message that say something."""
    lines = [COLOUR.sub("", line).strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(NOISE)]
    return " ".join(kept[:EVIDENCE_LINES])[:400]
