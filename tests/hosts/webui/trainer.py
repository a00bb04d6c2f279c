"""Our trainings in a running WebUI, by the routes of our API."""

import time
from contextlib import contextmanager

import numpy as np

PLAIN = {"prompt": "a fox", "sampler_name": "Euler", "steps": 2, "seed": 5}
# Small enough for seconds on a CPU; so high a rate that four updates are seen.
SETTINGS = {
    "pairs": 8, "pair_steps": 2, "updates": 4, "regression_updates": 1, "adversarial_ramp": 0, "rank": 4,
    "batch_size": 2, "lr": 5e-3, "head_channels": 8, "precision": "float32", "evaluate_every": 2, "preview_every": 0,
    "ema_decay": 0.0, "lr_decay": 0.0,
}  # fmt: skip
ASKED = {"prompts": "a fox\nan owl\na red cat", "width": 64, "height": 64}


class Trainer:
    """The routes of our API, and the tests' own inspector, in a running host."""

    def __init__(self, webui, refused):
        self.webui, self.refused = webui, refused
        self.PLAIN, self.SETTINGS, self.ASKED = PLAIN, SETTINGS, ASKED

    def inspect(self, what):
        return self.webui.call(f"inspector/{what}")

    def state(self):
        return self.inspect("state")

    def start(self, name, settings=None, **asked):
        told = ASKED | {"name": name, "settings": SETTINGS | (settings or {})} | asked
        return self.webui.call("turbodistill/v1/distill", told)

    def run(self, pictures="newest"):
        return self.webui.call(f"turbodistill/v1/run?pictures={pictures}")

    def ask(self, wish):
        self.webui.call(f"turbodistill/v1/{wish}", {})

    def until(self, reached, seconds=300):
        """What the run tells as soon as `reached` is true of it."""
        ends = time.monotonic() + seconds
        while not reached(told := self.run("none")):
            assert told["state"] == "working" and time.monotonic() < ends, told["error"] or told
            time.sleep(0.1)
        return told

    def ended(self, seconds=300):
        ends = time.monotonic() + seconds
        while (told := self.run())["state"] == "working":
            assert time.monotonic() < ends, told
            time.sleep(0.1)
        return told

    def trains(self, told):
        return told["what"] == "training" and told["done"] >= 1

    @contextmanager
    def unchanged(self):
        """After it the model is as before: the weights to the bit, and a plain picture."""
        before, picture = self.state(), self.webui.txt2img(**PLAIN).picture
        yield
        assert self.state() == before
        assert np.array_equal(self.webui.txt2img(**PLAIN).picture, picture)
        assert before["hooks"] == 0 and before["forwards"] == 0
