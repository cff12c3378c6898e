"""A checkpoint's files: listed, compared, copied piece by piece, put into place once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jexport.errors import CheckpointError
from jexport.jobs.ray import upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "tokens").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "empty").touch()
    (place / "tokens" / "a.bin").write_bytes(os.urandom(upload.PIECE_BYTES + 5))
    (place / ".git").mkdir()
    (place / ".git" / "HEAD").write_text("x")
    (tmp_path / "blob").write_bytes(b"weights")
    (place / "model.safetensors").symlink_to(tmp_path / "blob")
    return place


def test_links_are_followed_and_hidden_folders_left_out(folder: Path) -> None:
    found = {one.path: one.size_bytes for one in upload.listed(folder)}
    assert found == {
        "config.json": 2,
        "empty": 0,
        "tokens/a.bin": upload.PIECE_BYTES + 5,
        "model.safetensors": 7,
    }
    with pytest.raises(CheckpointError, match="no checkpoint"):
        upload.listed(folder / "nowhere")


def test_pieces_make_the_file_again(folder: Path, tmp_path: Path) -> None:
    files = upload.listed(folder)
    source = upload.Source(folder, [one.path for one in files])
    for one in files:
        upload._copy(one, tmp_path / "copy", source.read)
    assert upload.same(tmp_path / "copy", files)
    (tmp_path / "copy" / "config.json").write_text("[]")
    assert not upload.same(tmp_path / "copy", files)
    with pytest.raises(PermissionError):
        source.read("../blob", 0)


def test_a_file_that_changes_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    files = upload.listed(folder)
    source = upload.Source(folder, [one.path for one in files])
    (folder / "config.json").write_text("[]")
    (folder / "tokens" / "a.bin").write_bytes(b"short")
    for name in ("config.json", "tokens/a.bin"):
        [one] = [one for one in files if one.path == name]
        with pytest.raises(CheckpointError, match="changed while it was sent"):
            upload._copy(one, tmp_path / "copy", source.read)


def test_the_first_of_two_is_kept_and_a_broken_one_replaced(folder: Path, tmp_path: Path) -> None:
    files = upload.listed(folder)
    sent = upload.Checkpoint(folder=folder, files=files, source=upload.Source(folder, []))
    read = upload.Source(folder, [one.path for one in files]).read
    place = tmp_path / "kept" / "model"
    place.parent.mkdir()
    inodes = []
    for number in range(3):
        staged = tmp_path / "kept" / str(number)
        for one in files:
            upload._copy(one, staged, read)
        if number == 2:
            (place / "config.json").write_text("[]")
        upload._put(staged, place, sent)
        assert upload.same(place, files)
        inodes.append(place.stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]


def test_a_node_that_has_the_folder_is_sent_nothing(folder: Path, tmp_path: Path) -> None:
    sent = upload.Checkpoint(folder=folder, files=upload.listed(folder), source=None)
    assert upload.there(sent, tmp_path / "kept") == folder
    assert not (tmp_path / "kept").exists()
