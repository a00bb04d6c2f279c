"""Compiled blocks make the same numbers, in one graph each, and leave nothing behind."""

import pytest
import torch
from torch._dynamo.utils import counters
from turbodistill.core.compiled import compiled
from turbodistill.core.features import TeacherFeatures
from turbodistill.core.gradient_checkpointing import blocks, checkpointed
from turbodistill.core.schedule import DiscreteSchedule
from turbodistill.core.student import Student


@pytest.fixture
def student(toys):
    torch._dynamo.reset()
    counters.clear()
    made = Student(toys.UNetDenoiser(toys.small_unet(toys.TEXT), DiscreteSchedule(), "eps"), 4)
    toys.nudge(made.lora)
    yield made
    made.release()


def gradients(student, toys, again=False):
    """x0 of teacher and student, features, and the gradients of a loss of them."""
    x, cond = toys.picture(), toys.cond()
    sigma = student.schedule.sigma(torch.tensor([999.0, 300.0]))
    student.lora.zero_grad()
    loras = [student.lora] if again else None
    with student.training():
        with torch.no_grad():
            teacher = student.teacher(x, sigma, cond)
        features = TeacherFeatures(student.teacher, ["down_blocks.0", "mid_block"])
        if again:
            with checkpointed(student.backbone, loras):
                made = student(x, sigma, cond)
                seen = features(made, sigma, cond)
                (made.sub(teacher).square().mean() + sum(m.square().mean() for m in seen)).backward()
        else:
            made = student(x, sigma, cond)
            seen = features(made, sigma, cond)
            (made.sub(teacher).square().mean() + sum(m.square().mean() for m in seen)).backward()
    return [teacher, made.detach(), *(m.detach() for m in seen), *(p.grad.clone() for p in student.lora.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_numbers_are_the_same_and_no_graph_is_broken(toys, student, again):
    torch.manual_seed(0)
    alone = gradients(student, toys, again)
    forwards = {name: module.__dict__.get("forward") for name, module in blocks(student.backbone).items()}
    with compiled(student.backbone, "aot_eager" if again else "eager"):
        torch.manual_seed(0)
        found = gradients(student, toys, again)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(alone, found, strict=True))
    assert counters["stats"]["unique_graphs"] > len(forwards)  # blocks alike share those of the teacher
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert {name: m.__dict__.get("forward") for name, m in blocks(student.backbone).items()} == forwards


def test_an_error_within_puts_everything_back(student):
    with pytest.raises(KeyError), compiled(student.backbone, "eager"):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in blocks(student.backbone).values())


def test_where_it_cannot_be_compiled_that_is_told(toys, student):
    def failing(*_):
        raise OSError("no compiler was found")

    x, cond, sigma = toys.picture(), toys.cond(), student.schedule.sigma(torch.tensor([999.0, 300.0]))
    told = r"cannot compile the model here \(.*no compiler .*set compile to false"
    with pytest.raises(RuntimeError, match=told), compiled(student.backbone, failing):
        student(x, sigma, cond)
    assert all("forward" not in module.__dict__ for module in blocks(student.backbone).values())
    assert student(x, sigma, cond).isfinite().all()
