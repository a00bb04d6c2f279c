"""Shared by all tests: the toys, one thread, one seed; a browser, and the pages that it opens."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# What tests start has one thread, too: on several processes more of them would wait for each other in turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# It is started many times: without bytecode each start would compile everything anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# And glibc keeps freed memory for it, else it is given back and taken anew, page by page, with every large tensor.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31))

HERE = Path(__file__).parent


HOST = re.compile(r"tests/hosts/(\w+)/.*?\[([^]-]+)")  # the first of a test's parameters is its host
APART = "tests/webui_extension/test_gradios.py"  # each of its tests is many, in a process of its own


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """On several processes a file's tests run in one, and all of a host's do, so that its server starts once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByHost(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith(APART):
                return nodeid
            found = HOST.match(nodeid)
            return " ".join(found.groups()) if found else nodeid.partition("::")[0]

    return ByHost(config, log)


@pytest.hookimpl(trylast=True)  # when it is known what is skipped
def pytest_collection_modifyitems(items):
    """What takes long begins first: hosts, the busiest before others; other gradios; then files with slow tests."""
    if not os.environ.get("FULL_SIZE"):
        asked = pytest.mark.skip(
            reason="in full size, which takes gigabytes and minutes: set FULL_SIZE=1, run it alone"
        )
        for item in items:
            if item.get_closest_marker("full_size"):
                item.add_marker(asked)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    hosts = {item.nodeid: found.groups() for item in items if (found := HOST.match(item.nodeid))}
    work = Counter(hosts.get(item.nodeid) for item in items if not item.get_closest_marker("skip"))

    def later(item):
        host = hosts.get(item.nodeid)
        return host is None, host and (-work[host], host), not item.nodeid.startswith(APART), item.path not in slow

    items.sort(key=later)


def beside(name):
    """A module of this folder, by its path: tests are no package, and nothing is put on sys.path."""
    spec = importlib.util.spec_from_file_location(f"turbodistill_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toys():
    """The module `toys.py`."""
    return beside("toys")


@pytest.fixture(scope="session")
def pretended():
    """The module `pretend_gpu.py`: a GPU that is none."""
    return beside("pretend_gpu")


@pytest.fixture(scope="session")
def others():
    """The module `others.py`: LoRA files as others write them."""
    return beside("others")


@pytest.fixture(scope="session")
def foreign():
    """The module `foreign.py`: another site's page."""
    return beside("foreign")


@pytest.fixture(scope="session")
def fuzz():
    """The module `fuzz.py`: odd input."""
    return beside("fuzz")


@pytest.fixture(autouse=True)
def seeded():
    """The same draws whichever tests ran before; one thread, since toys are too small for more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",  # a camera that shows a moving dial
    "--use-fake-ui-for-media-stream",
)


@pytest.fixture(scope="session")
def chromium():
    """Where the browser is; asked for before a server is started for nothing."""
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(path).is_file():
        pytest.skip(f"needs a Chromium: there is none at {path}; say in CHROMIUM where it is")
    return path


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    # Not longer than a module: its event loop stands in the way of asyncio.run.
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def port():
    """A number that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(folder, port):
    """`turbodistill ui`, running: its process."""
    command = [sys.executable, "-m", "turbodistill.app.cli", "ui", "--port", str(port), "--out", str(folder)]
    log = (folder / "log.txt").open("a+")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    begun = time.monotonic()
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1).close()
                break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None and time.monotonic() - begun < 90, (folder / "log.txt").read_text()
                time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture
def watched(browser):
    """Opens pages of ours; in the end nothing was asked for elsewhere, and nothing has complained."""
    pages, faults = [], []

    def open_page(url, **size):
        page = browser.new_page(viewport=size)
        pages.append(page)
        page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


@pytest.fixture(scope="module")
def served(chromium, port, tmp_path_factory):
    """`turbodistill ui`, running: where it is, its folder, its process."""
    folder = tmp_path_factory.mktemp("ui")
    with serving(folder, port) as process:
        yield f"http://127.0.0.1:{port}", folder, process
