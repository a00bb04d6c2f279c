"""A full-size model in a real WebUI: an update that is judged by pictures, and what was told of it."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.full_size, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
GB = 1024**3


def beside(path):
    spec = importlib.util.spec_from_file_location(f"turbodistill_of_full_size_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(kind, installation, tmp_path_factory):
    """The host with a full-size Stable Diffusion 1.5 and the tests' inspector."""
    if kind.name == "a1111":
        pytest.skip("AUTOMATIC1111 builds its text encoder from files of the hub")
    client, full = beside(HERE / "client.py"), beside(HERE.parents[1] / "export" / "full_size.py")
    full.skip_without_memory("sd15")
    data = tmp_path_factory.mktemp(f"full-{kind.name}")
    models = data / "models" / "Stable-diffusion"
    for folder in (models, data / "extensions"):
        folder.mkdir(parents=True)
    for name, place in (("turbodistill", HERE.parents[2]), ("inspector", HERE / "inspector")):
        (data / "extensions" / name).symlink_to(place, target_is_directory=True)
    full.write(models / "base.safetensors", "sd15")
    with client.serve(client.KINDS[kind.name], *installation, data) as server:
        server.set(live_previews_enable=False)
        server.txt2img(prompt="a fox", steps=1, width=64, height=64)  # the model is loaded with the first picture
        yield server
    shutil.rmtree(data / "models")  # pytest keeps its last folders


@pytest.mark.parametrize("again", ["false", "true"], ids=["kept", "checkpointing"])
def test_an_update_that_is_judged_by_pictures_takes_what_is_told(server, again):
    told = server.call(f"inspector/update?again={again}", patience=1500)
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in told["parts"].items())
    taken, estimated = told["taken"] / GB, told["told"] / GB
    print(f"\n256 px: {taken:.2f} GB taken, {estimated:.2f} told; {told['seconds']:.1f} s: {parts}")
    assert {"adversarial", "discriminator"} <= set(told["losses"])
    assert told["taken"] == pytest.approx(told["told"], rel=0.1)
