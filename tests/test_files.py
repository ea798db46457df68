"""Files are written whole or not at all, and nothing is replaced unless asked."""

from __future__ import annotations

import os

import pytest

from diffsamp import files
from diffsamp.errors import DiffsampError
from diffsamp.files import AlreadyThere, NotWritten, output_folder, write_whole


def test_a_file_is_whole_its_folder_is_made_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_whole(path, b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000 and os.listdir(path.parent) == ["file.bin"]


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"first")
    with pytest.raises(DiffsampError, match="exists; choose another place or use --force"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    write_whole(path, b"second", overwrite=True)
    assert path.read_bytes() == b"second"


def test_a_name_that_is_taken_while_the_file_is_written_is_not_replaced(tmp_path, monkeypatch):
    path, real = tmp_path / "file", os.fsync

    def meanwhile(handle):
        path.write_bytes(b"another process")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    with pytest.raises(AlreadyThere):
        write_whole(path, b"ours")
    assert path.read_bytes() == b"another process" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_links_still_gets_the_file(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.os, "link", refused)
    write_whole(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(NotWritten if isinstance(error, OSError) else KeyboardInterrupt):
        write_whole(path, b"new", overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_cleared_from_an_output_folder(tmp_path):
    (tmp_path / ".picture.png.0a1b2c3d.partial").write_bytes(b"half")
    with pytest.raises(DiffsampError, match="not empty"):
        output_folder(tmp_path)
    assert os.listdir(output_folder(tmp_path, force=True)) == []
