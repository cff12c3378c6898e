"""One model type: a tiny checkpoint, what sentence-transformers gives, what jexport makes of it."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = (
    "a",
    "Ferry to the island.",
    "The lighthouse keeper writes down the weather every morning before breakfast.",
    "Der Gärtner gießt die Rosen am Abend, wenn die Sonne nicht mehr brennt.",
    "Старый мост через реку открыли после долгого ремонта.",
    "港の灯台は夜になると光ります。",
    "Who repairs the clock in the tower when it stops during the winter? " * 3,
    "La bibliothèque prête des livres, des cartes et quelques instruments de musique. " * 4,
)
"""From three tokens to the checkpoints' limit."""

SAME = 1e-3
"""How far vectors may be from sentence-transformers', as a share of how far texts are apart."""

BUILT, REFUSED, WRONG, TRACEBACK = "built", "refused", "wrong", "traceback"
NO_JUDGE, NOT_TINY, TIMEOUT = "no judge", "not tiny", "timeout"


NEVER = (WRONG, TRACEBACK, TIMEOUT)
"""What no row may say."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one model type. judge: why sentence-transformers gives no vectors, if so."""

    model_type: str
    result: str
    detail: str = ""
    judge: str = ""
    exit_code: int = 0
    cosine: float = 0.0
    share: float = 0.0


def row(model_type: str, result: str, *, detail: str) -> dict[str, Any]:
    """A row as JSON-ready values."""
    return asdict(Row(model_type=model_type, result=result, detail=detail))


def run(model_type: str, folder: Path, **overrides: Any) -> dict[str, Any]:
    """The row of a model type as JSON-ready values. folder: a new one, to work in."""
    import tiny

    try:
        tiny.make(model_type, folder / "model", **overrides)
    except tiny.NotTinyError as error:
        return asdict(Row(model_type=model_type, result=NOT_TINY, detail=_line(error)))
    return asdict(compare(model_type, folder / "model", folder / "out"))


def compare(model_type: str, checkpoint: Path, out: Path) -> Row:
    """Build a checkpoint and compare its vectors with those of sentence-transformers."""
    from jexport import open_artifact, recipe
    from jexport.building import pipeline
    from jexport.errors import JexportError

    trouble, wanted = "", None
    try:
        wanted = judged(checkpoint)
    except Exception as error:  # whatever a model's own code raises for text alone
        trouble = f"{type(error).__name__}: {_line(error)}"
    chosen = recipe.from_table(
        {
            "name": "sweep",
            "load": {"model": str(checkpoint)},
            "validate": {"budget_tokens": 400, "max_tokens": 64},
        },
        origin="the sweep",
    )
    try:
        built = pipeline.build(chosen, task="none", target="onnx", out=out)
    except JexportError as error:
        return Row(
            model_type=model_type,
            result=REFUSED,
            judge=trouble,
            exit_code=error.exit_code,
            detail=f"{error.what}: {error.evidence}",
        )
    except Exception:
        return Row(
            model_type=model_type, result=TRACEBACK, judge=trouble, detail=traceback.format_exc()
        )
    if wanted is None:
        return Row(model_type=model_type, result=NO_JUDGE, judge=trouble)
    with open_artifact(built.path) as model:
        given = model.encode(list(TEXTS))
    cosine, share = distance(given, wanted)
    good = share <= SAME
    return Row(model_type=model_type, result=BUILT if good else WRONG, cosine=cosine, share=share)


def judged(checkpoint: Path) -> np.ndarray:
    """What the users' own library gives: float32 [texts, width], each text alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(checkpoint), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    vectors: np.ndarray = model.encode(list(TEXTS), batch_size=1, show_progress_bar=False)
    return vectors


def distance(given: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Lowest cosine, and the largest difference as a share of the texts' mean distance."""
    lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = float(((given * wanted).sum(1) / lengths).min())
    apart = np.linalg.norm(wanted[:, None] - wanted[None], axis=2)
    mean = float(apart[np.triu_indices(len(wanted), 1)].mean())
    return cosine, float(np.linalg.norm(given - wanted, axis=1).max() / mean)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
