"""The help page of Advanced Settings lists what the trainer's Config has; the others are checked in test_schemas."""

import dataclasses
import re
from pathlib import Path

import pytest
import turbodistill
from turbodistill.trainer.config import RESUMABLE, Config
from turbodistill.trainer.groups import (
    OF_DISTILL,
    OF_GUIDANCE,
    OF_IMAGES,
    OF_PAIRS,
    OF_PROMPTS,
    OF_SIZES,
    OF_VRAM,
    PLAIN_ONLY,
)

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
PAGES = Path(turbodistill.__file__).parent / "web" / "docs"


@pytest.fixture(scope="module")
def listed():
    """Setting -> (group, what the page says of it), in the page's order."""
    text = (PAGES / "TurboDistillAdvancedSettings.md").read_text(encoding="utf-8")
    told = {}
    for section in text.split("\n## "):
        title, _, body = section.partition("\n")
        for item in re.split(r"^- ", body, flags=re.MULTILINE)[1:]:
            if named := re.match(r"\*+([a-z_0-9]+)\*+ (?:\(|is in )", item):
                told[named[1]] = (title.lower(), " ".join(item.split()))
    return told


def shown(default):
    """A default as a person reads it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return (default or "empty") if isinstance(default, str) else f"{default:g}"


def test_the_page_lists_every_setting_in_its_group(listed):
    groups = dict.fromkeys(f.metadata["group"] for f in FIELDS.values())
    expected = [(f.name, group) for group in groups for f in FIELDS.values() if f.metadata["group"] == group]
    assert [(name, group) for name, (group, _) in listed.items()] == expected


def test_it_says_defaults_help_and_choices_as_the_trainer_does(listed):
    of_others = {
        "Image Folder": OF_IMAGES,
        "Teacher Pairs": OF_PAIRS + OF_PROMPTS + OF_GUIDANCE + OF_SIZES,
        "Distill": OF_DISTILL + OF_VRAM,
    }
    asked = {name: node for node, names in of_others.items() for name in names}
    for name, field in FIELDS.items():
        if name in asked:
            expected = f"*{name}* is in *{asked[name]}*."
        elif name in PLAIN_ONLY:
            expected = f"*{name}* is in the command line alone."
        else:
            choices = field.metadata["choices"]
            one_of = f" One of {', '.join(choices)}." if choices else ""
            expected = f"**{name}** ({shown(field.default)}): {field.metadata['help']}{one_of}"
        assert listed[name][1] == expected


def test_what_may_change_in_a_run_is_told():
    text = (PAGES / "TurboDistillAdvancedSettings.md").read_text(encoding="utf-8")
    (paragraph,) = [p for p in text.split("\n\n") if p.startswith("A run resumes only")]
    assert set(re.findall(r"\*+([a-z_]+)\*+", paragraph)) == RESUMABLE
