"""Files and folders without rights are told as such: not as missing, broken, or short of space."""

import errno
import os

import pytest
from turbodistill.core.card import CardError, read_card
from turbodistill.core.rights import denied
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.header import read_header
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.files import DataError, read_tensors, write_whole
from turbodistill.trainer.data.lock import locked
from turbodistill.trainer.data.pictures import read_pictures
from turbodistill.trainer.data.prompts import read_prompts
from turbodistill.trainer.run import training


@pytest.fixture
def refuse(monkeypatch):
    """Make a function of `os` fail for a path as it does without rights, which root always has."""

    def refuse(path, *names):
        for name in names:
            real = getattr(os, name)

            def refused(given, *args, real=real, **how):
                if os.fspath(given) == os.fspath(path):
                    raise PermissionError(errno.EACCES, "Permission denied", os.fspath(given))
                return real(given, *args, **how)

            monkeypatch.setattr(os, name, refused)

    return refuse


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (read_card, CardError),
        (read_header, ModelError),
        (read_tensors, PermissionError),
        (read_prompts, DataError),
        (Config.from_toml, ConfigError),
    ],
)
@pytest.mark.parametrize("call", ["open", "stat"])  # its own rights, those of a folder above it
def test_a_file_that_may_not_be_read_is_told(tmp_path, refuse, read, kind, call):
    path = tmp_path / "file.safetensors"
    path.write_text("a fox")
    assert not denied(path)
    refuse(path, call)
    with pytest.raises(kind, match=r"file.safetensors may not be read: change its rights"):
        read(path)


def test_a_state_that_may_not_be_read_is_not_called_broken(kit, host, tmp_path, refuse):
    kit.go(host, kit.config(), tmp_path)
    refuse(tmp_path / training.STATE, "open")
    with pytest.raises(ConfigError, match=r"state.safetensors may not be read: change its rights"):
        kit.go(host, kit.config(), tmp_path)


def test_a_folder_of_pictures_that_may_not_be_read_is_told(tmp_path, refuse):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a fox")
    refuse(tmp_path / "closed", "scandir")
    with pytest.raises(DataError, match=r"1 folders may not be read, the first is .*closed: change its rights"):
        read_pictures(tmp_path)
    words = read_pictures(tmp_path, "skip").in_words()
    assert "1 folders that may not be read (the first is " in words and "closed)" in words
    refuse(tmp_path, "stat")
    with pytest.raises(DataError, match=r"^image folder .* may not be read: change its rights"):
        read_pictures(tmp_path)


def test_what_may_not_be_written_is_told(tmp_path, refuse):
    refuse(tmp_path / "run" / ".lock", "open")
    refuse(tmp_path / "a.txt.part", "replace")
    words = r"\(Permission denied\): choose a folder that you may write to"
    with pytest.raises(OSError, match=words), locked(tmp_path / "run"):
        pass
    with pytest.raises(OSError, match=words):
        write_whole(tmp_path / "a.txt", b"a fox")


@pytest.mark.parametrize("read", [read_prompts, Config.from_toml])
def test_a_folder_in_a_file_s_place_is_told(tmp_path, read):
    with pytest.raises(ValueError, match=r"is a folder: give a file"):
        read(tmp_path)
