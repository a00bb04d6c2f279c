"""What a launcher starts in tests: trainings of a toy, one after another, each as `jobs.json` of a folder asks for."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from turbodistill.app import processes
from turbodistill.app.interrupt import interruptible
from turbodistill.trainer.config import Config
from turbodistill.trainer.run import run


def _kit():
    spec = importlib.util.spec_from_file_location("turbodistill_toys", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = _kit()


def train(folder, world, name, settings, network="conv", images=None, slow=0.0, apart=False):
    """One of the trainings, in a folder of its name, or `apart` one for each process; its events, some seconds each."""
    host = kit.unet_host() if network == "unet" else kit.conv_host()
    place = folder / (f"{name} {world.rank}" if apart else name)
    events = []
    for event in run.run(host, Config(**settings), place, kit.WORDS, images, world=world):
        events.append(event)
        time.sleep(slow)
    return events


def main(folder):
    jobs = json.loads((folder / "jobs.json").read_text())
    with interruptible():  # as the command has it: a launcher ends the others by a signal, and they say why they end
        world = processes.join(Config(**jobs[0]["settings"]), "--fsdp" in sys.argv)
        (folder / f"process-{world.rank}").write_text(str(os.getpid()))
        for job in jobs:
            train(folder, world, **job)
        processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
