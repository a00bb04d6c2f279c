"""The tables of docs/comfyui.md on other nodes and quantised weights, made of what happens in the real ComfyUI.

`WRITE_DOCS=1 pytest tests/hosts/comfyui/test_plugins.py` writes them anew, in the newest ComfyUI.
"""

import os
import re
from pathlib import Path

import pytest

# All rows are seen in one go, in one to two minutes of a core's time.
pytestmark = [pytest.mark.host, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[3] / "docs/comfyui.md"
SEEN = 1e-3  # standard deviations by which a picture differs
# What ComfyUI 0.3.64 does not have; and what needs a node pack.
NEWER = {"LoraLoaderBypass", "NAGuidance", "TemporalScoreRescaling"}
NEWER_KINDS = {"float8_e4m3fn", "mxfp8", "nvfp4", "int8_tensorwise"}
PACK = {"GGUF Q8_0", "GGUF Q4_0"}
# Issue 26 asks for these.
ACT = {
    **dict.fromkeys(("LoRA", "DoRA", "LyCORIS: LoHa", "LyCORIS: LoKr", "ModelMergeSimple"), ("acts", "acts")),
    **dict.fromkeys(("IPAdapter-kind: attn2_replace", "IPAdapter-kind: attn2_patch"), ("acts", "acts")),
    **dict.fromkeys(("FreeU", "FreeU_V2"), ("acts", "acts")),
    "NAGuidance": ("acts", "acts on the teacher only"),
    "torch.compile (TorchCompileModel)": ("acts", "no effect"),
}


@pytest.fixture(scope="module")
def told(script):
    """What plugins.py found."""
    return script("plugins", "sd15", "controlnet", "flux")


@pytest.fixture(scope="module")
def newest(installation):
    """Whether this ComfyUI is the newer one, of which the page tells."""
    return (installation[0] / "comfy_extras" / "nodes_nag.py").exists()


def sentence(words):
    """A refusal's words, without the names that differ from row to row."""
    return re.sub(r"comes through .+?, which", "comes through ..., which", words)


def of_sampling(row):
    """A row's word on One-Step Sample."""
    found = row["sample"]
    if "refused" in found:
        return sentence(found["refused"])
    one, four = found
    return "acts" if one > SEEN or row["calls"] else "acts from 2 steps on" if four > SEEN else "no effect"


def of_distilling(row):
    """A row's word on Distill: in pairs and training, or where the teacher is guided alone."""
    found = row["distil"]
    if "refused" in found:
        return sentence(found["refused"])
    if found["pairs"] <= SEEN:
        return "no effect"
    return "acts" if found["one"] > SEEN else "acts on the teacher only"


def of_a_student(row):
    """A row's word on Load Student over quantised weights."""
    found = row["sample"]
    return sentence(found["refused"]) if "refused" in found else "acts" if found[0] > SEEN else "no effect"


def of_training(row):
    """A row's word on Distill over quantised weights."""
    found = row["distil"]
    if "refused" in found:
        return sentence(found["refused"])
    return "acts" if found["learnt"] == 1 and found["same"] else "no effect"


# --- The page ---


def numbered(rows):
    """The rows with a number in place of each sentence, and the sentences as a list."""
    notes = []

    def short(value):
        if len(value) < 40:
            return value
        if value not in notes:
            notes.append(value)
        return f"refused [{notes.index(value) + 1}](#refusals)"

    made = [[short(value) for value in row] for row in rows]
    return made, "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))


def table(heads, rows):
    """Rows of words as a table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def compare(part, made):
    """A part of the page, between its marks, is what was made; with WRITE_DOCS it is written."""
    text = PAGE.read_text(encoding="utf-8")
    before, there, rest = text.partition(f"<!-- {part} -->\n")
    found, closed, after = rest.partition(f"\n<!-- end of {part} -->")
    assert there and closed, f"docs/comfyui.md lacks the marks of {part}"
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(before + there + made + closed + after, encoding="utf-8")
    else:
        assert found.splitlines() == made.splitlines(), "run WRITE_DOCS=1 pytest tests/hosts/comfyui/test_plugins.py"


def mark(label, newer):
    return f"{label} (newer)" if label in newer else label


def plug_rows(told):
    found = told["plugs"].items()
    return [[mark(label, NEWER), of_sampling(row), of_distilling(row)] for label, row in found]


def kind_rows(told):
    found = told["quantised"].items()
    return [[mark(label, NEWER_KINDS), of_a_student(row), of_training(row)] for label, row in found]


def test_the_page_s_tables_are_what_happens(told, newest):
    if PACK - told["quantised"].keys():
        pytest.skip("needs ComfyUI-GGUF in GGUF_PATH or custom_nodes, and the package gguf, for the rows of GGUF")
    rows, notes = numbered(plug_rows(told) + kind_rows(told))
    split = len(told["plugs"])
    if newest:
        compare("plugs", table(("between loader and ours", "One-Step Sample", "Distill"), rows[:split]))
        compare("quantised", table(("weights", "Load Student", "Distill"), rows[split:]))
        compare("refusals", notes)


def test_an_older_comfyui_does_the_same(told, newest):
    """Its rows are the page's, but for nodes that it lacks."""
    if newest:
        pytest.skip("is the newest")
    page = PAGE.read_text(encoding="utf-8")
    notes = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))

    def spelled(cell):
        number = re.fullmatch(r"refused \[(\d+)\]\(#refusals\)", cell)
        return notes[number[1]] if number else cell

    lines = [[spelled(cell) for cell in line[2:-2].split(" | ")] for line in page.splitlines() if line[:2] == "| "]
    expected = {line[0]: line[1:] for line in lines if not line[0].endswith("(newer)")}
    rows = plug_rows(told) + kind_rows(told)
    for label, *found in rows:
        assert found == expected[label], label


# --- What they are made of ---


def test_rows_are_those_that_are_known(told, newest):
    missing = set() if newest else NEWER
    assert not told["plugs"].keys() & missing
    assert told["plugs"].keys() >= (ACT.keys() - missing) | {"ControlNet"}


def test_what_users_need_acts(told):
    for label, (sampling, distilling) in ACT.items():
        if label in told["plugs"]:
            row = told["plugs"][label]
            assert (of_sampling(row), of_distilling(row)) == (sampling, distilling), label
    assert of_sampling(told["plugs"]["ControlNet"]) == "acts"


def test_what_changes_a_teacher_s_pictures_has_pairs_of_its_own(told):
    """The hash tells it from the model alone if, and only if, the pairs differ; and a student learns of it."""
    for label, row in told["plugs"].items():
        if "pairs" in row["distil"]:
            assert row["distil"]["hash"] == (row["distil"]["pairs"] > SEEN), label
            assert row["distil"]["learnt"] == 1, label


def test_a_teacher_is_guided_as_comfyui_guides(told):
    """Attention patches are told which rows are the negative's, as ComfyUI's own sampling at cfg 3 tells them."""
    assert {
        label: row["distil"]["own"] for label, row in told["plugs"].items() if row["distil"].get("own", 0) > SEEN
    } == {}


def test_a_compiled_model_makes_the_same_picture(told):
    row = told["plugs"]["torch.compile (TorchCompileModel)"]
    assert row["calls"] and max(row["sample"]) < SEEN


def test_a_negative_acts_or_names_the_version(told, newest):
    """One-Step Sample's own, on a MODEL without a NAG node: as that node with its defaults."""
    if newest:
        assert told["negative"] == told["plugs"]["NAGuidance"]["sample"] and min(told["negative"]) > SEEN
    else:
        assert "update ComfyUI to 0.15 or later" in told["negative"]["refused"]


def test_quantised_weights_stay_what_they_are(told, newest):
    """Nothing assigns to them: their packed numbers are the same after a training over them."""
    expected = {"float8 (weight_dtype)", "float8, scaled"} | ({"nvfp4", "int8_tensorwise"} if newest else set())
    assert told["quantised"].keys() >= expected
    for label, row in told["quantised"].items():
        if "refused" not in row["distil"]:
            assert row["distil"] == {"learnt": 1, "same": True}, label
            moved, apart = row["sample"]
            assert moved > 0.05 and apart < 1.5, (label, row["sample"])


def test_gguf_acts(told):
    if PACK - told["quantised"].keys():
        pytest.skip("needs ComfyUI-GGUF in GGUF_PATH or custom_nodes, and the package gguf")
    for row in (told["quantised"][kind] for kind in PACK):
        assert (of_a_student(row), of_training(row)) == ("acts", "acts")
        assert "save the student as a LoRA" in row["whole"]["refused"]
