"""What the page is told of a run: messages now and then, the whole when it asks, and what it may ask for."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from turbodistill.trainer.config import Config
from turbodistill.trainer.loop.distill import Step
from turbodistill.trainer.loop.health import Health
from turbodistill.trainer.run import session
from turbodistill.trainer.run.events import Begun, PairsMade
from turbodistill.trainer.run.memory import Memory
from turbodistill.trainer.run.monitor import Monitor

NODE = "7"
RUN = f"/turbodistill/runs/{NODE}"


def hidden(node, **about):
    """What ComfyUI tells a node of itself and of the workflow that it is in."""
    return SimpleNamespace(unique_id=node, extra_pnginfo=about)


HIDDEN = hidden(NODE, workflow={"id": "a workflow"})


def step(update, **losses):
    return Step(update, {"regression": 1 / update} | losses, Health(0.5, update, 1.0, 1.0, 1.0), 0.1, 0.1 * update)


class Clock:
    """Seconds that go on only when told."""

    now = 100.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(nodes, monkeypatch):
    made = Clock()
    for module in (nodes.panel, session):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def monitor():
    return Monitor("distill", "my-turbo", Config(updates=10_000), lambda latents: [f"{len(latents)} pictures"])


def test_a_long_server_s_life_fills_no_memory(nodes, server):
    """Many workflows, many runs that were stopped early: the newest of them are known."""
    for k in range(100):
        told = Monitor("distill", f"run-{k}", Config(), lambda latents: [])
        told.control.stop = True
        with nodes.panel.watched(hidden(str(k)), told):
            pass
    assert list(nodes.panel._panels) == [str(k) for k in range(68, 100)]
    assert list(nodes.panel._stopped) == [f"run-{k}" for k in range(68, 100)]
    with nodes.panel.watched(hidden("70"), told):  # what runs again is new again
        pass
    assert list(nodes.panel._panels)[-1] == "70" and len(nodes.panel._panels) == 32


# --- routes ---


def test_a_node_that_has_not_run_has_nothing_to_tell_and_cannot_be_asked(server):
    assert server.routes.ask("GET", RUN) == (204, None)
    for wish in ("stop", "preview"):
        status, told = server.routes.ask("POST", f"{RUN}/{wish}")
        assert status == 404 and "has no run" in told["error"]
    assert server.routes.ask("POST", f"{RUN}/burn") == (404, None)


@pytest.mark.parametrize("headers", [{"origin": "null"}, {"origin": "http://evil.example"}])
def test_another_site_s_page_can_ask_for_nothing(nodes, server, monitor, headers):
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        panel.follow(step(1))
        for method, path in (("GET", RUN), ("POST", f"{RUN}/stop"), ("POST", f"{RUN}/preview")):
            status, told = server.routes.ask(method, path, host="127.0.0.1:8188", **headers)
            assert status == 403 and "not from" in told["error"]
        assert not monitor.control.stop and not monitor.control.preview


def test_a_run_says_of_which_workflow_it_is(nodes, server, monitor):
    """Node ids are the same in other workflows."""
    with nodes.panel.watched(HIDDEN, monitor):
        assert server.sent[-1][1]["workflow"] == server.routes.ask("GET", RUN)[1]["workflow"] == "a workflow"
    for unknown in (hidden(NODE), hidden(NODE, workflow=None), SimpleNamespace(unique_id=NODE, extra_pnginfo=None)):
        with nodes.panel.watched(unknown, monitor):  # as where a script queued the graph
            assert server.sent[-1][1]["workflow"] == ""


def test_a_node_inside_a_subgraph_is_found(nodes, server, monitor):
    with nodes.panel.watched(hidden("7:12"), monitor):
        assert server.routes.ask("GET", "/turbodistill/runs/7:12")[1]["node"] == "7:12"


def test_stop_and_preview_reach_the_training(nodes, server, monitor):
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        panel.follow(step(1))
        for wish in ("stop", "preview"):
            assert not getattr(monitor.control, wish)
            assert server.routes.ask("POST", f"{RUN}/{wish}") == (204, None)
            assert getattr(monitor.control, wish)


def test_what_does_not_train_cannot_be_asked(nodes, server, monitor):
    def refused():
        answers = [server.routes.ask("POST", f"{RUN}/{wish}") for wish in ("stop", "preview")]
        return answers == [(409, {"error": "no training runs here now"})] * 2

    with nodes.panel.watched(HIDDEN, monitor) as panel:
        assert refused()  # before it began
        panel.follow(PairsMade(4, 12, "teacher pairs", NEWEST))
        assert refused()
        panel.follow(step(1))
        assert not refused()
        monitor.control.stop = monitor.control.preview = False
        monitor.end("done")
    assert refused() and not monitor.control.stop and not monitor.control.preview


# --- messages ---


NEWEST = torch.zeros(3, 4, 2, 2)


def test_messages_come_at_the_beginning_now_and_then_and_at_the_end(nodes, server, monitor, clock):
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        assert len(server.sent) == 1
        for update in range(1, 101):
            clock.now += 0.06
            panel.follow(step(update))
        between = len(server.sent) - 1
        assert between == pytest.approx(6 / nodes.panel.EVERY, abs=2)
    assert len(server.sent) == 1 + between + 1
    assert {event for event, _ in server.sent} == {"turbodistill.run"}
    assert all(told["node"] == NODE for _, told in server.sent)
    assert server.sent[-1][1] == server.routes.ask("GET", RUN)[1]  # each message is the whole
    assert server.sent[-1][1]["history"]["update"] == list(range(1, 101))


def test_comfyui_s_own_bar_goes_along_in_every_phase(nodes, server, comfyui, monitor, clock):
    """One bar for all would stay where the pairs ended: a newer core shows no step back."""
    comfyui.server.ProgressBar.sent.clear()
    pairs, pictures = ("teacher pairs", (4, 8, 12)), ("pictures", (2, 4))
    updates = (1, 300, 5000, 10_000)
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        events = [PairsMade(done, dones[-1], what, NEWEST) for what, dones in (pairs, pictures) for done in dones]
        for event in events + [step(update) for update in updates]:
            clock.now += 1
            panel.follow(event)
    expected = [(4, 12), (8, 12), (12, 12), (2, 4), (4, 4), *((update, 10_000) for update in updates)]
    assert list(dict.fromkeys(comfyui.server.ProgressBar.sent)) == expected


def test_a_history_of_before_is_told_with_the_first_message(nodes, server, monitor, tmp_path):
    columns = ["update", "seconds", "accuracy", "logit_gap", "saturation", "sharpness", "diversity", "regression"]
    rows = [",".join([*columns, "adversarial"]), "1,0.1,0.5,1,1,1,1,0.5,", "2,0.1,0.5,1,1,1,1,0.5,0.25"]
    (tmp_path / "history.csv").write_text("\n".join(rows))
    with nodes.panel.watched(HIDDEN, monitor, tmp_path) as panel:
        panel.follow(Begun(2, Memory(1, 1, 1)))
        panel.follow(step(3))
    history = server.sent[-1][1]["history"]
    assert history["update"] == [1, 2, 3] and history["losses"]["adversarial"] == [None, 0.25, None]
    assert "seconds" not in history["losses"]


def test_what_is_no_number_reaches_the_page_as_nothing(nodes, server, monitor, clock):
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        panel.follow(step(1, adversarial=math.nan, r1=math.inf))
    losses = server.sent[-1][1]["history"]["losses"]
    assert losses["regression"] == [1.0] and losses["adversarial"] == losses["r1"] == [None]


def test_newest_pairs_are_shown_now_and_then(nodes, server, monitor, clock):
    shown = []
    monitor.show = lambda latents: shown.append(len(latents)) or ["picture"] * len(latents)
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        for done in range(3, 61, 3):
            clock.now += 1
            panel.follow(PairsMade(done, 60, "teacher pairs", NEWEST))
    assert shown == [3] * 5  # of twenty seconds every fifth, and the last
    assert len(server.sent[-1][1]["pictures"]) == 8


# --- ends ---


def test_cancel_is_looked_for_after_every_event(nodes, server, comfyui, monitor):
    cancelled = comfyui.server.InterruptProcessingException
    with pytest.raises(cancelled), nodes.panel.watched(HIDDEN, monitor) as panel:
        panel.follow(step(1))
        comfyui.server.interrupt_current_processing()
        panel.follow(step(2))
    told = server.sent[-1][1]
    assert (told["state"], told["error"], told["done"]) == ("cancelled", "", 2)


def test_an_error_is_told_in_its_words(nodes, server, monitor):
    with pytest.raises(ValueError, match="too small"), nodes.panel.watched(HIDDEN, monitor):
        raise ValueError("the pictures are too small")
    told = server.sent[-1][1]
    assert (told["state"], told["error"]) == ("failed", "the pictures are too small")
    assert server.routes.ask("GET", RUN)[1]["state"] == "failed"  # also for a page that comes later


def test_the_next_run_of_a_node_takes_the_place_of_the_last(nodes, server, monitor):
    with nodes.panel.watched(HIDDEN, monitor) as panel:
        panel.follow(step(1))
    after = Monitor("distill", "other", Config(), lambda latents: [])
    with nodes.panel.watched(HIDDEN, after):
        told = server.routes.ask("GET", RUN)[1]
        assert told["name"] == "other" and told["history"]["update"] == []
        assert server.sent[-1][1] == told


# --- pictures on the page ---


@pytest.mark.parametrize(("size", "kind"), [((128, 64), "PNG"), ((136, 64), "WEBP")])
def test_pictures_are_files_that_the_page_can_ask_for(nodes, places, size, kind):
    width, height = size
    pictures = torch.linspace(-0.5, 1.5, 3 * width).view(1, 3, 1, width).expand(2, 3, height, width)
    found = nodes.page.show(pictures)
    assert len({place["filename"] for place in found}) == 2
    for place in found:
        assert (place["subfolder"], place["type"]) == ("turbodistill", "temp")
        with Image.open(places.temp / place["subfolder"] / place["filename"]) as shown:
            assert shown.size == size and shown.format == kind
            if kind == "PNG":  # without loss, and what is out of range is cut off
                assert shown.getpixel((0, 0))[0] == 0 and shown.getpixel((width - 1, 0))[2] == 255


def test_free_memory_is_the_device_s_where_there_is_one(nodes, graph):
    assert nodes.page.free_memory(graph.model) is None
    graph.model.load_device = torch.device("cuda")
    assert nodes.page.free_memory(graph.model) == 8 * 1024**3
