"""The arrows between the rooms, read from every file's syntax tree."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> the rooms it may import besides itself. The longest matching room is a file's own.
MAY = {
    "core": set(),
    "demo": {"core"},
    "demo/recipe": {"core", "demo"},
    "trainer": {"core", "demo"},
    "generate": {"core", "demo", "trainer"},
    "measure": {"core", "demo", "trainer", "generate"},
    "page": {"core", "trainer", "generate"},
    "nodes": {"core", "demo", "trainer", "generate", "nodes/host"},
    "nodes/host": {"core", "demo", "trainer"},
    "webui_extension": {"core", "page", "trainer", "generate"},
    "app": {"core", "demo", "trainer", "generate", "measure", "page"},
}
OURS = {"turbodistill", *MAY}
INSIDES = {"comfy", "comfy_extras", "folder_paths", "server", "execution", "latent_preview", "nodes"}
INSIDES |= {"modules", "modules_forge", "backend", "ldm", "ldm_patched", "sgm", "k_diffusion"}
CORE_MAY = set(sys.stdlib_module_names) | {"torch", "safetensors", "numpy"}
FILES = sorted({p for room in MAY for p in (ROOT / room).rglob("*.py")})
DOORS = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "scripts" / "turbodistill.py"]


def room_of(path: str) -> str:
    """The room of a module or folder, a path relative to the root; "" is the root, a door."""
    return max((r for r in MAY if path == r or path.startswith(r + "/")), key=len, default="")


def targets(file: str, node: ast.ImportFrom) -> list[str]:
    """What a relative import means, as paths relative to the root without .py."""
    parts = Path(file).parent.parts
    if node.level - 1 > len(parts):
        return ["outside the package"]
    base = parts[: len(parts) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
    # `from .. import core` names a room; `from ..core import card` is in one already.
    return ["/".join((*base, alias.name)) for alias in node.names] if not node.module else ["/".join(base)]


def of_a_host(room: str, file: str) -> bool:
    """Whether a file may touch a host's own modules."""
    return room == "nodes/host" or (room == "webui_extension" and Path(file).name.startswith("host"))


def broken(file: str, source: str) -> list[str]:
    """Every import of `file` that the law forbids, in words."""
    room, found = room_of(str(Path(file).parent)), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            for target in targets(file, node):
                other = room_of(target)
                if other == "":
                    found.append(f"{file}:{node.lineno} imports {target}, a door or no room of ours")
                elif other != room and other not in MAY[room]:
                    found.append(f"{file}:{node.lineno} ({room}) imports {other}")
            continue
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in (n.partition(".")[0] for n in names):
            if name in INSIDES and not of_a_host(room, file):
                found.append(
                    f"{file}:{node.lineno} touches a host's {name}: only nodes/host and webui_extension/host* may"
                )
            elif name in OURS:
                found.append(f"{file}:{node.lineno} imports {name} absolutely: our imports are relative")
            elif room == "core" and name not in CORE_MAY:
                found.append(f"{file}:{node.lineno} imports {name}: core needs torch and safetensors alone")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_inward_and_are_relative(path):
    assert broken(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "from ..trainer import run"),
        ("core/x.py", "from .. import demo"),
        ("core/x.py", "import diffusers"),
        ("core/x.py", "def f():\n    from transformers import AutoModel"),
        ("core/x.py", "import gradio as gr"),
        ("core/x.py", "import torchvision"),
        ("core/x.py", "import folder_paths"),
        ("demo/x.py", "from ..trainer.run import Event"),
        ("demo/x.py", "from .recipe import fit"),
        ("demo/recipe/x.py", "from ...trainer import run"),
        ("trainer/x.py", "from ..nodes import host"),
        ("trainer/x.py", "from ..demo.recipe import fit"),
        ("trainer/x.py", "from turbodistill.core import card"),
        ("trainer/x.py", "from core import card"),
        ("trainer/x.py", "import comfy.utils"),
        ("nodes/x.py", "from ..webui_extension.host import A1111"),
        ("webui_extension/x.py", "from ..nodes import host"),
        ("nodes/x.py", "import comfy.samplers"),
        ("trainer/x.py", "from ..measure import metrics"),
        ("trainer/data/x.py", "from ...page import job"),
        ("page/x.py", "from ..webui_extension import host"),
        ("measure/x.py", "from ..page import job"),
        ("generate/x.py", "from ..measure import metrics"),
        ("webui_extension/x.py", "from ..app import cli"),
        ("nodes/x.py", "from ..page import job"),
        ("webui_extension/x.py", "from modules import shared"),
        ("trainer/x.py", "from .. import WEB_DIRECTORY"),
        ("webui_extension/x.py", "from ..scripts import turbodistill"),
        ("trainer/x.py", "from ...elsewhere import thing"),
    ],
)
def test_the_law_catches(file, source):
    assert len(broken(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "import math\nfrom torch import nn\nfrom safetensors.torch import save\nfrom .card import read"),
        ("demo/recipe/x.py", "from ...core.naming import to_single_file\nfrom ..text_encoder import TextEncoder"),
        ("demo/recipe/x.py", "from . import dataset\nimport diffusers"),
        ("trainer/x.py", "from ..core import losses\nfrom .. import core\nfrom .config import Config"),
        ("nodes/host/x.py", "import comfy.model_management\nfrom ...trainer.host import Host"),
        ("nodes/x.py", "from comfy_api.latest import io\nfrom .host import patcher"),
        ("webui_extension/host.py", "from modules import shared\nfrom ..core.denoiser import Denoiser"),
    ],
)
def test_the_law_allows(file, source):
    assert broken(file, source) == []


def test_no_module_leads_back_to_itself():
    modules = {p.relative_to(ROOT).with_suffix("").as_posix() for p in FILES}
    leads: dict[str, set[str]] = {}
    for path in FILES:
        file = path.relative_to(ROOT).as_posix()
        found = leads.setdefault(path.relative_to(ROOT).with_suffix("").as_posix(), set())
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what a function imports comes later
            if isinstance(node, ast.ImportFrom) and node.level:
                base = targets(file, ast.ImportFrom(None, node.names, node.level)) if not node.module else []
                (stem,) = targets(file, node) if node.module else [""]
                found |= {t for t in (*base, stem, *(f"{stem}/{a.name}" for a in node.names)) if t in modules}
    graphlib.TopologicalSorter(leads).prepare()  # raises CycleError


def test_the_law_sees_every_room():
    # Files elsewhere would escape it: whatever is Python in the package lies in a room or is a door.
    packages = [p for p in ROOT.glob("*/*.py") if p.parent.name not in ("tests", "benchmarks", "build", "dist")]
    assert [p for p in packages if p not in FILES and p not in DOORS] == []
    assert {p.parent.name for p in FILES} >= {"core", "trainer", "demo", "recipe"}


def test_comfyui_s_door_imports_nothing():
    # pytest and the WebUI import it too: at module level it must do no work.
    tree = ast.parse(DOORS[0].read_text(encoding="utf-8"))
    assert [n.lineno for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Expr, ast.Try, ast.If))] in (
        [],
        [1],  # the docstring
    )


@pytest.mark.parametrize("room", ["core", "nodes", "trainer", "webui_extension", "scripts", "tests"])
def test_rooms_shadow_nobody(room):
    # With an __init__.py these names, on the WebUI's sys.path, would hide modules of other extensions.
    assert not (ROOT / room / "__init__.py").exists()
