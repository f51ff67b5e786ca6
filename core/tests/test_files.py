import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from onestage.errors import MachineError
from onestage.files import file_digest, replacing, write_atomically


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    write_atomically(tmp_path / "last.ckpt", b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(MachineError, match=r"2\.0 MB needed, 1\.0 MB free") as caught:
        write_atomically(tmp_path / "last.ckpt", bytes(2_000_000))
    assert caught.value.exit_code == 5
    assert (tmp_path / "last.ckpt").read_bytes() == b"old"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(MachineError, match=r"2\.0 kB needed, 1\.0 kB free"):
        write_atomically(tmp_path / "last.ckpt", bytes(2_000))


def test_a_disk_that_fills_while_writing_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "last.ckpt", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(MachineError, match="no space"):
            write_atomically(tmp_path / "last.ckpt", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "last.ckpt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_reads_back_differently_does_not_replace_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "last.ckpt", b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: os.ftruncate(fd, 2))
    with pytest.raises(MachineError, match="reads back differently"):
        write_atomically(tmp_path / "last.ckpt", b"new")
    assert (tmp_path / "last.ckpt").read_bytes() == b"old"


def test_a_folder_that_may_not_be_written_is_an_error_without_a_traceback(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot write"):
        write_atomically(tmp_path / "file" / "last.ckpt", b"x")


def test_a_file_in_pieces_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "list.json"
    with replacing(path, text=True) as file:
        file.write("old")
    with pytest.raises(ZeroDivisionError), replacing(path, text=True) as file:
        file.write("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["list.json"]


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_importing_it_does_not_load_torch():
    code = "import sys, onestage.files, onestage.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
