"""Where the files of the embedded model lie."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model.safetensors"
STUDENT = FOLDER / "student.safetensors"
PROMPTS = FOLDER / "prompts.txt"
REFERENCE = FOLDER / "reference.zip"  # real pictures to measure against
SETTINGS = FOLDER / "demo.toml"  # of the demonstration's student
VISION = FOLDER / "vision"  # a vision transformer: its settings as transformers has them, and packed weights
PACKED = "packed.safetensors"  # these, see core/eight_bits.py
HEADER = "turbodistill.model"  # key in a checkpoint's header: its architecture, as JSON
