"""A training by the node that is cancelled, stopped, out of memory or out of disk: nothing is lost, all is free."""

import gc
import json
import random
import weakref

import pytest
import torch
from turbodistill.trainer.loop import start
from turbodistill.trainer.run import state_file, student_file, training
from turbodistill.trainer.run.memory import OutOfMemory

RUN = "/turbodistill/runs/3"


@pytest.mark.parametrize("seed", range(3))
def test_a_cancelled_run_goes_on_to_the_same_student(graph, comfyui, server, places, kit, seed):
    pairs = graph.pairs()
    settings = {"updates": 5, "advanced": {"preview_every": 2, "evaluate_every": 2}}
    graph.distill(pairs, "whole", **settings)
    before, made = kit.bits(graph.model), kit.x0(graph.model, comfyui)
    draws = random.Random(seed)
    cancels = 0
    for _ in range(20):
        handle = graph.at_pass(draws.randint(1, 25), comfyui.server.interrupt_current_processing)
        try:
            graph.distill(pairs, "cut", **settings)
            break
        except comfyui.server.InterruptProcessingException:
            cancels += 1
            told = server.sent[-1][1]
            assert told["state"] == "cancelled" and told["error"] == ""
        finally:
            handle.remove()
            comfyui.server.interrupt_current_processing(False)
        assert kit.same(kit.bits(graph.model), before) and kit.hooks(graph.model) == 0
        assert all(p.requires_grad and p.grad is None for p in graph.model.model.parameters())
        assert torch.equal(kit.x0(graph.model, comfyui), made)
        if told["what"] == "training" and told["done"]:
            assert kit.state(places, "cut")["update"] == told["done"]
    assert cancels
    assert kit.same(kit.tensors(places, "cut"), kit.tensors(places, "whole"))


def test_a_run_that_goes_on_shows_what_was_before(graph, server):
    pairs = graph.pairs()
    graph.distill(pairs)
    first = server.routes.ask("GET", RUN)[1]["history"]
    graph.distill(pairs, updates=5)
    history = server.routes.ask("GET", RUN)[1]["history"]
    assert history["update"] == [1, 2, 3, 4, 5]
    assert history["losses"]["regression"][:3] == pytest.approx(first["losses"]["regression"])
    assert history["health"]["accuracy"][:3] == pytest.approx(first["health"]["accuracy"])


def test_a_run_that_is_complete_gives_its_student_again(graph, places, kit):
    pairs = graph.pairs()
    first = graph.distill(pairs)
    again = graph.distill(pairs)
    assert again[1].path == first[1].path and again[1].card == first[1].card and torch.equal(again[3], first[3])


def test_a_run_that_is_stopped_keeps_the_best_and_goes_on_when_asked_again(nodes, graph, server, places, kit):
    pairs, stamp = graph.pairs(), nodes.distill.Distill.fingerprint_inputs
    before = stamp(name="my-turbo")
    answers = []
    handle = graph.at_pass(20, lambda: answers.append(server.routes.ask("POST", f"{RUN}/stop")))
    model, student, *_ = graph.distill(pairs, updates=50).args
    handle.remove()
    told = server.sent[-1][1]
    assert answers == [(204, None)] and told["state"] == "stopped" and 0 < told["done"] < 50
    assert model.patches and student.card.training["updates"] <= told["done"]
    assert stamp(name="my-turbo") != before and stamp(name="other") == before  # so that Run goes on
    graph.distill(pairs, updates=told["done"] + 2)
    assert server.sent[-1][1]["state"] == "done" and kit.state(places)["update"] == told["done"] + 2


def test_a_preview_comes_when_it_is_asked_for(graph, server):
    pairs, answers = graph.pairs(), []
    handle = graph.at_pass(20, lambda: answers.append(server.routes.ask("POST", f"{RUN}/preview")))
    graph.distill(pairs, updates=9)
    handle.remove()
    assert answers == [(204, None)]
    updates = [p["update"] for p in server.sent[-1][1]["previews"]]
    assert len(updates) == 3 and 0 == updates[0] < updates[1] < updates[2] == 9


@pytest.fixture
def students(monkeypatch):
    """Weak references to every student that a run makes, and to its LoRA."""
    made, create = [], start.create

    def noted(*args):
        student = create(*args)
        made.extend((weakref.ref(student), weakref.ref(student.lora)))
        return student

    monkeypatch.setattr(start, "create", noted)
    return made


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"gradient_checkpointing": False},
            "set gradient_checkpointing to true, or lower batch_size and raise gradient_accumulation by as much, or",
        ),
        ({}, "): lower batch_size and raise gradient_accumulation by as much, or make smaller pictures, or lower rank"),
        ({"batch_size": 1}, "): make smaller pictures, or lower rank"),
    ],
)
def test_out_of_memory_says_what_to_change_and_frees(
    graph, comfyui, server, places, kit, students, monkeypatch, changes, remedy
):
    pairs = graph.pairs()
    before, emptied = kit.bits(graph.model), []
    monkeypatch.setattr(graph.nodes.page, "empty_cache", lambda: emptied.append([s() for s in students]))
    handle = graph.at_pass(10, out_of_memory)
    words = ""
    try:
        graph.distill(pairs, "cut", **changes)
    except OutOfMemory as error:
        words = str(error)
    handle.remove()
    batch = changes.get("batch_size", 4)
    assert words.startswith(f"out of memory while training (batch_size {batch}, latents of 8 x 8, rank 2): ")
    assert remedy in words
    assert server.sent[-1][1]["state"] == "failed" and server.sent[-1][1]["error"] == words
    gc.collect()
    assert len(students) == 2 and [s() for s in students] == [None] * 2
    assert len(emptied) == 1
    assert kit.same(kit.bits(graph.model), before) and kit.hooks(graph.model) == 0
    if not changes:  # the next run goes on, and loses nothing
        graph.distill(pairs, "whole")
        graph.distill(pairs, "cut")
        assert kit.same(kit.tensors(places, "cut"), kit.tensors(places, "whole"))


def test_memory_is_free_when_the_cache_is_emptied(graph, students, monkeypatch):
    """Else it would be emptied of nothing: what an error's traceback holds is not free yet."""
    pairs, left = graph.pairs(), []
    monkeypatch.setattr(graph.nodes.page, "empty_cache", lambda: left.append([s() for s in students]))
    handle = graph.at_pass(10, out_of_memory)
    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            graph.distill(pairs)
    finally:
        gc.enable()
        handle.remove()
    assert left == [[None] * 2]


def test_out_of_memory_while_pairs_are_made_says_what_to_change(graph):
    handle = graph.at_pass(2, out_of_memory)
    with pytest.raises(OutOfMemory, match="out of memory while making teacher pairs: make fewer at once"):
        graph.pairs()
    handle.remove()
    assert graph.pairs().folder.is_dir()


def test_a_run_that_has_ended_holds_no_model(graph, loaded, toys, server):
    """The page may ask for it as long as the server runs."""
    pairs = graph.pairs()
    graph.distill(pairs)
    gone = weakref.ref(graph.model.model), weakref.ref(graph.clip)
    graph.model = graph.clip = None
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert server.routes.ask("GET", RUN)[1]["state"] == "done"


@pytest.mark.parametrize("part", [training.STATE, training.BEST])
def test_a_full_disk_is_told_and_the_next_run_goes_on(graph, server, places, kit, monkeypatch, part):
    pairs = graph.pairs()

    def full(*_):
        raise OSError(28, "No space left on device")

    before = kit.bits(graph.model)
    with monkeypatch.context() as patch:
        patch.setattr(
            *(state_file, "write_safetensors") if part == training.STATE else (student_file, "write_whole"), full
        )
        with pytest.raises(OSError, match="No space left on device"):
            graph.distill(pairs, "cut")
    told = server.sent[-1][1]
    assert told["state"] == "failed" and "No space left on device" in told["error"]
    assert kit.same(kit.bits(graph.model), before) and kit.hooks(graph.model) == 0
    graph.distill(pairs, "cut")
    assert server.sent[-1][1]["state"] == "done" and kit.state(places, "cut")["update"] == 3


def test_everything_the_page_is_told_is_json(graph, server):
    graph.distill(graph.pairs())
    assert json.loads(json.dumps([told for _, told in server.sent])) == [told for _, told in server.sent]
    assert {event for event, _ in server.sent} == {"turbodistill.run"}
