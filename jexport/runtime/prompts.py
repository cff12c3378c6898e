"""Which prompt goes before a text: sentence-transformers' rules over an artifact's own prompts.

Knows no tokenizer and no engine.
"""

from __future__ import annotations

from jexport.errors import PromptError, UnknownTaskError, nearest
from jexport.tasks import ALWAYS, COUNTERPART, DOCUMENT_NAMES, QUERIES, QUERY_NAMES
from jexport.types import Embedding

__all__ = ["ALWAYS", "DOCUMENT_NAMES", "QUERY_NAMES", "has_sides", "name_for", "text"]


def text(embedding: Embedding, prompt: bool | str, name: str | None) -> str:
    """The prompt to put before each text.

    Args:
        embedding: of the artifact.
        prompt: True takes the prompt of that name, or the default one; False none; a str that text.
        name: of a prompt of the artifact, None for its default.

    Returns:
        The prompt, '' for none.

    Raises:
        PromptError: the artifact has no prompt of that name, or `prompt` says otherwise.
    """
    if name is None:
        if isinstance(prompt, str):
            return prompt
        return embedding.prompt if prompt else ""
    if prompt is not True:
        raise PromptError(
            "a prompt and the name of a prompt were given",
            evidence=f"prompt = {prompt!r:.80}, prompt_name = {name!r:.80}",
            fix="give one of them",
        )
    named = {**ALWAYS, **embedding.prompts}
    if name not in named:
        raise PromptError(
            f"this artifact has no prompt named {name!r:.80}",
            evidence=f"it has: {', '.join(map(repr, named))}",
            fix=nearest(name, named),
        )
    return named[name]


def name_for(embedding: Embedding, names: tuple[str, ...]) -> str:
    """The prompt name that `encode_query` or `encode_document` takes.

    Args:
        embedding: of the artifact.
        names: QUERY_NAMES or DOCUMENT_NAMES; the first that the artifact has is taken.

    Returns:
        A name that `text` takes.

    Raises:
        UnknownTaskError: the artifact's weights are those of the other side of retrieval.
    """
    is_query = names is QUERY_NAMES
    if embedding.task in COUNTERPART and (embedding.task == QUERIES) is not is_query:
        raise UnknownTaskError(
            f"this artifact does not embed {'queries' if is_query else 'documents'}",
            evidence=f"it is of the task '{embedding.task}'",
            fix=f"open the artifact of the task '{COUNTERPART[embedding.task]}'",
        )
    if embedding.side and (embedding.side in QUERY_NAMES) is not is_query:
        other = "query" if is_query else "document"
        raise UnknownTaskError(
            f"this artifact does not embed {'queries' if is_query else 'documents'}",
            evidence=f"its weights are those of the checkpoint's route for '{embedding.side}'",
            fix=f"open the other artifact of this checkpoint, or build it: --use {other}",
        )
    named = {**ALWAYS, **embedding.prompts}
    return next(name for name in names if name in named)


def has_sides(embedding: Embedding) -> bool:
    """Whether queries and documents get prompts of their own.

    Args:
        embedding: of the artifact.

    Returns:
        True where one of the names has a prompt that is not empty.
    """
    return any(embedding.prompts.get(name) for name in (*QUERY_NAMES, *DOCUMENT_NAMES))
