"""Uses: which of a checkpoint's prompts, or a Router's routes, an artifact is built for.

`query` and `document` are those of sentence-transformers' encode_query and encode_document; any
other use is a prompt by its name, or a route. Knows no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jexport import tasks
from jexport.errors import PromptError, nearest
from jexport.types import Embedding


def names(embedding: Embedding, routes: Sequence[str] = ()) -> tuple[str, ...]:
    """The uses that there are.

    Args:
        embedding: with the checkpoint's prompts.
        routes: of its Router, empty without one.

    Returns:
        Routes first; `query` and `document` as soon as any prompt is not empty, as the library then
        has both. Empty where no text is embedded otherwise than the rest.
    """
    prompts = [name for name, text in embedding.prompts.items() if text]
    sides = tasks.ALWAYS if prompts and not routes else ()
    return tuple(dict.fromkeys((*routes, *sides, *(() if routes else prompts))))


def chosen(embedding: Embedding, use: str, routes: Sequence[str] = ()) -> Embedding:
    """The embedding with a use's prompt before each text, unless a caller names another.

    Args:
        embedding: with the checkpoint's prompts.
        use: 'query', 'document', another prompt or a route; '' leaves it as it is.
        routes: of its Router, empty without one.

    Returns:
        The embedding for that use; its prompts are the same.

    Raises:
        PromptError: the checkpoint has no such use; names those that it has.
    """
    if not use:
        return embedding
    if embedding.task in tasks.COUNTERPART:
        raise PromptError(
            f"the task '{embedding.task}' has a use already: --use goes with another",
            evidence=f"this checkpoint has a task for each side: {', '.join(tasks.COUNTERPART)}",
            fix="leave --use away, and choose by --task",
        )
    offered = names(embedding, routes)
    if use not in offered:
        raise PromptError(
            f"unknown use '{use:.80}'",
            evidence=f"this checkpoint has: {', '.join(offered)}"
            if offered
            else f"this checkpoint has no prompts, so that one artifact serves every use (task "
            f"'{embedding.task}')",
            fix=nearest(use, offered)
            if offered
            else "leave --use away; or, where the authors' model card asks for prompts, give them "
            f'in a recipe: [load.prompts] {use if use.isidentifier() else "query"} = "..."',
        )
    prompts = {**tasks.ALWAYS, **embedding.prompts}
    name = use
    if use in tasks.ALWAYS:
        sides = tasks.QUERY_NAMES if use == tasks.QUERY_NAMES[0] else tasks.DOCUMENT_NAMES
        name = next(one for one in sides if one in prompts)
    prompt = prompts.get(name, "")
    return dataclasses.replace(
        embedding, use=use, prompt=prompt, default_prompt_name=name if prompt else ""
    )
