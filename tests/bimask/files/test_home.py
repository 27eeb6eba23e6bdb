"""Accounts without a home that can be written to, or without an entry in the list of users."""

import os
import stat
from pathlib import Path

import pytest

from bimask.files.home import ensure_home


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_home_that_can_be_written_to_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ensure_home() == tmp_path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("known", ["/dev/null", "/no/such/folder", None])
def test_without_one_there_is_a_folder_of_this_user_alone(known, temporary, monkeypatch, capsys):
    def nobody(*_):
        raise KeyError

    if known is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", nobody)
    else:
        monkeypatch.setenv("HOME", known)
    monkeypatch.setenv("USER", "somebody")
    home = ensure_home()
    assert home.parent == temporary
    assert os.environ["HOME"] == str(home) == str(Path.home())
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert "set HOME" in capsys.readouterr().err
    assert ensure_home() == home


def test_a_folder_that_another_has_laid_there_is_not_taken(temporary, monkeypatch):
    laid = temporary / f"bimask-home-{os.getuid()}"
    laid.mkdir()
    laid.chmod(0o777)
    monkeypatch.setenv("HOME", "/no/such/folder")
    home = ensure_home()
    assert home != laid
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
