"""Attention that sees a window only is compared on a text that is longer than it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from jexport.datasets import calibration
from jexport.errors import ParityError
from jexport.evaluation import reference_set
from jexport.evaluation.candidate import Candidate
from jexport.recipe import LoadSpec, ValidateSpec
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import load, validate
from jexport.types import TensorSpec

tiny: Any = runpy.run_path(str(Path(__file__).parents[1] / "sweep" / "tiny.py"))
FEW = ValidateSpec(budget_tokens=100, max_tokens=128)
WINDOW = 80
"""Longer than what fits this budget, as a window of 4,096 tokens is at full size."""

TEXT = (TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", "sequence", 32)),)


def of_window(folder: Path, window: int) -> Path:
    if not folder.exists():
        tiny["make"]("mistral", folder, sliding_window=window)
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"sliding_window": window}
    path.write_text(json.dumps(content))
    return folder


def test_a_wrong_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = of_window(tmp_path / "model", WINDOW)
    loaded = load.run(LoadSpec(model=str(right)), task="none")
    wrong = of_window(tmp_path / "model", 4 * WINDOW)
    artifact = load.run(LoadSpec(model=str(wrong)), task="none")
    candidate = Candidate(
        tokenizer=TextTokenizer.open(right, max_tokens=128),
        open=artifact.reference,
        embedding=artifact.embedding,
        outputs=TEXT,
    )
    texts = calibration.read("parity", "none")
    few = [one for one in texts.samples if len(one.text) < WINDOW and one.text.isascii()][:8]
    monkeypatch.setattr(reference_set.sampling, "within_budget", lambda *_, **__: few)

    def judged() -> Any:
        of_window(right, WINDOW)
        reference_set.run(loaded, LoadSpec(model=str(right)), texts, FEW, out_dir=tmp_path)
        of_window(wrong, 4 * WINDOW)
        return reference_set.read(tmp_path / reference_set.FILE)

    def run() -> Any:
        return validate.run(judged, candidate, spec=FEW, precision="fp32", out_dir=tmp_path)

    with pytest.raises(ParityError):
        run()
    # Without the text beyond it nothing shows: the gate is what finds it.
    monkeypatch.setattr(reference_set, "_edge", lambda *_: ([], []))
    with pytest.raises(ParityError, match="edge"):
        run()
    monkeypatch.setattr(reference_set, "_beyond_window", lambda *_: [])
    assert run().passed


def test_a_window_beyond_the_limit_needs_no_longer_text() -> None:
    class Library:
        window = 128

    assert reference_set._beyond_window(Library(), [], 128) == []  # type: ignore[arg-type]


def test_a_window_that_no_text_exceeds_is_an_error() -> None:
    class Library:
        window = 50

        def tokenize(self, texts: list[str]) -> list[list[int]]:
            return [[1] * 9 for _ in texts]

        def text_of(self, tokens: int) -> str:
            return ""

    sample = calibration.read("parity", "none").samples[0]
    with pytest.raises(ParityError, match="longer than the attention"):
        reference_set._beyond_window(Library(), [sample], 128)  # type: ignore[arg-type]
