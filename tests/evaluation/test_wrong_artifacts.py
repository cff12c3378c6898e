"""An artifact that ignores something which the checkpoint says is refused, and the key is named.

The artifact is always that of the tiny checkpoint; the judge opens a copy that says one thing more.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Dense

from jexport.errors import UnsupportedCheckpointError
from jexport.recipe import LoadSpec

edit_json = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["edit_json"]
SBERT, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"


def modules(folder: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    path = folder / "modules.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def pooling(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode="cls")


def last_token(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode="lasttoken")


def no_normalize(folder: Path) -> None:
    modules(folder, lambda listed: listed[:2])


def dense(folder: Path, width: int = 32) -> None:
    torch.manual_seed(0)
    (folder / "3_Dense").mkdir()
    Dense(32, width, activation_function=torch.nn.Tanh()).save(str(folder / "3_Dense"))
    kind = "sentence_transformers.models.Dense"
    one = {"idx": 3, "name": "3", "path": "3_Dense", "type": kind}
    modules(folder, lambda listed: [*listed[:2], one, *listed[2:]])


def narrow_dense(folder: Path) -> None:
    dense(folder, 16)


def truncate_dim(folder: Path) -> None:
    edit_json(folder / PROMPTS, truncate_dim=16)


def prompt(folder: Path) -> None:
    edit_json(folder / PROMPTS, prompts={"q": "find: "}, default_prompt_name="q")


def shorter(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", model_max_length=41)
    edit_json(folder / SBERT, max_seq_length=41)


def lower_case(folder: Path) -> None:
    edit_json(folder / SBERT, do_lower_case=True)


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def strips(folder: Path) -> None:
    kinds = [{"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]
    tokenizer(folder, lambda t: t.update(normalizer={"type": "Sequence", "normalizers": kinds}))


def accents(folder: Path) -> None:
    kinds = [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "NFKC"}]
    tokenizer(folder, lambda t: t.update(normalizer={"type": "Sequence", "normalizers": kinds}))


def no_special_tokens(folder: Path) -> None:
    tokenizer(folder, lambda t: t.update(post_processor=None))


def added_token(folder: Path) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special", "normalized"), False)

    def add(content: dict[str, Any]) -> None:
        pieces = [piece for piece, _ in content["model"]["vocab"]]
        one = next(piece for piece in pieces if len(piece) == 2 and piece.isalpha())
        content["added_tokens"].append({"id": pieces.index(one), "content": one, **flags})

    tokenizer(folder, add)


def weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.weight"] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def activation(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_act="relu")


CASES = {
    pooling: "pooling: the checkpoint's is cls, the artifact's mean",
    last_token: "pooling: the checkpoint's is last",
    no_normalize: "no Normalize module",
    dense: "modules.json (Pooling, Dense",
    narrow_dense: "a Dense module",
    truncate_dim: "truncate_dim",
    prompt: "prompt: the checkpoint puts one there",
    shorter: "max_seq_length: the checkpoint cuts at 41 tokens, the artifact at 60",
    lower_case: "lower case: do_lower_case",
    strips: "white space at",
    accents: "accents are dropped",
    no_special_tokens: "special tokens around a text",
    added_token: "tokenizer",
    weights: "weights",
    activation: "the model's states differ before pooling",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_the_artifact_ignores_is_named(change: Any, trial: Any, changed: Path) -> None:
    change(changed)
    assert CASES[change] in trial.refused(changed)


def test_the_artifact_itself_passes(trial: Any, tiny: Path) -> None:
    metrics = trial.validate(tiny).metrics
    assert metrics["overall"]["cosine_min"] > 0.999999
    assert metrics["tokens"]["cosine_min"] > 0.999999
    assert metrics["edge"]["texts"] > 30
    assert metrics["token_ids_compared"] > 150


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"pooling": "cls"}, "pooling"),
        ({"pooling": "max"}, "pooling"),
        ({"prompt": "q: "}, "prompt"),
    ],
)
def test_what_the_artifact_makes_up_is_named(
    wrong: dict[str, Any], named: str, trial: Any, tiny: Path
) -> None:
    assert named in trial.refused(tiny, **wrong)


def test_what_the_recipe_changes_is_the_librarys_own_argument(trial: Any, tiny: Path) -> None:
    spec = LoadSpec(model=str(tiny), prompts={"none": "passage: "})
    assert trial.validate(tiny, spec, prompt="passage: ").passed
    short = trial.judged(tiny, LoadSpec(model=str(tiny), max_tokens=20))
    assert short.max_tokens == max(map(len, short.ids)) == 20


def test_what_the_library_cannot_open_is_refused(trial: Any, changed: Path) -> None:
    edit_json(changed / PROMPTS, default_prompt_name="absent")
    with pytest.raises(UnsupportedCheckpointError, match="cannot use this checkpoint"):
        trial.validate(changed)


def test_code_beside_the_weights_is_not_run(trial: Any, changed: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (changed / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Pooling: pass\n")
    modules(changed, lambda listed: [listed[0], listed[1] | {"type": "own.Pooling"}, listed[2]])
    with pytest.raises(UnsupportedCheckpointError, match="sentence-transformers cannot use"):
        trial.validate(changed)
    assert not ran.exists()
