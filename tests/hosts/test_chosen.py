"""Where the hosts' tests look for hosts, and which of the tests run unasked."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytest_plugins = ["pytester"]


def client(host):
    name = f"turbodistill_chosen_{host}"
    spec = importlib.util.spec_from_file_location(name, HERE / host / "client.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder without hosts, and an environment that names none."""
    for name in list(os.environ):
        if name.endswith(("_PATH", "_PATHS", "_PYTHON")) and name.split("_")[0] in ("COMFYUI", "FORGE", "NEO"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(folder, version=""):
    folder.mkdir(parents=True)
    (folder / "main.py").touch()
    if version:
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def found():
    return [(each.version, each.newest) for each in client("comfyui").installations()]


def test_comfyuis_are_found_at_home_the_oldest_first(home):
    write(home / "comfy" / "ComfyUI", "0.3.64")
    assert found() == [("0.3.64", True)]
    write(home / "comfy" / "ComfyUI-new", "0.33.0")
    assert found() == [("0.3.64", False), ("0.33.0", True)]


def test_comfyuis_are_found_where_they_are_said_to_be(home, monkeypatch):
    write(home / "comfy" / "ComfyUI", "0.3.64")
    folders = [write(home / name, version) for name, version in (("a", "0.8.0"), ("b", ""), ("c", "0.33.0"))]
    monkeypatch.setenv("COMFYUI_PATHS", os.pathsep.join(map(str, folders)))
    assert found() == [("0.8.0", False), ("b", False), ("0.33.0", True)]


@pytest.mark.parametrize("variable", ["COMFYUI_PATHS", "COMFYUI_PATH", "COMFYUI_NEW_PATH"])
def test_a_comfyui_that_is_not_where_it_is_said_to_be_is_missed(home, monkeypatch, variable):
    write(home / "comfy" / "ComfyUI")
    write(home / "comfy" / "ComfyUI-new")
    monkeypatch.setenv(variable, str(home / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"there is none in .*nowhere; say in COMFYUI_PATHS"):
        found()


@pytest.mark.parametrize("variable", ["NEO_PATH", "FORGE_NEO_PATH"])
def test_forge_neo_is_found_by_either_name(home, monkeypatch, variable):
    module = client("webui")
    python = home / "neo" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (home / "neo" / "launch.py").touch()
    with pytest.raises(FileNotFoundError, match="set NEO_PATH"):
        module.installation(module.KINDS["neo"])
    monkeypatch.setenv(variable, str(home / "neo"))
    assert module.installation(module.KINDS["neo"]) == (home / "neo", python)


TESTS = """
import pytest
from types import SimpleNamespace
pytestmark = pytest.mark.host
HOSTS = [SimpleNamespace(newest=False), SimpleNamespace(newest=True)]
hosts = pytest.mark.parametrize("installation", HOSTS, ids=["old", "new"])

@hosts
@pytest.mark.share
def test_everywhere(installation): pass

@hosts
@pytest.mark.newest
def test_newest(installation): pass

@hosts
def test_beside(installation): pass

@hosts
@pytest.mark.share
@pytest.mark.asked
def test_asked_for(installation): pass

@pytest.mark.share
@pytest.mark.parametrize("kind", ["forge", "reforge"])
def test_slow(kind): pass
"""


@pytest.mark.parametrize(("asked", "run"), [("", 4), ("all", 10)])
def test_a_share_runs_unasked_and_the_rest_is_skipped_in_words(pytester, monkeypatch, asked, run):
    monkeypatch.setenv("HOSTS", asked)
    pytester.makeconftest((HERE / "conftest.py").read_text())
    pytester.makepyfile(TESTS)
    ran = pytester.runpytest("-rs", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning")
    ran.assert_outcomes(passed=run, skipped=10 - run)
    assert ("set HOSTS=all" in ran.stdout.str()) is (run < 10)
