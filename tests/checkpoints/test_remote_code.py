"""Remote code: only when asked for, pinned, digested, repaired, and the repair checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jexport.errors import (
    CheckpointError,
    NotFiniteError,
    RemoteCodeError,
    StateDictError,
    UnknownTaskError,
)
from jexport.toy import checkpoint
from jexport.types import LoadedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = FIXTURES / "jina_original_small"
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("own_module_cache")
Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]


def beside(name: str, home: str = "") -> dict[str, str]:
    return {
        "AutoConfig": f"{home}configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": f"{home}modeling_lora.{name}",
    }


@pytest.fixture
def original(tmp_path: Path, edit_json: Edit) -> Path:
    """The small original checkpoint with code beside its weights."""
    folder = Path(shutil.copytree(SMALL, tmp_path / "original"))
    for path in (FIXTURES / "remote_original").glob("*.py"):
        shutil.copy(path, folder)
    edit_json(folder / "config.json", auto_map=beside("XLMRobertaLoRA"))
    return folder


@pytest.fixture
def unknown(tmp_path: Path, write_unknown: Callable[..., Path]) -> Path:
    return write_unknown(tmp_path / "unknown")


@pytest.fixture
def unfilled_is_nan() -> Iterator[None]:
    """Memory that torch does not fill holds NaN, not what happened to be there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.py")}


def test_an_unknown_layout_is_refused_without_the_flag(unknown: Path, opened: Open) -> None:
    ran = unknown / "it_ran"
    for path in unknown.glob("*.py"):
        path.write_text(f"open({str(ran)!r}, 'w')\n" + path.read_text())
    with pytest.raises(RemoteCodeError, match="unknown layout") as caught:
        opened(unknown)
    assert caught.value.exit_code == 19
    assert "modeling_tiny.TinyMixerModel" in caught.value.evidence
    assert "--trust-remote-code" in caught.value.fix
    assert not ran.exists()


def test_an_unknown_layout_is_sentence_transformers_with_the_flag(
    unknown: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    from sentence_transformers import SentenceTransformer

    wanted = SentenceTransformer(str(unknown), trust_remote_code=True, device="cpu").encode(texts)
    model = opened(unknown, trust_remote_code=True)
    for vectors in (reference_vectors, merged_vectors):
        assert np.abs(vectors(model, texts) - wanted).max() <= 1e-6
    how = model.embedding
    assert (how.pooling, how.normalize, how.dimension, how.max_tokens) == ("mean", True, 48, 512)
    assert model.source.layout == "remote_code"
    assert {file.path: file.sha256 for file in model.source.code} == digests(unknown)
    assert len(model.source.code) == 2
    assert {"model.safetensors", "config.json"} <= {file.path for file in model.source.files}
    with pytest.raises(UnknownTaskError):
        opened(unknown, "retrieval.query", trust_remote_code=True)


def test_a_file_of_code_that_nothing_names_is_digested_too(unknown: Path, opened: Open) -> None:
    (unknown / "sub").mkdir()
    (unknown / "sub" / "more.py").write_text("x = 1\n")
    paths = [file.path for file in opened(unknown, trust_remote_code=True).source.code]
    assert paths == ["configuration_tiny.py", "modeling_tiny.py", "sub/more.py"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "nan"])
def test_an_unknown_layouts_state_dict_is_checked(
    change: str, unknown: Path, opened: Open, edit_weights: Edit
) -> None:
    key = "blocks.1.down.bias"
    edit_weights(
        unknown,
        {
            "missing": lambda ts: {n: t for n, t in ts.items() if n != key},
            "unexpected": lambda ts: ts | {"blocks.1.down.more": torch.zeros(2)},
            "mismatched": lambda ts: ts | {key: torch.zeros(47)},
            "nan": lambda ts: ts[key][1:2].fill_(float("nan")),
        }[change],
    )
    model = opened(unknown, trust_remote_code=True)
    error = NotFiniteError if change == "nan" else StateDictError
    with pytest.raises(error) as caught:
        model.assemble(model.weights)
    assert ("blocks.1.down." if change == "nan" else f"{change}: blocks.1") in str(caught.value)


def test_sizes_under_names_of_the_codes_own_are_asked_for(
    unknown: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(unknown / "config.json", hidden_size=...)
    path = unknown / "configuration_tiny.py"
    path.write_text(path.read_text().replace("vocab_size=331", "vocab_size=330"))
    assert opened(unknown, trust_remote_code=True).embedding.dimension == 48
    edit_json(unknown / "config.json", hidden_size=..., vocab_size=...)
    with pytest.raises(Exception, match="does not fit the embedding table"):
        opened(unknown, trust_remote_code=True)


@pytest.mark.usefixtures("unfilled_is_nan")
@pytest.mark.parametrize("task", ["none", *TASKS])
def test_the_authors_code_is_the_reference_when_it_is_trusted(
    task: str,
    original: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    model = opened(original, task, trust_remote_code=True)
    wanted = np.load(FIXTURES / f"jina_original_small.{task}.npy")
    # The texts are of several tasks' lengths: batches of the reference are padded.
    assert np.abs(reference_vectors(model, texts) - wanted).max() <= 1e-6
    assert np.abs(merged_vectors(model, texts) - wanted).max() <= 1e-6
    assert {file.path: file.sha256 for file in model.source.code} == digests(original)
    assert model.source.layout == "jina_v3_original"


def test_what_is_exported_stays_the_native_class(original: Path, opened: Open) -> None:
    from transformers import JinaEmbeddingsV3Model

    model = opened(original, "separation", trust_remote_code=True)
    assert isinstance(model.assemble(model.weights), JinaEmbeddingsV3Model)
    # And the reference is the code that was trusted, not the same class once more.
    (original / "modeling_lora.py").write_text("raise ImportError('not today')\n")
    assert isinstance(model.assemble(model.weights), JinaEmbeddingsV3Model)
    with pytest.raises(RemoteCodeError, match="not today"), model.reference():
        pass


def test_code_beside_a_known_layout_does_not_run_unless_asked(original: Path, opened: Open) -> None:
    for path in original.glob("*.py"):
        path.write_text("raise SystemExit('this code must not run')\n")
    model = opened(original, "separation")
    assert not model.source.code
    with model.reference() as run:
        ones = np.ones((1, 4), np.int64)
        assert run({"input_ids": ones, "attention_mask": ones})["last_hidden_state"].any()
    model.tokenize_reference(["a"])


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FORMULA = "return 1.0 / (self.base ** (steps / self.dim))"


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("return 1.0 / (10000.0 ** (steps / self.dim))", "its config asks for"),
        ("return 0.5 / (self.base ** (steps / self.dim))", "it starts [0.5"),
        ("return self.base ** (steps / self.dim)", "it starts [1.0"),
        ("return torch.zeros_like(steps)", "it starts [0.0, 0.0"),
        ("return steps * float('nan')", "it starts [nan"),
        ("return torch.rand_like(steps)", "its own code gives"),
    ],
)
def test_a_repair_that_does_not_hold_is_an_error(
    formula: str, said: str, original: Path, opened: Open
) -> None:
    replaced(original / "rotary.py", FORMULA, formula)
    model = opened(original, "separation", trust_remote_code=True)
    with pytest.raises(RemoteCodeError, match="repair of") as caught, model.reference():
        pass
    assert "inv_freq" in caught.value.what
    assert said in caught.value.evidence


def test_frequencies_of_another_name_are_repaired_too(
    original: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    unfilled_is_nan: None,
) -> None:
    path = original / "rotary.py"
    path.write_text(path.read_text().replace("inv_freq", "steps_per_token"))
    wanted = np.load(FIXTURES / "jina_original_small.none.npy")
    model = opened(original, trust_remote_code=True)
    assert np.abs(reference_vectors(model, texts) - wanted).max() <= 1e-6


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("mha.py", "import einops", "import no_such_library_at_all", "no_such_library_at_all"),
        ("mlp.py", "from torch import nn", "from torch import no_such_name", "no_such_name"),
        ("block.py", "class Block", "class Block(:", "SyntaxError"),
        ("modeling_lora.py", "class XLMRobertaLoRA", "class Other", "XLMRobertaLoRA"),
        ("mlp.py", "super().__init__()", "raise KeyError('x')", "KeyError"),
        ("block.py", "self.mixer =", "self.more = nn.Linear(2, 2); self.mixer =", "StateDict"),
        ("rotary.py", "persistent=False", "persistent=True", "StateDict"),
    ],
)
def test_code_that_does_not_work_is_an_error(
    file: str, old: str, new: str, said: str, original: Path, opened: Open
) -> None:
    replaced(original / file, old, new)
    model = opened(original, "separation", trust_remote_code=True)
    wanted = StateDictError if said == "StateDict" else RemoteCodeError
    with pytest.raises(wanted) as caught, model.reference():
        pass
    assert said == "StateDict" or said in caught.value.evidence
    if "library" in said:
        assert caught.value.fix.startswith("install what it needs")


def test_what_was_lent_to_transformers_is_taken_back(original: Path, opened: Open) -> None:
    from transformers import PreTrainedModel
    from transformers.models.xlm_roberta import modeling_xlm_roberta

    with opened(original, trust_remote_code=True).reference():
        pass
    assert not hasattr(modeling_xlm_roberta, "create_position_ids_from_input_ids")
    assert not hasattr(PreTrainedModel, "all_tied_weights_keys")


def test_positions_that_are_lent_count_as_roberta_does() -> None:
    from jexport.checkpoints.remote_code import _position_ids

    ids = torch.tensor([[0, 7, 8, 2, 1, 1], [1, 1, 0, 7, 2, 1]])
    assert _position_ids(ids, 1).tolist() == [[2, 3, 4, 5, 1, 1], [1, 1, 2, 3, 4, 1]]


def test_code_that_asks_for_other_code_is_refused(original: Path, opened: Open) -> None:
    ask = "from transformers.dynamic_module_utils import get_class_from_dynamic_module as get"
    replaced(
        original / "modeling_lora.py",
        "        super().__init__(config)\n",
        f"        super().__init__(config)\n        {ask}\n        get('else/code--more.C', '')\n",
    )
    model = opened(original, trust_remote_code=True, code_revision=COMMIT)
    with pytest.raises(RemoteCodeError, match="pinned") as caught, model.reference():
        pass
    assert "more.py of else/code was asked for" in caught.value.evidence


# --- what may not run ---------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "main", COMMIT[:39], COMMIT.upper(), "v1.0"])
def test_a_hub_model_with_code_has_to_be_pinned(revision: str, opened: Open) -> None:
    with pytest.raises(RemoteCodeError, match="pinned") as caught:
        opened(Path("someone/model"), trust_remote_code=True, revision=revision)
    assert "load.revision" in caught.value.fix


@pytest.mark.parametrize("revision", ["", "main", COMMIT[:39], COMMIT.upper()])
def test_code_on_a_hub_has_to_be_pinned(
    revision: str, original: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(original / "config.json", auto_map=beside("XLMRobertaLoRA", "someone/code--"))
    with pytest.raises(RemoteCodeError, match="pinned") as caught:
        opened(original, "separation", trust_remote_code=True, code_revision=revision)
    assert "someone/code" in caught.value.evidence
    assert "load.code_revision" in caught.value.fix


def test_code_in_two_repositories_is_refused(original: Path, opened: Open, edit_json: Edit) -> None:
    both = beside("XLMRobertaLoRA", "someone/code--")
    both["AutoConfig"] = beside("", "else/code--")["AutoConfig"]
    edit_json(original / "config.json", auto_map=both)
    with pytest.raises(RemoteCodeError, match="cannot be pinned") as caught:
        opened(original, trust_remote_code=True, code_revision=COMMIT)
    assert "else/code, someone/code" in caught.value.evidence


@pytest.mark.parametrize("form", [list, dict])
def test_a_tokenizers_code_on_a_hub_is_refused(
    form: type, original: Path, opened: Open, edit_json: Edit
) -> None:
    """The authors' constructor opens the tokenizer itself, at whatever revision is newest."""
    said: Any = ["someone/code--tok.Slow", "someone/code--tok.Fast"]
    settings = original / "tokenizer_config.json"
    edit_json(settings, auto_map=said if form is list else {"AutoTokenizer": said})
    with pytest.raises(RemoteCodeError, match="cannot be pinned"):
        opened(original, trust_remote_code=True, code_revision=COMMIT)
    assert opened(original).embedding.task == "none"


@pytest.mark.parametrize("layout", ["original", "native", "minilm"])
def test_a_known_layout_without_code_has_nothing_to_trust(
    layout: str, minilm: Path, tmp_path: Path, opened: Open
) -> None:
    folder = minilm
    if layout != "minilm":
        tokenizer = SMALL / "tokenizer.json"
        folder = checkpoint.write(tmp_path / layout, layout=layout, tokenizer=tokenizer)
        (folder / "custom_st.py").write_text("x = 1\n")
    with pytest.raises(RemoteCodeError, match="no code to trust") as caught:
        opened(folder, trust_remote_code=True)
    assert "without --trust-remote-code" in caught.value.fix


def test_code_that_is_not_there_is_an_error(original: Path, opened: Open) -> None:
    (original / "modeling_lora.py").unlink()
    with pytest.raises(RemoteCodeError, match="no code to run") as caught:
        opened(original, trust_remote_code=True)
    assert "no modeling_lora.py in" in caught.value.evidence


def test_code_beside_native_weights_cannot_be_an_adapters_reference(
    tmp_path: Path, original: Path, opened: Open, edit_json: Edit
) -> None:
    folder = checkpoint.write(
        tmp_path / "native", layout="native", tokenizer=SMALL / "tokenizer.json"
    )
    for path in original.glob("*.py"):
        shutil.copy(path, folder)
    edit_json(folder / "config.json", auto_map=beside("XLMRobertaLoRA"))
    with pytest.raises(RemoteCodeError, match="PEFT adapters"):
        opened(folder, "separation", trust_remote_code=True)


@pytest.mark.parametrize("said", [{}, [], {"AutoModel": None}, {"AutoModel": []}])
def test_an_empty_auto_map_is_none(
    said: Any, unknown: Path, minilm: Path, tmp_path: Path, opened: Open, edit_json: Edit
) -> None:
    folder = Path(shutil.copytree(minilm, tmp_path / "minilm"))
    edit_json(folder / "config.json", auto_map=said)
    assert opened(folder).source.layout == "sentence_transformer"


@pytest.mark.parametrize(
    "said",
    [
        "code.Model",
        3,
        {"AutoModel": "Model"},
        {"AutoModel": 3},
        {"AutoModel": "a.b.c"},
        {"AutoModel": "../code.Model"},
        {"AutoModel": "x--y--code.Model"},
    ],
)
def test_an_auto_map_that_names_no_class_is_refused(
    said: Any, unknown: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(unknown / "config.json", auto_map=said)
    with pytest.raises(CheckpointError, match="no class"):
        opened(unknown, trust_remote_code=True)


def test_a_pickle_of_tensors_beside_trusted_code_is_read(
    unknown: Path, opened: Open, texts: list[str], reference_vectors: Vectors
) -> None:
    wanted = reference_vectors(opened(unknown, trust_remote_code=True), texts[:3])
    tensors = load_file(unknown / "model.safetensors")
    (unknown / "model.safetensors").unlink()
    torch.save(tensors, unknown / "pytorch_model.bin")
    model = opened(unknown, trust_remote_code=True)
    assert "pytorch_model.bin" in [file.path for file in model.source.files]
    assert np.array_equal(reference_vectors(model, texts[:3]), wanted)


def test_the_config_says_which_code_runs(original: Path) -> None:
    """The fixture is what it is for: code beside the weights, no name of a hub in it."""
    said = json.loads((original / "config.json").read_text())["auto_map"]
    assert not [name for name in said.values() if "--" in name]
