"""load: one noun for every layout, nothing read that is not needed, each bad input its own code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jexport.errors import JexportError
from jexport.recipe import LoadSpec
from jexport.stages import load
from jexport.toy import checkpoint

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")


def test_every_file_that_was_read_is_recorded_with_its_digest(small: Path) -> None:
    source = load.run(LoadSpec(model=str(small)), task="separation").source
    assert (source.name, source.layout, source.revision) == (small.name, "jina_v3_original", "")
    assert [file.path for file in source.files] == [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in source.files:
        content = (small / file.path).read_bytes()
        assert file.size_bytes == len(content)
        assert file.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
@pytest.mark.parametrize("task", ["none", *TASKS])
def test_every_task_of_both_jina_layouts_is_loaded(layout: str, task: str, toys: Path) -> None:
    model = load.run(LoadSpec(model=str(toys / layout)), task=task)
    assert model.embedding.task == task
    assert model.config == json.loads((toys / layout / "config.json").read_text())
    assert model.embedding.prompt == model.config["task_instructions"].get(task, "")
    assert len(model.weights) == 2 * 16 + 4 + 2  # layers, embeddings, pooler
    # All but the norms and biases, the pooler with them.
    assert len(model.adapter) == (0 if task == "none" else 2 * 6 + 2 + 1)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("toys")
    for layout in checkpoint.LAYOUTS:
        checkpoint.write(home / layout, layout=layout)
    return home


def test_no_number_is_read_while_it_loads(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers only: a weight is read when its reader is called, and no other with it."""
    import safetensors

    opened = safetensors.safe_open
    ways: list[str] = []

    def spy(path: Path, framework: str, **how: object) -> object:
        ways.append(framework)
        return opened(path, framework=framework, **how)

    monkeypatch.setattr(safetensors, "safe_open", spy)
    for layout in checkpoint.LAYOUTS:
        model = load.run(LoadSpec(model=str(toys / layout)), task="separation")
        assert "pt" not in ways
        model.weights["layers.0.mlp.fc1.weight"]()
        assert ways.count("pt") == 1
        ways.clear()


def test_a_reader_may_be_called_again(toys: Path) -> None:
    model = load.run(LoadSpec(model=str(toys / "native")), task="separation")
    for read in (*model.weights.values(), *[delta.up for delta in model.adapter.values()]):
        first = read()
        assert first.dtype == torch.float32
        assert torch.equal(first, read())


def test_recipe_words_go_before_the_checkpoints(small: Path) -> None:
    spec = LoadSpec(
        model=str(small), max_tokens=100, licence="mine", prompts={"separation": "apart: "}
    )
    model = load.run(spec, task="separation")
    assert (model.embedding.max_tokens, model.embedding.prompt) == (100, "apart: ")
    assert model.source.licence == "mine"
    assert load.run(spec, task="none").embedding.prompt == ""


def without(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def unnamed(path: Path) -> None:
    """A tensor goes."""
    tensors = load_file(path)
    tensors.pop("roberta.emb_ln.bias")
    save_file(tensors, path)


def unadapted(path: Path) -> None:
    """A matrix of the adapters goes."""
    tensors = load_file(path)
    tensors.pop("roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_B")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "break_it", "code"),
    [
        ("model.safetensors", without, 7),
        ("model.safetensors", cut, 7),
        ("config.json", without, 7),
        ("config.json", cut, 7),
        ("config.json", edited(vocab_size=None), 7),
        ("config.json", edited(lora_rank=2), 8),
        ("model.safetensors", unadapted, 8),
        ("tokenizer.json", without, 9),
        ("tokenizer.json", cut, 9),
        ("tokenizer.json", edited(added_tokens=[{"id": 331, "content": "x"}]), 9),
        ("model.safetensors", unnamed, 14),
        ("config.json", edited(hidden_size=32), 14),
        ("config.json", edited(emb_pooler="max"), 22),
    ],
)
def test_each_bad_input_has_its_code(
    file: str, break_it: Callable[[Path], None], code: int, small_copy: Path
) -> None:
    break_it(small_copy / file)
    with pytest.raises(JexportError) as caught:
        load.run(LoadSpec(model=str(small_copy)), task="separation")
    assert caught.value.exit_code == code
    # What happened, what shows it, and what to do about it.
    assert all((caught.value.what, caught.value.evidence, caught.value.fix))


def test_a_layout_that_is_not_known_has_its_codes(small_copy: Path) -> None:
    config = small_copy / "config.json"
    for change, code in (
        (edited(model_type="no_such_model"), 19),  # its auto_map names code
        (edited(model_type="gpt2"), 22),  # transformers has it, and a module is code of its own
        (edited(model_type="xlm-roberta", auto_map=None, vocab_size=None), 7),
        (without, 7),
    ):
        change(config)
        with pytest.raises(JexportError) as caught:
            load.run(LoadSpec(model=str(small_copy)), task="none")
        assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("retrieval.quer", "retrieval.query"),
        ("Separation", "separation"),
        ("nothing", "none"),
        ("", ""),
    ],
)
def test_an_unknown_task_names_the_nearest(task: str, nearest: str, small: Path) -> None:
    with pytest.raises(JexportError) as caught:
        load.run(LoadSpec(model=str(small)), task=task)
    assert caught.value.exit_code == 3
    assert nearest in caught.value.fix
    assert all(name in caught.value.evidence for name in (*TASKS, "none"))


def test_a_prompt_of_a_task_that_is_not_there_is_refused(small: Path) -> None:
    with pytest.raises(JexportError, match=r"load\.prompts\.retrieval\.quer") as caught:
        load.run(LoadSpec(model=str(small), prompts={"retrieval.quer": "x"}), task="separation")
    assert (caught.value.exit_code, "retrieval.query" in caught.value.fix) == (5, True)


def test_a_checkpoint_is_only_read(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(folder)}
    model = load.run(LoadSpec(model=str(folder)), task="separation")
    model.assemble(model.weights)
    model.tokenize_reference(["a"])
    with model.reference():
        pass
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files(folder)}
    assert after == before


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
