"""What both examples of retrieval look for, and where: texts, questions, the words of a command."""

from __future__ import annotations

import argparse

TEXTS = (
    ("harbour", "The ferry to the island leaves at seven in the morning and at noon."),
    ("kitchen", "Soak the beans overnight, then simmer them with a bay leaf for two hours."),
    ("garden", "Prune the roses in late winter, before the buds begin to swell."),
    ("library", "Borrowed books may be renewed twice unless another reader has asked for them."),
    ("workshop", "Tighten the brake cable until the pads nearly touch the rim of the wheel."),
)
QUESTIONS = (
    "When does the boat go?",
    "How long do I cook dried beans?",
    "Can I keep a book for longer?",
)
MADE_BY_DEMO = "artifacts/all-MiniLM-L6-v2/none/onnx-fp32/latest"


def artifacts(framework: str) -> tuple[str, str | None]:
    """The artifacts that the command line names, for questions and for texts (None: the same)."""
    parser = argparse.ArgumentParser(description=f"Retrieve with {framework}.")
    parser.add_argument("queries", nargs="?", default=MADE_BY_DEMO, help="artifact for questions")
    parser.add_argument("documents", nargs="?", help="artifact for texts; default: the same")
    words = parser.parse_args()
    return words.queries, words.documents
