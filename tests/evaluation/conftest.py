"""Tiny sentence-transformers checkpoints, and an artifact of one held against another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from jexport.datasets import calibration
from jexport.errors import ParityError
from jexport.evaluation import reference_set
from jexport.evaluation.candidate import Candidate
from jexport.evaluation.reference_set import ReferenceSet
from jexport.recipe import LoadSpec, ValidateSpec
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import load, validate
from jexport.types import LoadedModel, TensorSpec

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
QUICK = ValidateSpec(budget_tokens=300, max_tokens=60)
WIDTH = 32
Edit = Callable[[Path], None]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded BERT of two layers: mean pooling, normalised, 60 tokens; no test may change it."""
    home = tmp_path_factory.mktemp("tiny")
    config = transformers.BertConfig(
        vocab_size=331,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=130,
        pad_token_id=1,
    )
    torch.manual_seed(3)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("weight") and weight.dim() > 1:
                weight.mul_(6)
    model.save_pretrained(home / "encoder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, home / "encoder")
    modules = [
        Transformer(str(home / "encoder"), max_seq_length=60),
        Pooling(WIDTH, "mean"),
        Normalize(),
    ]
    SentenceTransformer(modules=modules, device="cpu").save(str(home / "saved"))
    return home / "saved"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """An artifact of the tiny checkpoint, its engine torch itself, before the judge."""

    loaded: LoadedModel
    out: Path

    def judged(self, folder: Path, spec: LoadSpec | None = None) -> ReferenceSet:
        """What the judge gives for a checkpoint."""
        loaded = dataclasses.replace(self.loaded, folder=folder)
        texts = calibration.read("parity", "none")
        asked = spec or LoadSpec(model=str(folder))
        reference_set.run(loaded, asked, texts, QUICK, out_dir=self.out)
        return reference_set.read(self.out / reference_set.FILE)

    def validate(self, folder: Path, spec: LoadSpec | None = None, **embedding: Any) -> Any:
        """Hold the artifact against the library's vectors of the checkpoint in `folder`."""
        how = self.loaded.embedding
        candidate = Candidate(
            tokenizer=TextTokenizer.open(self.loaded.folder, max_tokens=how.max_tokens),
            open=self.loaded.reference,
            embedding=dataclasses.replace(how, **embedding),
            outputs=(
                TensorSpec(
                    name="last_hidden_state", dtype="float32", shape=("batch", "sequence", WIDTH)
                ),
            ),
        )
        return validate.run(
            lambda: self.judged(folder, spec),
            candidate,
            spec=QUICK,
            precision="fp32",
            out_dir=self.out,
        )

    def refused(self, folder: Path, **embedding: Any) -> str:
        """The error's text."""
        with pytest.raises(ParityError) as caught:
            self.validate(folder, **embedding)
        assert caught.value.exit_code == 6
        assert "set other gates" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def trial(tiny: Path, tmp_path: Path) -> Trial:
    loaded = load.run(LoadSpec(model=str(tiny)), task="none")
    out = tmp_path / "out"
    out.mkdir()
    return Trial(loaded=loaded, out=out)


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "changed"))
