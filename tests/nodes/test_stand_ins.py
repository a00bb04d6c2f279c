"""The stand-ins come and go as a whole."""

import sys

import pytest
import turbodistill


def test_nothing_is_left_of_them(comfyui):
    before = dict(sys.modules)
    with comfyui.installed() as nodes:
        assert sys.modules["comfy.samplers"].KSAMPLER in nodes.patcher.FewStep.__mro__
        assert sys.modules["turbodistill.nodes.host.patcher"] is nodes.patcher
    theirs = {"aiohttp", "comfy", "comfy_api", "folder_paths", "latent_preview", "server"}
    assert {n for n in sys.modules if n.partition(".")[0] in theirs} <= set(before)
    assert [n for n in sys.modules if n.startswith("turbodistill.nodes")] == []
    assert not hasattr(turbodistill, "nodes")


def test_what_was_there_before_comes_back(comfyui):
    real = object()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("comfy", "turbodistill.nodes.host"):
            patch.setitem(sys.modules, name, real)
        with pytest.raises(RuntimeError, match="stop"), comfyui.installed():
            assert sys.modules["comfy"] is not real and sys.modules["turbodistill.nodes.host"] is not real
            raise RuntimeError("stop")
        assert sys.modules["comfy"] is sys.modules["turbodistill.nodes.host"] is real
