"""Which tests of the hosts run: a share of them in each host, or with HOSTS=all every test in every host."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BESIDE = "beside the share of the hosts' tests that runs unasked: set HOSTS=all"


SLOW = {"reforge"}  # it takes as long as the other three together, and is Forge's kin


def in_share(item):
    """Whether a test runs unasked in the host that it is for."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("asked") or params.get("kind") in SLOW:
        return False
    place = params.get("installation")
    return item.get_closest_marker("share") or (item.get_closest_marker("newest") and getattr(place, "newest", False))


def pytest_collection_modifyitems(items):
    if os.environ.get("HOSTS") == "all":
        return
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("host") and not in_share(item):
            item.add_marker(pytest.mark.skip(reason=BESIDE))
