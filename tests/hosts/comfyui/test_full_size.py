"""Full-size Stable Diffusion 1.5 and XL in a real ComfyUI, by how it is started: a training, a picture, memory."""

import json
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.host, pytest.mark.full_size, pytest.mark.newest, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent
LONGEST = 1500  # seconds
GB = 1024**3
# --lowvram needs an accelerator: ComfyUI does not take it with --cpu.
STARTS = {
    "float8": ["--fp8_e4m3fn-unet"],
    "float16": ["--fp16-unet"],
    "no cache": ["--cache-none"],
    "small cache": ["--cache-lru", "4"],
}
SHORT = {"rank": 4, "updates": 2, "batch_size": 1, "gradient_checkpointing": True}
PAIRS = {"pairs": 4, "pair_steps": 2, "pair_sampler": "dpmpp_2m", "guidance": 3.0, "seed": 0, "at_once": 1}


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def base(kind, full, tmp_path_factory):
    """A server's folder with the checkpoint."""
    full.skip_without_memory(kind)
    place = tmp_path_factory.mktemp(kind)
    (place / "models" / "checkpoints").mkdir(parents=True)
    file = full.write(place / "models" / "checkpoints" / "full.safetensors", kind)
    yield place
    file.unlink()  # pytest keeps its last folders


class Watch(threading.Thread):
    """The most memory that a process has had of its own, in bytes, from here to `most()`."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.status, self.found, self.over = Path(f"/proc/{process}/status"), 0, False
        self.start()

    def run(self):
        while not self.over:
            self.found = max(self.found, self.now())
            time.sleep(0.05)

    def now(self):
        found = re.search(r"RssAnon:\s+(\d+)", self.status.read_text())
        return 1024 * int(found[1]) if found else 0  # it has ended

    def most(self):
        self.over = True
        self.join()
        return self.found


@pytest.mark.parametrize("start", STARTS)
def test_it_is_distilled_and_sampled_within_the_estimate(serve, base, new_graph, kind, start, record_property):
    with serve(base, *STARTS[start]) as server:
        empty = Watch(server.process.pid).most()
        graph = new_graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name="full.safetensors")
        parts = {"model": loaded, "clip": loaded[1], "vae": loaded[2]}
        prompts = graph.add("TurboDistillPrompts", source="the text below", text="a fox\nan owl\na cat", file="")
        pairs = graph.add("TurboDistillTeacherPairs", **parts, prompts=prompts, width=128, height=128, **PAIRS)
        trained = graph.add("TurboDistillDistill", **parts, pairs=pairs, name=f"{kind} {start}", **SHORT)
        positive = graph.add("CLIPTextEncode", clip=loaded[1], text="a fox")
        latent = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        picture = graph.add("VAEDecode", samples=graph.sample(trained, positive, latent), vae=loaded[2])
        shown = graph.add("PreviewImage", images=picture)
        watch = Watch(server.process.pid)
        run = server.wait(server.queue(graph), LONGEST)
        peak = watch.most()
        told = json.loads(server.get(f"turbodistill/runs/{trained.name}"))
        assert told["state"] == "done" and told["history"]["update"] == [1, 2]
        made = server.pictures(run, shown)
        assert made.shape == (1, 128, 128, 3) and made.std() > 0.01
    print(f"\n{kind}, {start}: {empty / GB:.2f} GB before, at most {peak / GB:.2f} GB; {told['memory']}")


PIXELS = {
    "pixel_backbone": "embedded", "pixel_size": 224, "rank": 16, "batch_size": 1, "regression_updates": 0,
    "discriminator_warmup": 0, "precision": "float32", "updates": 9,
}  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
def test_an_update_that_is_judged_by_pictures_takes_what_is_told(installation, base, kind, again, tmp_path):
    if kind != "sd15":
        pytest.skip("Stable Diffusion 1.5 alone")
    file = base / "models" / "checkpoints" / "full.safetensors"
    settings = PIXELS | {"gradient_checkpointing": again}
    (tmp_path / "job.json").write_text(json.dumps({"file": str(file), "size": 256, "settings": settings}))
    command = [installation[1], HERE / "pixels_full.py", installation[0], HERE.parents[2], tmp_path]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in told["parts"].items())
    taken, estimated = told["taken"] / GB, told["told"] / GB
    print(f"\n256 px: {taken:.2f} GB taken, {estimated:.2f} told; {told['seconds']:.1f} s: {parts}")
    assert {"adversarial", "discriminator"} <= set(told["losses"])
    assert told["taken"] == pytest.approx(told["told"], rel=0.1)
