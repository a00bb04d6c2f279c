"""Who is drawn when: the newest input of each viewer, each in turn, and nobody waits for a slow one."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi", reason="needs gradio: pip install 'turbodistill[ui]'")
from turbodistill.app.live.hub import MOST_VIEWERS, Full, Hub
from turbodistill.app.live.messages import Asked, unpacked
from turbodistill.generate.stream import Frames, Shot


class Slow:
    """A generator whose frames take their time, and which notes what it draws."""

    def __init__(self, seconds=0.02):
        self.seconds, self.rounds = seconds, []
        self.host = SimpleNamespace(resolution=(8, 8))
        self.go = threading.Event()
        self.go.set()

    @contextmanager
    def streaming(self, path):
        yield self

    def make(self, shots):
        assert self.go.wait(10)
        if any(shot.prompt == "wrong" for shot in shots):
            raise ValueError("a wrong prompt")
        if any(shot.prompt == "broken" for shot in shots):
            raise RuntimeError("inner")
        time.sleep(self.seconds)
        self.rounds.append([shot.prompt for shot in shots])
        return Frames(torch.zeros(len(shots), 3, 8, 8), {"denoise": self.seconds})


def run(main):
    return asyncio.run(asyncio.wait_for(main, 30))


def hub_of(generator):
    return Hub(generator, lambda: {"first": Path("first"), "second": Path("second")})


def ask(hub, viewer, number, prompt="fox", student="first"):
    hub.ask(viewer, Asked(number, student, Shot(prompt)))


async def answer(viewer):
    return unpacked(await viewer.next())


def test_the_newest_input_wins_and_nothing_is_queued():
    generator = Slow()
    hub = hub_of(generator)

    async def main():
        viewer = hub.join(asyncio.get_running_loop())
        generator.go.clear()
        for number in range(1, 101):
            ask(hub, viewer, number, f"prompt {number}")
            if number == 1:
                await asyncio.sleep(0.1)  # it is being drawn
        generator.go.set()
        told = []
        while not told or told[-1]["number"] < 100:
            told.append((await answer(viewer))[0])
        hub.leave(viewer)
        return told

    told = run(main())
    assert [t["number"] for t in told][-1] == 100 and len(generator.rounds) == 2
    assert generator.rounds == [["prompt 1"], ["prompt 100"]] and told[-1]["dropped"] == 98


def test_each_viewer_has_its_turn_and_a_slow_one_holds_nobody_up():
    generator = Slow(0.01)
    hub = hub_of(generator)

    async def main():
        loop = asyncio.get_running_loop()
        viewers = [hub.join(loop) for _ in range(8)]
        counts = [0] * 8

        async def watch(k):
            number = 0
            while counts[0] < 40:
                number += 1
                ask(hub, viewers[k], number, f"{k} {number}")
                if k == 7:  # it asks, and never reads
                    await asyncio.sleep(0.001)
                    continue
                while (await answer(viewers[k]))[0]["number"] < number:
                    pass
                counts[k] += 1

        await asyncio.gather(*(watch(k) for k in range(8)))
        for viewer in viewers:
            hub.leave(viewer)
        return counts

    counts = run(main())
    assert min(counts[:7]) >= 0.8 * max(counts[:7])
    assert all(len(prompts) <= 8 for prompts in generator.rounds)


def test_a_viewer_is_sent_its_newest_frame_alone():
    generator = Slow(0.0)
    hub = hub_of(generator)

    async def main():
        viewer = hub.join(asyncio.get_running_loop())
        for number in range(1, 6):
            ask(hub, viewer, number, f"{number}")
            while len(generator.rounds) < number:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)  # the last file is made
        first = (await answer(viewer))[0]["number"]
        waits = not viewer.ready.is_set()
        hub.leave(viewer)
        return first, waits

    assert run(main()) == (5, True)


def test_a_wrong_input_is_told_to_its_viewer_and_the_others_have_their_frames():
    generator = Slow()
    hub = hub_of(generator)

    async def main():
        viewers = [hub.join(asyncio.get_running_loop()) for _ in range(4)]
        generator.go.clear()
        ask(hub, viewers[0], 1, "first of all")
        await asyncio.sleep(0.05)
        prompts = ("fox", "wrong", "broken", "owl")
        for viewer, prompt in zip(viewers, prompts, strict=True):
            ask(hub, viewer, 2, prompt, "first" if prompt != "owl" else "nobody")
        generator.go.set()
        told = []
        for viewer in viewers:
            while (found := (await answer(viewer))[0])["number"] < 2:
                pass
            told.append(found.get("error", found.get("type")))
        hub.leave(viewers[0])
        ask(hub, viewers[1], 3, "fox again")
        told.append((await answer(viewers[1]))[0]["type"])
        for viewer in viewers[1:]:
            hub.leave(viewer)
        return told

    frame, wrong, broken, nobody, again = run(main())
    assert frame == again == "image/png" and wrong == "a wrong prompt"
    assert broken == "the frame failed (RuntimeError): inner" and "there is no student 'nobody'" in nobody


def test_the_same_input_costs_others_no_turn():
    generator = Slow()
    hub = hub_of(generator)

    async def main():
        viewer = hub.join(asyncio.get_running_loop())
        told = []
        for number in (1, 2, 3):
            ask(hub, viewer, number, "fox" if number < 3 else "owl")
            told.append((await answer(viewer))[0].get("same", False))
        hub.leave(viewer)
        return told

    assert run(main()) == [False, True, False] and generator.rounds == [["fox"], ["owl"]]


def test_viewers_are_bounded_and_the_thread_ends_with_the_last():
    hub = hub_of(Slow())

    async def main():
        viewers = [hub.join(asyncio.get_running_loop()) for _ in range(MOST_VIEWERS)]
        with pytest.raises(Full, match="16 pages are open already"):
            hub.join(asyncio.get_running_loop())
        thread = hub._thread
        for viewer in viewers:
            hub.leave(viewer)
        thread.join(5)
        ended = not thread.is_alive()
        again = hub.join(asyncio.get_running_loop())
        ask(hub, again, 1)
        told, picture = await answer(again)
        hub.leave(again)
        return ended, told["number"], len(picture) > 0

    assert run(main()) == (True, 1, True)


def test_two_students_are_drawn_one_after_the_other():
    generator = Slow()
    hub = hub_of(generator)

    async def main():
        viewers = [hub.join(asyncio.get_running_loop()) for _ in range(3)]
        generator.go.clear()
        ask(hub, viewers[0], 1, "zero")
        await asyncio.sleep(0.05)
        for viewer, student in zip(viewers, ("first", "second", "first"), strict=True):
            ask(hub, viewer, 2, student, student)
        generator.go.set()
        for viewer in viewers:
            while json.loads(json.dumps((await answer(viewer))[0]))["number"] < 2:
                pass
        for viewer in viewers:
            hub.leave(viewer)

    run(main())
    assert generator.rounds == [["zero"], ["first", "first"], ["second"]]
