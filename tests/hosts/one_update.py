"""One update of a training in the process that it runs in: its memory beside what was told, and seconds of its parts.

Loaded by its file in each host's own Python: `measured(host, config)`.
"""

import ctypes
import gc
import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from turbodistill.trainer.data.samples import Samples
from turbodistill.trainer.loop import steps
from turbodistill.trainer.loop.distill import distill
from turbodistill.trainer.loop.start import begin
from turbodistill.trainer.run.memory import measure_memory

MMAP_THRESHOLD = -3  # glibc's name of the size from which memory is given back at once
PARTS = ("real_inputs", "head_inputs", "discriminator_losses", "_backward")


def resident():
    """Bytes that this process has of its own."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Watch:
    """The most memory of this process within."""

    def __enter__(self):
        self.most, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


class Clock:
    """Seconds of functions by name."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def of(self, name, function):
        def timed(*args, **more):
            begun = time.monotonic()
            try:
                return function(*args, **more)
            finally:
                self.seconds[name] += time.monotonic() - begun

        return timed


def measured(host, config):
    """Bytes told and taken by the second update over what stays between two, and seconds of its parts."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(MMAP_THRESHOLD, 1 << 18)
    torch.manual_seed(0)
    cond = host.encode_text(["", "a fox"]).to("cpu")
    samples = Samples(torch.randn(2, *host.latent_shape), cond, ["", "a fox"], torch.arange(2))
    state = begin(host, config, samples)
    try:
        told = measure_memory(state, samples, host.resolution, host.beside)
        updates = distill(state, samples, cond.rows(slice(1)))
        next(updates)
        gc.collect()
        libc.malloc_trim(0)
        before, clock = resident(), Clock()
        with ExitStack() as stack, Watch() as watch:
            for name in PARTS:
                stack.enter_context(mock.patch.object(steps, name, clock.of(name, getattr(steps, name))))
            step = next(updates)
        updates.close()
    finally:
        state.release()
    return {
        "told": told.activations, "taken": watch.most - before, "in words": told.in_words(), "seconds": step.seconds,
        "parts": clock.seconds, "losses": sorted(step.losses),
    }  # fmt: skip
