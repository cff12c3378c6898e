"""The judge: the authors' own vectors, PEFT's own adapter, and none of jexport's reading."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from jexport.checkpoints import native_class, transformer_files
from jexport.errors import StateDictError, UnsupportedCheckpointError
from jexport.evaluation import edge_texts, reference_library, reference_set
from jexport.recipe import LoadSpec
from jexport.stages import load
from jexport.toy import checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = FIXTURES / "jina_original_small"
TASKS = (
    "none",
    "retrieval.query",
    "retrieval.passage",
    "separation",
    "classification",
    "text-matching",
)
TEXTS = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))


def vectors(folder: Path, task: str, texts: list[str], **spec: Any) -> np.ndarray:
    asked = LoadSpec(model=str(folder), **spec)
    with reference_library.opened(load.run(asked, task=task), asked) as library:
        found = library.encode(texts, library.tokenize(texts))
    return np.stack([one.vector for one in found])


@pytest.mark.parametrize("task", TASKS)
def test_the_original_layout_gives_the_authors_vectors(task: str) -> None:
    wanted = np.load(FIXTURES / f"jina_original_small.{task}.npy")
    assert np.abs(vectors(SMALL, task, TEXTS) - wanted).max() < 1e-6


def test_truncate_dim_cuts_after_normalisation_there_too(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SMALL, tmp_path / "small"))
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 16}))
    wanted = np.load(FIXTURES / "jina_original_small.separation.npy")[:, :16]
    assert np.abs(vectors(folder, "separation", TEXTS) - wanted).max() < 1e-6


def test_nothing_of_ours_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    # With our own name map and tokenizer gone, once the checkpoint is open, it still judges.
    asked = LoadSpec(model=str(SMALL))
    loaded = load.run(asked, task="separation")
    blind = dataclasses.replace(
        loaded,
        tokenize_reference=gone,
        assemble=gone,
        reference=gone,
        tokenizer_files=(),
        weights={},
        adapter={},
    )
    for module, name in (
        (native_class, "assemble"),
        (native_class, "native_weights"),
        (transformer_files, "reference_tokenizer"),
    ):
        monkeypatch.setattr(module, name, gone)
    with reference_library.opened(blind, asked) as library:
        found = library.encode(TEXTS, library.tokenize(TEXTS))
    wanted = np.load(FIXTURES / "jina_original_small.separation.npy")
    assert np.abs(np.stack([one.vector for one in found]) - wanted).max() < 1e-6


def gone(*_: Any, **__: Any) -> Any:
    raise AssertionError("jexport's own reading was asked")


def test_both_layouts_of_one_model_agree(tmp_path: Path) -> None:
    made = {
        layout: checkpoint.write(
            tmp_path / layout, layout=layout, tokenizer=SMALL / "tokenizer.json", seed=5
        )
        for layout in checkpoint.LAYOUTS
    }
    first, *others = (vectors(folder, "classification", TEXTS) for folder in made.values())
    for other in others:
        assert np.abs(first - other).max() < 1e-6
    plain = vectors(made["native"], "none", TEXTS)
    assert np.abs(plain - first).max() > 1e-3  # the adapter is active


def test_a_weight_that_transformers_does_not_find_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.write(
        tmp_path / "native", layout="native", tokenizer=SMALL / "tokenizer.json", seed=5
    )
    asked = LoadSpec(model=str(folder))
    loaded = load.run(asked, task="none")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with (
        pytest.raises(StateDictError, match="transformers"),
        reference_library.opened(loaded, asked),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError("Can't load image processor for 'folder'."), UnsupportedCheckpointError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
    ],
)
def test_what_the_library_lacks_is_told_from_a_full_disk(
    error: OSError, wanted: type[Exception], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    asked = LoadSpec(model=str(tiny))
    loaded = load.run(asked, task="none")
    monkeypatch.setattr(reference_library, "_assemble", fail)
    with pytest.raises(wanted) as caught, reference_library.opened(loaded, asked):
        pass
    assert type(caught.value) is wanted
    assert str(error).split(".")[0] in str(caught.value)


def test_a_sentence_transformer_is_what_its_users_get(tiny: Path) -> None:
    wanted = SentenceTransformer(str(tiny), device="cpu").encode(TEXTS, batch_size=4)
    assert np.abs(vectors(tiny, "none", TEXTS) - wanted).max() < 1e-6


def test_the_same_bits_on_any_number_of_threads(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(reference_library, "cores", lambda cores=cores: cores)
        torch.set_num_threads(cores)
        made.append(vectors(tiny, "none", [*TEXTS, *edge_texts.short()[1:40]]).tobytes())
    torch.set_num_threads(1)
    assert made[0] == made[1]


def test_texts_of_a_wanted_length(tiny: Path) -> None:
    asked = LoadSpec(model=str(tiny))
    with reference_library.opened(load.run(asked, task="none"), asked) as library:
        for size in (5, 59, 60):
            assert len(library.tokenize([library.text_of(size)])[0]) == size
        assert len(library.tokenize([library.text_of(61)])[0]) == 60


def test_edge_texts_are_of_every_kind(tiny: Path) -> None:
    short = edge_texts.short()
    assert len(short) == len(set(short)) > 120
    for text in ("", " ", "\t", "\u3000", "\x00", "<s>", "[CLS]", "<|endoftext|>"):
        assert text in short
    assert any(text.endswith(" ") and text.strip() for text in short)
    asked = LoadSpec(model=str(tiny))
    with reference_library.opened(load.run(asked, task="none"), asked) as library:
        added = edge_texts.with_tokens(library.added_tokens())
        sizes = [len(text) for text in edge_texts.long(library.text_of, 60)]
    assert len(added) == 5
    assert edge_texts.LONG_CHARACTERS in sizes
    for text in (*short, *added):
        text.encode()


def test_a_reference_set_is_read_as_it_was_written(trial: Any, tiny: Path) -> None:
    written = trial.judged(tiny)
    path = trial.out / reference_set.FILE
    before = path.read_bytes()
    again = reference_set.read(path)
    assert again.samples == written.samples
    assert np.array_equal(again.vectors, written.vectors)
    assert all(map(np.array_equal, again.tokens, written.tokens))
    reference_set.write(again, path)
    assert path.read_bytes() == before


def test_importing_the_judge_loads_no_library() -> None:
    code = "import sys; import jexport.evaluation.reference_library, jexport.stages.validate as v; "
    code += "sys.exit('sentence_transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
