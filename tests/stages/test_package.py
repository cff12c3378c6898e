"""package: the files that servers read, the model card and the manifest (formats: layout B)."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import markdown_it
import pytest
import yaml

from jexport.artifacts import manifest, model_card
from jexport.stages import package

PROMPT = "Represent the query for retrieving evidence documents: "
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def packaged(recorded: Any, tmp_path: Path) -> Callable[..., Path]:
    """Package the recorded build again, with parts of the model, report or spec changed."""

    def again(
        *,
        embedding: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        tokenizer_files: tuple[Path, ...] | None = None,
        **spec: Any,
    ) -> Path:
        model = dataclasses.replace(
            recorded.loaded,
            embedding=dataclasses.replace(recorded.loaded.embedding, **(embedding or {})),
            source=dataclasses.replace(recorded.loaded.source, **(source or {})),
            tokenizer_files=tokenizer_files or recorded.loaded.tokenizer_files,
        )
        number = len(list(tmp_path.iterdir()))
        compiled = tmp_path / f"{number}-compiled"
        compiled.mkdir()
        for name in recorded.compiled.files:
            shutil.copy(recorded.compiled.folder / name, compiled)
        out = tmp_path / f"{number}-out"
        out.mkdir()
        return package.run(
            model,
            dataclasses.replace(recorded.compiled, folder=compiled),
            recorded.report,
            dataclasses.replace(recorded.spec, report_path=recorded.report_file, **spec),
            out_dir=out,
        )

    return again


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_config_is_what_servers_of_an_onnx_folder_read(artifact: Path, small: Path) -> None:
    config, source = read(artifact / "config.json"), read(small / "config.json")
    assert config["model_type"] == "xlm-roberta"  # transformers 4 and Infinity must know it
    assert config["architectures"] == ["XLMRobertaModel"]
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "pad_token_id",
        "hidden_act",
    ):
        assert config[key] == source[key], key
    assert config["max_position_embeddings"] == 8192  # Infinity's length limit
    assert "auto_map" not in config  # nobody shall fetch code for a graph
    assert not any(key.startswith("lora") for key in config)


def test_sentence_transformers_files(artifact: Path) -> None:
    modules = read(artifact / "modules.json")
    assert [(m["idx"], m["name"], m["path"], m["type"]) for m in modules] == [
        (0, "0", "", "sentence_transformers.models.Transformer"),
        (1, "1", "1_Pooling", "sentence_transformers.models.Pooling"),
        (2, "2", "2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = read(artifact / "1_Pooling" / "config.json")
    # TEI insists on the old keys, and on these two being there.
    assert pooling["pooling_mode_cls_token"] is False
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["word_embedding_dimension"] == 64
    assert sum(value is True for value in pooling.values()) == 1
    assert read(artifact / "sentence_bert_config.json") == {
        "max_seq_length": 8192,
        "do_lower_case": False,
    }
    settings = read(artifact / "config_sentence_transformers.json")
    assert settings["prompts"]["retrieval.query"] == settings["prompts"]["query"] == PROMPT
    assert settings["default_prompt_name"] == "retrieval.query"
    assert settings["similarity_fn_name"] == "cosine"


def test_passage_prompt_is_found_by_encode_document(builds: Callable[..., Any]) -> None:
    settings = read(builds("retrieval.passage").path / "config_sentence_transformers.json")
    assert settings["prompts"]["document"] == "Represent the document for retrieval: "


def test_a_task_without_a_prompt_has_no_default(builds: Callable[..., Any]) -> None:
    settings = read(builds("separation").path / "config_sentence_transformers.json")
    assert settings["default_prompt_name"] is None
    assert settings["prompts"] == {"separation": ""}


def test_tokenizer_files_are_copied_as_they_are(
    artifact: Path, small: Path, minilm_artifact: Path, minilm: Path
) -> None:
    for made, source in ((artifact, small), (minilm_artifact, minilm)):
        found = [name for name in (*TOKENIZER, "vocab.txt") if (source / name).is_file()]
        assert len(found) >= 2
        for name in set(found) - {"tokenizer_config.json"}:
            assert (made / name).read_bytes() == (source / name).read_bytes(), name


def test_every_file_that_a_server_may_read_says_the_same_length_limit(
    artifact: Path, small: Path, minilm_artifact: Path, minilm: Path
) -> None:
    # fastembed cuts at the smaller of tokenizer_config's two, Infinity at the positions, TEI and
    # sentence-transformers at max_seq_length.
    assert read(minilm / "tokenizer_config.json")["model_max_length"] == 512
    assert read(small / "tokenizer_config.json")["model_max_length"] != 8192
    for made, source, limit in ((artifact, small, 8192), (minilm_artifact, minilm, 256)):
        settings = read(made / "tokenizer_config.json")
        assert settings["model_max_length"] == limit
        assert settings.get("max_length", limit) == limit
        assert read(made / "sentence_bert_config.json")["max_seq_length"] == limit
        assert read(made / "config.json")["max_position_embeddings"] == limit
        limits = {"model_max_length": limit, "max_length": limit}
        kept = read(source / "tokenizer_config.json")
        assert settings == kept | {key: limits[key] for key in limits if key in kept}


def test_fastembed_finds_the_pad_token(artifact: Path) -> None:
    assert read(artifact / "config.json")["pad_token_id"] == 1


def with_class(folder: Path, small: Path, name: str | None) -> tuple[Path, ...]:
    """The small tokenizer's files, its tokenizer_config.json with another class."""
    shutil.copy(small / "tokenizer.json", folder)
    settings = read(small / "tokenizer_config.json")
    del settings["tokenizer_class"]
    if name:
        settings["tokenizer_class"] = name
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json", folder / "tokenizer_config.json"


@pytest.mark.parametrize("name", ["XLMRobertaTokenizer", "PreTrainedTokenizerFast", None])
def test_other_tokenizer_classes_stay(
    name: str | None, packaged: Callable[..., Path], tmp_path: Path, small: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    files = with_class(folder, small, name)
    settings = read(packaged(tokenizer_files=files) / files[1].name)
    assert settings == read(files[1]) | {"model_max_length": 8192}


def test_the_class_that_transformers_4_refuses_is_renamed(
    packaged: Callable[..., Path], tmp_path: Path, small: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    files = with_class(folder, small, "TokenizersBackend")
    settings = read(packaged(tokenizer_files=files) / "tokenizer_config.json")
    assert settings.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    before = read(files[1])
    del before["tokenizer_class"]
    assert settings == before | {"model_max_length": 8192}
    alone = read(packaged(tokenizer_files=files[:1]) / "tokenizer_config.json")
    assert alone["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert alone["model_max_length"] == 8192


def test_one_graph_in_the_root_with_its_weights_beside(artifact: Path) -> None:
    assert [p.relative_to(artifact).as_posix() for p in artifact.rglob("*.onnx")] == ["model.onnx"]
    import onnx

    graph = onnx.load(artifact / "model.onnx", load_external_data=False)
    places = {
        entry.value
        for tensor in graph.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx_data"}
    assert [value.name for value in graph.graph.input] == ["input_ids", "attention_mask"]
    outputs = ["last_hidden_state", "sentence_embedding"]
    assert [value.name for value in graph.graph.output] == outputs


@pytest.mark.parametrize("which", ["artifact", "minilm_artifact"])
def test_sentence_transformers_reads_what_is_around_the_graph(
    which: str, request: pytest.FixtureRequest, texts: list[str]
) -> None:
    """Its ONNX backend cannot be installed here, so its own modules pool the graph's output."""
    import numpy as np
    import torch
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoConfig, AutoTokenizer

    import jexport
    from jexport.runtime.open import compiled_model
    from jexport.targets import onnx

    folder: Path = request.getfixturevalue(which)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).hidden_size in (64, 384)
    pooling = Pooling.load(str(folder / "1_Pooling"))
    assert pooling.pooling_mode == "mean"
    with jexport.open_artifact(folder) as model:
        wanted = model.encode(texts)
        prompt, limit = model.embedding.prompt, model.embedding.max_tokens
    feed = tokenizer(
        [prompt + text for text in texts],
        padding=True,
        truncation=True,
        max_length=limit,
        return_tensors="np",
    )
    compiled = compiled_model(folder, manifest.read(folder).content)
    with onnx.TARGET.runner(compiled, "cpu", 0) as run:
        hidden = run({k: feed[k].astype(np.int64) for k in ("input_ids", "attention_mask")})
    features = {
        "token_embeddings": torch.from_numpy(hidden["last_hidden_state"]),
        "attention_mask": torch.from_numpy(feed["attention_mask"]),
    }
    vectors = Normalize()(pooling(features))["sentence_embedding"].numpy()
    np.testing.assert_allclose(vectors, wanted, atol=2e-6)


def front_matter(card: str) -> Any:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str) -> dict[str, str]:
    """The tables of a model card as a reader sees them: first cell -> second cell, rendered."""
    html = (
        markdown_it.MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(card.split("---\n", 2)[2])
    )
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", html, re.S)
    return dict(rows)


def test_model_card_has_the_numbers_of_the_report(artifact: Path) -> None:
    card = (artifact / "README.md").read_text(encoding="utf-8")
    report = read(artifact / "parity.json")
    overall, found = report["metrics"]["overall"], cells(card)
    assert found["texts compared"] == str(report["metrics"]["texts"])
    assert found["cosine, lowest"] == f"{overall['cosine_min']:.7f}"
    assert found["cosine, mean"] == f"{overall['cosine_mean']:.7f}"
    assert found["cosine, 1st percentile"] == f"{overall['cosine_p1']:.7f}"
    assert float(found["largest difference of a component"]) == pytest.approx(
        overall["largest_difference"], rel=0.01
    )
    assert found["Spearman of pairwise similarities"] == f"{overall['spearman']:.6f}"
    assert found["shared top-10 neighbours"] == f"{overall['top10_overlap']:.4f}"
    lowest = report["metrics"]["batch"]["cosine_min"]
    assert found["alone against in a padded batch, lowest cosine"] == f"{lowest:.7f}"
    content = manifest.read(artifact).content["parity"]
    assert content["cosine_min"] == overall["cosine_min"]
    assert content["batch_cosine_min"] == lowest


def test_model_card_states_the_licence(artifact: Path, minilm_artifact: Path) -> None:
    card = (artifact / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "cc-by-nc-4.0"
    assert cells(card)["licence"] == "CC-BY-NC-4.0"
    assert "does not allow commercial use" in card
    assert manifest.read(artifact).content["licence"] == "CC-BY-NC-4.0"
    other = (minilm_artifact / "README.md").read_text(encoding="utf-8")
    assert front_matter(other)["license"] == "apache-2.0"
    assert "commercial" not in other


def test_model_card_tells_how_to_use_it(artifact: Path) -> None:
    card = (artifact / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict[str, Any] = {}
    exec(code.replace("PATH/OF/THIS/FOLDER", str(artifact)), names)
    assert names["vectors"].shape == (2, 64)


def quantized(folder: Path, **changes: Any) -> Path:
    """A quantization.json with these keys changed."""
    content = {
        "format": 1,
        "reached": True,
        "precision": "fp32",
        "chosen": {
            "cosine_mean": 0.998617,
            "cosine_p1": 0.996823,
            "cosine_min": 0.99299,
            "top10_overlap": 0.96378,
        },
        "calibration": {"name": "everyday", "texts": 1025, "sha256": "9" * 64},
        "held_out": {"name": "everyday", "texts": 450, "sha256": "a" * 64},
        "matrices": [
            {"name": f"layer/{n}/MatMul", "share": 0.25, "treatment": "int8" if n else "int8x2"}
            for n in range(4)
        ],
        "bytes": {"int8": 23 << 20, "fp32": 90 << 20},
    } | changes
    path = folder / "quantization.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_model_card_of_an_int8_artifact(packaged: Callable[..., Path], tmp_path: Path) -> None:
    out = packaged(extras=(quantized(tmp_path),))
    content = dict(manifest.read(out).content)
    content["precision"] = "int8"  # the recorded build is a float one
    quantization = read(out / "quantization.json")
    card = model_card.text(content, quantization)
    found = cells(card)
    assert "## What int8 cost" in card
    assert "report.html" in card
    assert {name: found[name] for name in found if name.startswith("held-out")} == {
        "held-out texts": "450",
        "held-out cosine, mean": "0.99862",
        "held-out cosine, 1st percentile": "0.99682",
        "held-out cosine, lowest": "0.99299",
        "held-out shared top-10 neighbours": "0.9638",
    }
    assert found["linear layers"] == (
        "3 of 4 layers int8; 1 of 4 layers kept at higher precision (int8_residual), "
        "25.0 % of the multiply-adds"
    )
    assert found["layers in int8_residual"] == "<code>layer/0/MatMul</code>"
    assert found["size of graph and weights"] == "23.0 MiB (25.6 % of fp32)"
    assert found["calibrated with"] == f"everyday: 1,025 texts, SHA-256 <code>{'9' * 64}</code>"


def test_package_quotes_the_quantization_that_it_ships(
    packaged: Callable[..., Path], tmp_path: Path
) -> None:
    card = (packaged(extras=(quantized(tmp_path),)) / "README.md").read_text(encoding="utf-8")
    assert cells(card)["held-out cosine, mean"] == "0.99862"
    assert "the goals were reached" in card
    assert "held-out" not in (packaged() / "README.md").read_text(encoding="utf-8")
    missed = quantized(tmp_path, reached=False, bytes={}, chosen={}, matrices=[], calibration={})
    card = (packaged(extras=(missed,)) / "README.md").read_text(encoding="utf-8")
    assert "the goals were NOT reached" in card
    assert set(cells(card)) & {"linear layers", "calibrated with", "held-out cosine, mean"} == set()


def test_names_in_a_quantization_are_no_markup(
    packaged: Callable[..., Path], tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script> | `x` [a](b)\n# d"
    matrices = [{"name": evil, "share": 0.1, "treatment": evil} for _ in range(12)]
    texts = {"name": evil, "texts": 3, "sha256": evil}
    path = quantized(tmp_path, matrices=matrices, calibration=texts)
    card = (packaged(extras=(path,)) / "README.md").read_text(encoding="utf-8")
    rendered = (
        markdown_it.MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(card.split("---\n", 2)[2])
    )
    assert "<script" not in rendered
    assert "<a " not in rendered
    assert rendered.count("<h1>") == 1
    assert " and 4 more" in rendered


@pytest.mark.parametrize(
    "prompt",
    [
        "a | b: ",
        "`code` and ``more``: ",
        "<script>alert(1)</script>",
        "two\nlines\t",
        " both ",
        "[link](http://x)",
        "ends with `",
        "**bold** &amp; _it_",
        "back\\slash | pipe",
        "`",
        "  ",
    ],
)
def test_a_prompt_with_markup_is_shown_as_it_is(prompt: str, packaged: Callable[..., Path]) -> None:
    import html

    out = packaged(embedding={"prompt": prompt})
    shown = cells((out / "README.md").read_text(encoding="utf-8"))["prompt put before each text"]
    inside = re.fullmatch(r"<code>(.*)</code>", shown, re.S)
    assert inside, shown
    wanted = prompt.replace("\n", "\\n").replace("\t", "\\t")
    assert html.unescape(inside[1]) == wanted
    assert manifest.verify(out).content["embedding"]["prompt"] == prompt


@pytest.mark.parametrize(
    "licence", ["", "MIT", "no", "other: see [x](y) | <b>z</b>", "Llama 3 'Community' \"L\"", "1"]
)
def test_any_licence_gives_valid_front_matter(licence: str, packaged: Callable[..., Path]) -> None:
    card = (packaged(source={"licence": licence}) / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == (licence.lower() or "other")
    assert "<b>" not in card.split("---\n", 2)[2]
    found = cells(card)["licence"]
    assert found == "not stated by the checkpoint" if not licence else found


def test_a_checkpoints_name_is_no_markup(packaged: Callable[..., Path]) -> None:
    name = "a|b`c`<img src=x>\nd"
    card = (packaged(source={"name": name}) / "README.md").read_text(encoding="utf-8")
    assert "<img" not in card
    assert cells(card)["checkpoint"].startswith("a|b`c`&lt;img src=x&gt; d (layout ")


@pytest.mark.parametrize(
    ("pooling", "key"),
    [
        ("mean", "pooling_mode_mean_tokens"),
        ("cls", "pooling_mode_cls_token"),
        ("max", "pooling_mode_max_tokens"),
        ("last", "pooling_mode_lasttoken"),
        ("mean_sqrt_len", "pooling_mode_mean_sqrt_len_tokens"),
    ],
)
def test_every_pooling_is_said_in_sentence_transformers_words(
    pooling: str, key: str, packaged: Callable[..., Path]
) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    out = packaged(embedding={"pooling": pooling})
    settings = read(out / "1_Pooling" / "config.json")
    assert [name for name, value in settings.items() if value is True] == [key]
    mode = Pooling.load(str(out / "1_Pooling")).pooling_mode
    assert mode == {"last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens"}.get(
        pooling, pooling
    )


def test_vectors_that_are_not_normalised_have_no_normalize_module(
    packaged: Callable[..., Path],
) -> None:
    out = packaged(embedding={"normalize": False})
    assert [m["path"] for m in read(out / "modules.json")] == ["", "1_Pooling"]


def test_manifest_lists_every_file(packaged: Callable[..., Path]) -> None:
    out = packaged()
    listed = {entry["path"] for entry in manifest.read(out).content["files"]}
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == listed | {"manifest.json"}


def test_the_compiled_files_are_moved_not_copied(
    packaged: Callable[..., Path], tmp_path: Path
) -> None:
    packaged()
    assert not list((tmp_path / "0-compiled").iterdir())


def test_weights_digest_depends_on_weights_and_code_alone(recorded: Any) -> None:
    from jexport.types import FileDigest

    base = package.weights_digest(recorded.loaded)

    def with_files(**changes: Any) -> str:
        source = dataclasses.replace(recorded.loaded.source, **changes)
        return package.weights_digest(dataclasses.replace(recorded.loaded, source=source))

    def other(path: str) -> FileDigest:
        return FileDigest(path=path, size_bytes=1, sha256="1" * 64)

    files = recorded.loaded.source.files
    assert with_files(files=(*files, other("notes.txt"))) == base
    assert with_files(files=(*files, other("model-2.safetensors"))) != base
    assert with_files(code=(other("modeling.py"),)) != base


def test_a_model_card_is_made_of_a_manifest_alone(artifact: Path) -> None:
    content = {**manifest.read(artifact).content}
    del content["files"], content["sha256"]
    assert model_card.text(content) == (artifact / "README.md").read_text(encoding="utf-8")
