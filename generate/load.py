"""A student's file on a loaded model."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..core import student
from ..core.card import StudentCard
from ..core.student import Student
from ..trainer.host import Host


def load_student(path: str | Path, model: Host) -> tuple[Student, StudentCard]:
    """A student's file on its base model, and its card, which says how it is sampled.

    Warns if it was made for another model of this kind. Raises CardError for a file that cannot be read or does not
    fit. The student shares the model's weights; `student.release()` takes it off again.
    """
    loaded, card, warning = student.load_student(path, model.denoiser)
    if warning:
        warnings.warn(warning, stacklevel=2)
    return loaded, card
