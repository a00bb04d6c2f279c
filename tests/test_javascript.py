"""The files that ComfyUI's page and the Live page load: their own tests, their types, their imports, the library."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "web"
LIVE = Path("app/live/static")  # the Live page of `turbodistill ui`
OURS = sorted([*WEB.glob("*.js"), *WEB.glob("panel/*.js")])
# `import ... from "x"`, `import "x"` and `new URL("x", import.meta.url)`
NAMED = re.compile(r"""(?:\bfrom\s*|\bimport\s*|\bnew URL\(\s*)["'](\.{1,2}/[^"']+)["']""")
OF_COMFYUI = {"scripts/app.js", "scripts/api.js"}


def test_their_own_tests_pass():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js: there is no node on the PATH")
    files = sorted((ROOT / "tests" / "javascript").glob("*.test.js"))
    command = [node, "--test", "--test-reporter=tap", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A copy of what is checked, beside the packages of the lock file."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm: there is none on the PATH")
    folder = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "package-lock.json", "tsconfig.json"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(WEB, folder / "web")
    shutil.copytree(ROOT / LIVE, folder / LIVE)
    command = [npm, "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    if re.search(r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENOTCACHED|network", done.stderr) and done.returncode:
        pytest.skip("needs npm's registry, which cannot be reached")
    assert done.returncode == 0, done.stderr
    return folder


def check(folder):
    """What the type checker says, "" if nothing."""
    npx = shutil.which("npx")
    done = subprocess.run([npx, "tsc"], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.stdout


def test_types_are_right(packages):
    assert check(packages) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        'import { app } from "../../scripts/app.js"; app.graph.noSuchThing();',
        'import { api } from "../../scripts/api.js"; api.fetchApi(1);',
        'import { join } from "./panel/run.js"; join(null, { name: 1 });',
        'import uPlot from "./lib/uPlot.min.js"; new uPlot("wide");',
    ],
    ids=["ComfyUI's app", "ComfyUI's api", "a run", "uPlot"],
)
def test_wrong_types_are_found(packages, wrong):
    # Types that cannot be resolved would be `any`, and nothing would ever be found.
    probe = packages / "web" / "probe.js"
    probe.write_text(wrong, encoding="utf-8")
    found = check(packages)
    probe.unlink()
    assert found.startswith("web/probe.js(1,")


def test_the_library_is_the_published_one(packages):
    published = packages / "node_modules" / "uplot"
    exported = (published / "dist" / "uPlot.iife.min.js").read_bytes() + b"\nexport default uPlot;\n"
    assert (WEB / "lib" / "uPlot.min.js").read_bytes() == exported
    assert (WEB / "lib" / "uPlot.min.css").read_bytes() == (published / "dist" / "uPlot.min.css").read_bytes()
    assert (WEB / "lib" / "uPlot-LICENSE").read_bytes() == (published / "LICENSE").read_bytes()


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(WEB).as_posix())
def test_what_is_imported_is_there(path):
    for name in NAMED.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / name).resolve()
        # ComfyUI serves web/ as /extensions/<our folder>/, two below its own scripts.
        of_comfyui = target.relative_to(ROOT.parent).as_posix() if ROOT.parent in target.parents else ""
        assert target.is_file() or of_comfyui in OF_COMFYUI, f"{path.name} imports {name}"


def test_nothing_comes_from_elsewhere():
    for path in [*OURS, *WEB.glob("panel/*.css"), *WEB.glob("lib/*.css")]:
        assert not re.search(r"https?://|@import\s+url|\bimport\(", path.read_text(encoding="utf-8")), path.name


def test_versions_are_pinned():
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    locked = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert wanted == {name: locked[f"node_modules/{name}"]["version"] for name in wanted}
