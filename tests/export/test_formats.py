"""The tables of docs/formats.md, made of what the code does: WRITE_DOCS=1 pytest tests/export/test_formats.py"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from turbodistill.core.architecture import WHOLE
from turbodistill.core.card import CardError
from turbodistill.core.lora import LoRA
from turbodistill.core.student import load_student
from turbodistill.generate.export.export import LORAS, Export
from turbodistill.generate.export.tensors import ExportError
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.load import load_pipeline

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/formats.md"
EXPORTS = (*LORAS, "merged", "diffusers", "lora")
HEADS = ("base", "given as", "read", *(f"`{to}`" for to in EXPORTS))
REFUSALS = (ExportError, ModelError, CardError)
ROWS = {}  # of each base, for the page


def module_at(path: Path):
    """A module by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location(f"turbodistill_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bases = module_at(HERE / "bases.py")


# --- What is tried ---


def check_lora(path, host, network):
    """Every name of a LoRA file is one of its base's, and none is missing; it changes something."""
    tensors = load_file(path)
    ours = any(n.split(".")[0] in ("transformer", "unet") for n in tensors)  # peft's: diffusers' own names
    if network is None or ours:
        student, card, warning = load_student(path, host.denoiser)
        student.release()
        lora = student.lora
        assert card.kind == "lora" and not warning
    else:
        lora = LoRA(network, 2)
        lora.load(network, tensors)
        lora.remove()
    assert all(b.delta().abs().sum() > 0 for b in lora.each())


def check_changed(found, before):
    """The same weights, some of them changed."""
    assert found.keys() == before.keys() and all(found[k].shape == v.shape for k, v in before.items())
    changed = [k for k, v in before.items() if v.ndim > 1 and (found[k].float() - v.float()).abs().max() > 1e-3]
    assert changed and all(v.isfinite().all() for v in found.values())


def check_merged(path, host, source, place):
    """diffusers' own loader reads the whole denoiser of it, and nothing else of the base's file is lost."""
    network = host.denoiser.backbone
    network.save_config(place / "config")
    given = {n.removeprefix(WHOLE): v for n, v in load_file(path).items()}
    if host.denoiser.prediction != "flow":
        given = str(path)  # some conversions of transformers know no prefix, that of UNets needs it
    read = type(network).from_single_file(given, config=str(place / "config"), local_files_only=True)
    check_changed(read.state_dict(), network.state_dict())
    if source.is_file():
        with safe_open(path, "pt") as found, safe_open(source, "pt") as base:
            assert set(found.keys()) == set(base.keys())


def check_folder(path, host):
    """Every weight of it is read, and the student's card."""
    found = bases.load_model(path, "cpu", with_student=True)
    assert found.student.timesteps == (999,)
    check_changed(found.denoiser.backbone.state_dict(), host.denoiser.backbone.state_dict())


def cell(to, students, host, network, source, options, place):
    """One export: "yes", or the sentence that refuses it."""
    lora, full = students
    out = place / ("out" if to == "diffusers" else "out.safetensors")
    more = {"rank": 2} if to == "lora" else {}
    if to == "diffusers" and "tokenizer" in options:
        more["tokenizer"] = options["tokenizer"]
    try:
        for _ in Export(full if to == "lora" else lora, to, out, source, force=True, **more).run():
            pass
    except REFUSALS as error:
        return sentence(error, place)
    if to == "merged":
        check_merged(out, host, source, place)
    elif to == "diffusers":
        check_folder(out, host)
    else:
        check_lora(out, host, network)
    return "yes"


def sentence(error, place):
    """A refusal's words, without this machine's folders."""
    return str(error).replace(f"{place}{os.sep}", "")


def rows_of(kit, name, place):
    """A base's rows: its single file and its folder, and the single file of a transformer in ComfyUI."""
    made = bases.BASES[name]
    file, folder, options = made.write(kit, place)
    ways = [(file, "file", False), (folder, "folder", False)]
    if isinstance(made, bases.Transformer):
        ways.insert(1, (file, "file, in ComfyUI", True))
    for source, words, comfyui in ways:
        try:
            host = bases.load(source, options)
        except ModelError as error:
            yield [name, words, sentence(error, place), *["-"] * len(EXPORTS)]
            continue
        network = bases.stand_in(source) if comfyui else None
        given = (network, host) if comfyui else (host,)
        students = (bases.students_in_comfyui if comfyui else bases.students_in_python)(*given, source, place)
        found = (cell(to, students, host, network, source, options, place) for to in EXPORTS)
        yield [name, words, "yes", *found]


# --- The page ---


def table(heads, rows):
    """Rows of words as a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def numbered(rows):
    """The rows with a number in place of each sentence, and the sentences as a list."""
    notes = []

    def short(value):
        if len(value) < 50:
            return value
        if value not in notes:
            notes.append(value)
        return f"[{notes.index(value) + 1}](#refused-exports)"

    made = [[short(value) for value in row] for row in rows]
    return made, "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))


def compare(part, made):
    """A part of the page, between its marks, is what was made; with WRITE_DOCS it is written."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
    before, there, rest = text.partition(begin)
    found, closed, after = rest.partition(end)
    assert there and closed, f"docs/formats.md lacks the marks of {part}"
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(before + begin + made + end + after, encoding="utf-8")
    else:
        assert found.splitlines() == made.splitlines(), "run WRITE_DOCS=1 pytest tests/export/test_formats.py"


@pytest.mark.parametrize("name", bases.BASES)
def test_a_base_is_read_and_its_students_exported(name, kit, monkeypatch, tmp_path):
    with bases.narrowed(monkeypatch):
        ROWS[name] = list(rows_of(kit, name, tmp_path))
    assert all("yes" in row for row in ROWS[name])


def test_bases_and_exports_are_those_of_the_page():
    if ROWS.keys() != bases.BASES.keys():
        pytest.skip("needs the tests of all bases to have passed before it")
    made, notes = numbered([row for name in bases.BASES for row in ROWS[name]])
    compare("bases", table(HEADS, made))
    compare("refused exports", notes)


# --- Files that are refused ---


def refusal(path):
    """The words that a file or folder is refused with, without its name: what it is, and what to do."""
    try:
        load_pipeline(path)
    except ModelError as error:
        words = str(error).replace(str(path), "").lstrip(": ")
        words = re.sub(r"(safetensors file) \(.*\)\. If", r"\1: if", words)  # the library's reason, in its own words
        what, todo = words.split(": ", 1)
        return what, todo
    raise AssertionError(f"{path} is loaded")


def written(place):
    """Every file and folder that is refused, one after the other."""
    refused = module_at(HERE.parent / "trainer/checkpoint/refused.py")
    path = place / "mine.safetensors"
    for shapes, _ in refused.FILES:
        yield bases.layouts.sparse(path, shapes)
    yield bases.layouts.sparse(path, refused.channels(4), "U8")
    for content, _ in refused.BROKEN:
        path.write_bytes(content)
        yield path
    yield place / "mine.ckpt"
    made = bases.files.sd1()
    for prefix, change in (
        ("model.diffusion_model.out.2.bias", None),
        ("model.diffusion_model.out.2.bias", torch.zeros(9)),
        ("model.diffusion_model.more.weight", torch.zeros(9)),
        ("model.diffusion_model.out.2.bias", torch.full((4,), torch.nan)),
    ):
        kept = bases.files.Made({n: v for n, v in made.weights.items() if n != prefix})
        yield kept.write(path, **({} if change is None else {prefix: change}))
    yield made.without("cond_stage_model.", "first_stage_model.").write(path)
    for name, _ in refused.FOLDERS:
        (place / "folder").mkdir(exist_ok=True)
        (place / "folder/model_index.json").write_text(json.dumps({"_class_name": name}))
        yield place / "folder"


def test_files_that_are_refused_are_those_of_the_page(tmp_path):
    (tmp_path / "mine.ckpt").write_bytes(b"\x80\x02")
    found: dict[str, list[str]] = {}  # what to do -> of what
    for path in written(tmp_path):
        what, todo = refusal(path)
        if what not in found.setdefault(todo, []):
            found[todo].append(what)
    rows = [["<br>".join(what), todo] for todo, what in found.items()]
    compare("refused files", table(("The file ...", "so the message goes on: ..."), rows))
