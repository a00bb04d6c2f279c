"""The same tests with the gradio of AUTOMATIC1111 and of Forge, each in an environment of its own.

An environment lies in the user's cache, and is made once. It has the host's web packages, and lends
everything else, torch above all, from the one that runs the tests.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = "altair==5.5.0 httpx==0.24.1 httpcore==0.17.3 h11==0.14.0 numpy==1.26.4 pandas==2.3.3 pillow==10.4.0"
HOSTS = {
    "AUTOMATIC1111": "gradio==3.41.2 gradio_client==0.5.0 fastapi==0.94.0 starlette==0.26.1 pydantic==1.10.27 "
    "websockets==11.0.3 huggingface-hub==0.36.2 anyio==3.7.1 jsonschema==4.17.3 pyrsistent==0.20.0 attrs narwhals",
    "Forge": "gradio==4.40.0 gradio_client==1.2.0 fastapi==0.104.1 starlette==0.27.0 pydantic==2.8.2 "
    "pydantic_core==2.20.1 websockets==12.0 huggingface-hub==0.26.2 anyio==3.7.1 tomlkit==0.12.0",
}
# Of gradio's own packages those that the newest no longer brings.
BOTH = "aiofiles==23.2.1 ffmpy==0.4.0 importlib_resources==6.5.2 pydub==0.25.1 semantic-version==2.10.0 sniffio==1.3.1"
UNREACHABLE = re.compile(r"No matching distribution|Could not find a version|Connection|ReadTimeout|resolve")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment(host: str) -> Path:
    """The Python of a host's environment, made if need be."""
    if sys.version_info[:2] > (3, 12):
        pytest.skip("needs Python 3.12 at most: these gradios' packages have no wheels for a later one")
    wanted = f"{SHARED} {BOTH} {HOSTS[host]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbodistill-tests"
    told = hashlib.sha256(f"{sys.base_prefix} {sys.version} {wanted}".encode()).hexdigest()[:8]
    folder = cache / f"{host.lower()}-{told}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "ready").exists():
        make(folder, python, wanted)
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           check=True, capture_output=True, text=True)  # fmt: skip
    lent = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"  # behind its own
    (Path(found.stdout.strip()) / "zz_lent.pth").write_text(lent)
    return python


def make(folder: Path, python: Path, wanted: str) -> None:
    """The host's packages in a fresh environment; skips the test where pip's index cannot be reached."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", *wanted.split()]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"needs pip's index, which cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (folder / "ready").touch()


@pytest.mark.parametrize("host", HOSTS)
def test_what_depends_on_gradio_works_with_the_host_s(host, capsys):
    python = environment(host)
    asked = "from importlib.metadata import version; print(version('gradio'))"
    version = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    assert f"gradio=={version}" in HOSTS[host]
    # Others import what fits the tests' own environment.
    files = [p for p in sorted(HERE.glob("test_*.py")) if re.search(r"pytestmark = .*mark.gradio", p.read_text())]
    command = [python, "-m", "pytest", "-q", "-m", "gradio", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 50
    with capsys.disabled():
        print(f"\n{host}, gradio {version}: {summary}")
