"""The tasks of jina-embeddings-v3 and v5: names, order, prompts; and `none`, the plain model.

Facts: `lora_adaptations` and `task_instructions` in the checkpoint's config.json. A checkpoint's
own config wins over these where it has the keys; this table serves checkpoints that left them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jexport.errors import UnknownTaskError, nearest

NONE = "none"
"""The task of a model without adapters, or of a base model whose adapters are left aside."""

JINA_V3_PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "retrieval.query": "Represent the query for retrieving evidence documents: ",
        "retrieval.passage": "Represent the document for retrieval: ",
        "separation": "",
        "classification": "",
        "text-matching": "",
    }
)
"""Prompt of each task, in the order of the adapter index (trailing space included)."""

JINA_V5 = ("retrieval", "text-matching", "clustering", "classification")
"""Tasks of jina-embeddings-v5-text, each with an adapter of its own."""

JINA_V5_PROMPTS: Mapping[str, str] = MappingProxyType(
    {"query": "Query: ", "document": "Document: "}
)
"""Prompts of jina-embeddings-v5-text, for every task: "Document: " unless it is a query."""

COUNTERPART: Mapping[str, str] = MappingProxyType(
    {"retrieval.query": "retrieval.passage", "retrieval.passage": "retrieval.query"}
)
"""Tasks whose vectors are compared with each other's: one embeds queries, the other passages."""

QUERIES = "retrieval.query"

PROMPT_ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"retrieval.query": ("query",), "retrieval.passage": ("document", "passage")}
)
"""Names that sentence-transformers' encode_query and encode_document look for."""


QUERY_NAMES = ("query",)
DOCUMENT_NAMES = ("document", "passage", "corpus")
"""Names that `encode_query` and `encode_document` look for; the first that is there is taken."""

ALWAYS: Mapping[str, str] = MappingProxyType({"query": "", "document": ""})
"""Prompts that every SentenceTransformer has, empty unless the checkpoint says otherwise."""


def with_use(task: str, use: str) -> str:
    """The name of a task and a use of it: of folders, jobs and in a manifest's `task`.

    Args:
        task: of the checkpoint.
        use: which of its prompts or routes, '' for none in particular.

    Returns:
        'none.query', say; the task itself without a use.
    """
    return f"{task}.{use}" if use else task


def named_prompts(task: str, prompt: str) -> dict[str, str]:
    """A task's prompt under its own name and those that sentence-transformers looks for.

    Args:
        task: of the checkpoint.
        prompt: put before each text.

    Returns:
        The same prompt by each name.
    """
    return dict.fromkeys((task, *PROMPT_ALIASES.get(task, ())), prompt)


def check_task(task: str, known: Sequence[str]) -> None:
    """Refuse a task that the checkpoint does not have.

    Args:
        task: asked for.
        known: those that it has.

    Raises:
        UnknownTaskError: `task` is not in `known`; names the nearest.
    """
    if task not in known:
        raise UnknownTaskError(
            f"unknown task '{task}'",
            evidence=f"this checkpoint has: {', '.join(known)}",
            fix=nearest(task, known),
        )
