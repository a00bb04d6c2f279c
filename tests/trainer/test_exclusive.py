"""Threads that use one loaded model: one after the other, to the bit as if they were called so."""

import threading
from contextlib import suppress

import pytest
import torch
from turbodistill.core.exclusive import exclusive
from turbodistill.core.student import Student
from turbodistill.generate.sample import sample
from turbodistill.trainer.run import run

PROMPTS = ["a fox", "an owl"]


def student_of(host, kit, seed, rank=2):
    torch.manual_seed(seed)
    student = Student(host.denoiser, rank)
    kit.toys.nudge(student.trained)
    return student


def together(host, *calls):
    """What calls give in threads of their own, each of which is in the model's text encoder before one goes on.

    Where only one gets there, it waits a little and goes on alone.
    """
    inside, encode, found = threading.Barrier(len(calls)), host.encode_text, {}

    def meet(prompts):
        with suppress(threading.BrokenBarrierError):
            inside.wait(0.3)
        return encode(prompts)

    def work(number, call):
        found[number] = call()

    threads = [threading.Thread(target=work, args=each) for each in enumerate(calls)]
    host.encode_text = meet
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    host.encode_text = encode
    return [found[number] for number in range(len(calls))]


def pictures(host, student):
    return lambda: list(sample(host, student, PROMPTS, seed=3))


@pytest.mark.parametrize("count", [1, 2])
def test_students_are_sampled_one_after_the_other(kit, host, count):
    students = [student_of(host, kit, seed) for seed in range(count)] * (3 - count)
    before = kit.weights(host.denoiser.backbone)
    wanted = [pictures(host, student)() for student in students]
    found = together(host, *(pictures(host, student) for student in students))
    assert kit.same(kit.weights(host.denoiser.backbone), before)
    for made, alone in zip(found, wanted, strict=True):
        assert torch.equal(torch.stack(made), torch.stack(alone))


def test_sampling_while_it_is_distilled_changes_nothing_of_either(kit, host, tmp_path):
    student, settings = student_of(host, kit, 1), kit.config(updates=6, evaluate_every=1)
    wanted, alone = pictures(host, student)(), kit.go(host, settings, tmp_path / "alone")[-1]
    ended, found = threading.Event(), []

    def work():
        while not ended.is_set() or not found:
            found.append(torch.stack(pictures(host, student)()))

    thread = threading.Thread(target=work)
    thread.start()
    beside = list(run.run(host, settings, tmp_path / "beside", kit.WORDS))[-1]
    ended.set()
    thread.join()
    assert all(torch.equal(made, torch.stack(wanted)) for made in found)
    assert kit.same(kit.tensors(beside.path), kit.tensors(alone.path)) and beside.score == alone.score


def test_a_student_loaded_meanwhile_is_of_the_model_itself(kit, host):
    """A full copy holds the model's own weights, not those with another student merged in."""
    student, before = student_of(host, kit, 1), kit.weights(host.denoiser.backbone)
    merged, loaded = threading.Event(), []

    def copy():
        merged.wait()
        loaded.append(Student(host.denoiser, 0))

    thread = threading.Thread(target=copy)
    thread.start()
    with exclusive(host.denoiser.backbone), student.merged():
        merged.set()
        thread.join(0.3)
    thread.join()
    assert kit.same(kit.weights(loaded[0].backbone), before)
