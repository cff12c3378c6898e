"""A checkpoint from a hub's cache: its commit is recorded, and only what is meant is fetched.

The network is never used: HF_HUB_OFFLINE is set in tests/conftest.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from jexport.checkpoints import hub
from jexport.errors import DependencyError, HubError, RemoteCodeError
from jexport.types import LoadedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = FIXTURES / "jina_original_small"
NEWEST, OLDER = "a" * 39 + "1", "b" * 39 + "2"
Open = Callable[..., LoadedModel]
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    assert constants.HF_HUB_OFFLINE
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, model_id: str, commit: str, *sources: Path, newest: bool = True) -> Path:
    """Files as huggingface_hub keeps them: snapshots/<commit>, blobs, refs/main."""
    home = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for source in sources:
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                target = snapshot / path.relative_to(source if source.is_dir() else source.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                blob = (
                    home / "blobs" / f"{commit[:8]}{target.relative_to(snapshot)}".replace("/", "-")
                )
                shutil.copy(path, blob)
                target.symlink_to(blob)
    if newest:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
    return snapshot


def test_a_cached_model_is_loaded_and_its_commit_recorded(
    cache: Path, opened: Open, texts: list[str], reference_vectors: Vectors
) -> None:
    put(cache, "someone/small", NEWEST, SMALL)
    model = opened(Path("someone/small"), "separation")
    assert model.source.revision == NEWEST
    assert (model.source.name, model.source.code_revision) == ("someone/small", "")
    wanted = np.load(FIXTURES / "jina_original_small.separation.npy")
    assert np.abs(reference_vectors(model, texts) - wanted).max() <= 1e-6


def test_a_pinned_commit_is_that_commit(cache: Path, opened: Open, minilm: Path) -> None:
    put(cache, "someone/model", OLDER, SMALL)
    put(cache, "someone/model", NEWEST, minilm)
    assert opened(Path("someone/model")).source.layout == "sentence_transformer"
    older = opened(Path("someone/model"), revision=OLDER).source
    assert (older.layout, older.revision) == ("jina_v3_original", OLDER)
    with pytest.raises(HubError):
        opened(Path("someone/model"), revision="c" * 40)


def test_what_is_not_cached_needs_a_network(cache: Path, opened: Open) -> None:
    with pytest.raises(HubError, match="cannot get 'someone/nothing'") as caught:
        opened(Path("someone/nothing"))
    assert caught.value.exit_code == 18
    assert "\n" not in caught.value.evidence
    assert "--model FOLDER" in caught.value.fix


@pytest.mark.parametrize("name", ["some one/x", "someone/x--y..z", "someone/" + "x" * 200])
def test_an_id_that_no_hub_has_is_a_hub_error(name: str, cache: Path, opened: Open) -> None:
    with pytest.raises(HubError):
        opened(Path(name))


def test_a_local_folder_goes_before_the_hub(
    cache: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SMALL, tmp_path / "someone" / "small")
    monkeypatch.chdir(tmp_path)
    source = opened(Path("someone/small")).source
    assert (source.revision, source.name) == ("", "small")


def test_a_cache_without_a_commit_is_refused(
    cache: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(SMALL))
    with pytest.raises(HubError, match="does not say which commit"):
        opened(Path("someone/small"))


WANTED = {
    "config.json",
    "model.safetensors",
    "retrieval_query/adapter_model.safetensors",
    "1_Pooling/config.json",
    "tokenizer.json",
    "vocab.txt",
    "README.md",
    "sentencepiece.bpe.model",
    "model.safetensors.index.json",
}
CODE = {"modeling_tiny.py", "custom_st.py"}
NOT_WANTED = {
    "pytorch_model.bin",
    "model.pt",
    "x.pkl",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.bin",
    "openvino/config.json",
}


def asked_for(monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> dict[str, Any]:
    """What the hub is asked for, answered with `snapshot`."""
    from huggingface_hub.utils import filter_repo_objects

    seen: dict[str, Any] = {}

    def download(model_id: str, **how: Any) -> str:
        assert huggingface_hub.utils.are_progress_bars_disabled()
        offered = [*WANTED, *CODE, *NOT_WANTED]
        patterns = {key: how[key] for key in ("allow_patterns", "ignore_patterns")}
        taken = filter_repo_objects(offered, **patterns)
        seen.update(model_id=model_id, revision=how["revision"], files=set(taken))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


def test_neither_pickle_nor_code_is_fetched(
    cache: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked_for(monkeypatch, put(cache, "someone/small", NEWEST, SMALL))
    opened(Path("someone/small"))
    assert (seen["model_id"], seen["revision"]) == ("someone/small", None)
    assert seen["files"] == WANTED


@pytest.mark.usefixtures("own_module_cache")
def test_code_beside_a_hub_models_weights_is_fetched_when_it_is_trusted(
    cache: Path,
    tmp_path: Path,
    opened: Open,
    write_unknown: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    folder = write_unknown(tmp_path / "unknown")
    snapshot = put(cache, "someone/tiny", NEWEST, folder)
    trusted = {"trust_remote_code": True, "revision": NEWEST}
    model = opened(Path("someone/tiny"), **trusted)
    assert (model.source.revision, len(model.source.code)) == (NEWEST, 2)
    wanted = reference_vectors(opened(folder, trust_remote_code=True), texts[:4])
    assert np.array_equal(reference_vectors(model, texts[:4]), wanted)
    seen = asked_for(monkeypatch, snapshot)
    opened(Path("someone/tiny"), **trusted)
    assert seen["revision"] == NEWEST
    assert seen["files"] == WANTED | CODE


@pytest.mark.usefixtures("own_module_cache")
def test_code_in_a_repository_of_its_own_runs_at_its_pinned_commit(
    cache: Path,
    small_copy: Path,
    opened: Open,
    edit_json: Callable[..., None],
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    """As jina-embeddings-v3 is published: weights here, code in another repository."""
    put(cache, "someone/code", OLDER, FIXTURES / "remote_original", newest=False)
    broken = small_copy.parent / "broken"
    broken.mkdir()
    for path in (FIXTURES / "remote_original").glob("*.py"):
        (broken / path.name).write_text("raise SystemExit('the newest code must not run')\n")
    put(cache, "someone/code", NEWEST, broken)
    named = {
        "AutoConfig": "someone/code--configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "someone/code--modeling_lora.XLMRobertaLoRA",
    }
    edit_json(small_copy / "config.json", auto_map=named)
    model = opened(small_copy, "separation", trust_remote_code=True, code_revision=OLDER)
    assert (model.source.revision, model.source.code_revision) == ("", OLDER)
    assert {f"someone/code/{p.name}" for p in (FIXTURES / "remote_original").glob("*.py")} == {
        file.path for file in model.source.code
    }
    wanted = np.load(FIXTURES / "jina_original_small.separation.npy")
    assert np.abs(reference_vectors(model, texts) - wanted).max() <= 1e-6
    with pytest.raises(HubError):
        opened(small_copy, trust_remote_code=True, code_revision="c" * 40)


@pytest.mark.usefixtures("own_module_cache")
def test_a_folder_of_the_repositorys_name_is_not_taken_for_it(
    cache: Path,
    small_copy: Path,
    opened: Open,
    edit_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers would run the folder's code, while the manifest names the pinned commit's."""
    put(cache, "someone/code", OLDER, FIXTURES / "remote_original")
    here = small_copy.parent
    shutil.copytree(FIXTURES / "remote_original", here / "someone" / "code")
    monkeypatch.chdir(here)
    named = {
        "AutoConfig": "someone/code--configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "someone/code--modeling_lora.XLMRobertaLoRA",
    }
    edit_json(small_copy / "config.json", auto_map=named)
    model = opened(small_copy, trust_remote_code=True, code_revision=OLDER)
    with pytest.raises(RemoteCodeError, match="another folder"), model.reference():
        pass


def test_a_repository_without_the_code_is_refused(
    cache: Path, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    put(cache, "someone/code", OLDER, FIXTURES / "remote_unknown")
    named = {"AutoModel": "someone/code--modeling_lora.XLMRobertaLoRA"}
    edit_json(small_copy / "config.json", auto_map=named)
    with pytest.raises(RemoteCodeError, match="no code to run"):
        opened(small_copy, trust_remote_code=True, code_revision=OLDER)


def test_without_the_library_the_way_out_is_named(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match="huggingface_hub"):
        opened(Path("someone/model"))


def test_progress_bars_are_put_back(cache: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    with pytest.raises(HubError):
        hub.fetch("someone/nothing", "", hub.CODE)
    assert are_progress_bars_disabled() == before


def test_what_a_commit_is() -> None:
    assert hub.is_commit(NEWEST)
    for other in ("", "main", NEWEST[:39], NEWEST.upper(), "g" * 40, NEWEST + "0"):
        assert not hub.is_commit(other)


TITLE = "Adding `safetensors` variant of this model"
CONVERTED = "c" * 39 + "3"


def pull(number: int, author: str = "SFconvertbot", **change: Any) -> dict[str, Any]:
    """A pull request as the hub's API gives it."""
    usual = {"num": number, "author": {"name": author}, "title": TITLE, "status": "open"}
    dated = {"createdAt": "2024-01-01T00:00:00.000Z", "isPullRequest": True}
    return usual | dated | {"repo": {"name": "someone/pickled", "type": "model"}} | change


@pytest.fixture
def hub_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the hub on 127.0.0.1: paths and what it answers, which a test fills in."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.split("?")[0])
            body = json.dumps(answer).encode()
            self.send_response(200 if answer is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield answers
    server.shutdown()
    server.server_close()


API = "/api/models/someone/pickled"


def offer(answers: dict[str, Any], *pulls: dict[str, Any], parent: str = NEWEST) -> None:
    answers[f"{API}/discussions"] = {"count": len(pulls), "start": 0, "discussions": [*pulls]}
    for one in pulls:
        commits = [CONVERTED, parent, OLDER]
        answers[f"{API}/commits/refs%2Fpr%2F{one['num']}"] = [
            {
                "id": commit,
                "authors": [],
                "date": "2024-01-01T00:00:00Z",
                "title": "",
                "message": "",
            }
            for commit in commits
        ]


def test_the_hubs_own_conversion_is_named(
    cache: Path, tmp_path: Path, opened: Open, hub_api: dict[str, Any], pickled: Path
) -> None:
    offer(hub_api, pull(4, "somebody"), pull(5, title="Adding safetensors"), pull(6))
    [note] = opened(pickled).notes
    assert f"--revision {CONVERTED} (refs/pr/6, by SFconvertbot)" in note
    for pulls, parent in (
        ([], NEWEST),
        ([pull(4, "somebody")], NEWEST),
        ([pull(6, status="closed")], NEWEST),
        ([pull(6, isPullRequest=False)], NEWEST),
        ([pull(6)], OLDER),
    ):
        offer(hub_api, *pulls, parent=parent)
        [note] = opened(pickled).notes
        assert "--revision" not in note
        assert "jexport convert-weights" in note
    offer(hub_api, pull(6, status="merged"))
    assert CONVERTED in opened(pickled).notes[0]
    hub_api.clear()  # the hub knows nothing of it: no error, it is only a hint
    assert "convert-weights" in opened(pickled).notes[0]


@pytest.fixture
def pickled(cache: Path, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cached model with pickled weights only, which snapshot_download gives."""
    folder = tmp_path / "pickled"
    shutil.copytree(minilm, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    snapshot = put(cache, "someone/pickled", NEWEST, folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    return Path("someone/pickled")


def test_offline_nobody_is_asked(opened: Open, pickled: Path, minilm: Path) -> None:
    assert hub.conversion("someone/pickled", NEWEST) is None
    assert "convert-weights" in opened(pickled).notes[0]
    assert opened(minilm).notes == ()
