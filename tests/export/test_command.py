"""`turbodistill export`: what it prints, every mistake in one line before any work, and nothing half-written."""

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.app import cli
from turbodistill.app import export as command
from turbodistill.core.precision import PRECISIONS
from turbodistill.generate.export import export as exports

NETWORK = "model.diffusion_model.out.2."


@pytest.fixture
def base(make):
    return make("sd1")


@pytest.fixture
def student(base, tmp_path):
    return base.student(tmp_path / "student.safetensors")


def run(*arguments):
    return cli.main(["export", *map(str, arguments)])


def fails(capsys, told, *arguments):
    """The command ends with one line on stderr that says why, and writes nothing."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("turbodistill: ") and told in line and out == ""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_command_writes_and_says_what(student, base, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    assert run(student, "--to", "merged", "--base", base.folder, "--out", out, "--dtype", "bfloat16") == 0
    printed, _ = capsys.readouterr()
    assert printed.startswith(f"{out} (") and "MB, " in printed
    assert {v.dtype for v in load_file(out).values()} == {torch.bfloat16}


def test_the_command_knows_every_format_and_precision():
    assert tuple(command.FORMATS) == exports.FORMATS and tuple(PRECISIONS) == command.DTYPES


def test_another_base_is_warned_of_and_another_architecture_refused(make, student, base, tmp_path, capsys):
    card = base.card(base_hash="0" * 16, base_model="another.safetensors")
    save_file(load_file(student), tmp_path / "other.safetensors", card.to_metadata())
    out = tmp_path / "out.safetensors"
    assert run(tmp_path / "other.safetensors", "--to", "kohya", "--base", base.folder, "--out", out) == 0
    assert "other.safetensors was made for another.safetensors (0000" in capsys.readouterr().err
    given = [student, "--to", "merged", "--base", make("sd2").folder, "--out", tmp_path / "no.safetensors"]
    capsys.readouterr()
    fails(capsys, "of architecture stable-diffusion-v1, the loaded one is stable-diffusion-v2", *given)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "merged"], "--to merged needs --base: the file or the diffusers folder of tiny-sd1"),
        (["--to", "lora", "--rank", "4"], "is a LoRA already"),
        (["--to", "kohya", "--rank", "4"], "--rank belongs to --to lora alone"),
        (["--to", "merged", "--base", "nothing.safetensors"], "nothing.safetensors does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_told(student, tmp_path, capsys, arguments, told):
    fails(capsys, told, student, *arguments, "--out", tmp_path / "out.safetensors")
    assert names(tmp_path) == ["student.safetensors"]


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("out.ckpt", "give a file's name that ends in .safetensors"),
        ("student.safetensors", "which the export reads"),
        ("there.safetensors", "is there already: give another name, or --force to replace it"),
    ],
)
def test_what_may_not_be_written_is_told(student, tmp_path, capsys, out, told):
    save_file({}, tmp_path / "there.safetensors")
    before = (tmp_path / "there.safetensors").read_bytes()
    fails(capsys, told, student, "--to", "kohya", "--out", tmp_path / out)
    assert (tmp_path / "there.safetensors").read_bytes() == before
    assert run(student, "--to", "kohya", "--out", tmp_path / "there.safetensors", "--force") == 0


def test_a_file_for_a_folder_and_the_reverse_are_told(student, base, tmp_path, capsys):
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "b").write_text("")
    fails(
        capsys, "a folder: give another name", student, "--to", "kohya", "--out", tmp_path / "a.safetensors", "--force"
    )
    given = [student, "--to", "diffusers", "--base", base.folder, "--out"]
    fails(capsys, "a file: give another name", *given, tmp_path / "b", "--force")
    fails(capsys, "a file's name, and diffusers is a folder: give one without", *given, tmp_path / "new.safetensors")
    fails(capsys, "which the export reads", *given, base.folder, "--force")
    fails(capsys, "which the export reads", *given, base.folder / "unet", "--force")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"lora_unet_out_2.lora_down.weight": torch.zeros(1, 4)}, "is a LoRA, not a model"),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(1, 4)}, "is an autoencoder (VAE)"),
        ({"control_model.out": torch.zeros(1)}, "is a ControlNet"),
        ({"something": torch.zeros(1)}, "is of a kind that is not known (its weights are called something)"),
        ({NETWORK + "weight": torch.zeros(4, 4, dtype=torch.uint8)}, "holds quantised weights"),
        ({NETWORK + "weight": torch.zeros(4), NETWORK + "scale_weight": torch.ones(1)}, "holds quantised weights"),
        ({NETWORK + "weight": torch.zeros(4)}, "does not fit this base"),
    ],
)
def test_a_base_that_is_none_is_told_for_what_it_is(student, tmp_path, capsys, content, told):
    save_file(content, tmp_path / "base.safetensors")
    given = ["--base", tmp_path / "base.safetensors", "--out", tmp_path / "out.safetensors"]
    fails(capsys, told, student, "--to", "merged", *given)


def test_what_only_our_samplers_know_is_told(base, tmp_path, capsys):
    student = base.student(tmp_path / "student.safetensors", prediction="x0", timesteps=(399,))
    assert run(student, "--to", "kohya", "--out", tmp_path / "out.safetensors") == 0
    told = capsys.readouterr().err
    assert "predicts x0 where its base predicts eps and begins at timestep 399: of ComfyUI and the WebUIs only" in told


def test_broken_files_are_told(student, base, tmp_path, capsys):
    out = ["--out", tmp_path / "out.safetensors"]
    (tmp_path / "base.ckpt").write_bytes(b"pickle")
    fails(capsys, "pickle files", student, "--to", "merged", "--base", tmp_path / "base.ckpt", *out)
    half = student.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(half[: len(half) // 2])
    fails(capsys, "no complete safetensors file", tmp_path / "half.safetensors", "--to", "kohya", *out)
    fails(capsys, "does not exist", tmp_path / "none.safetensors", "--to", "kohya", *out)
    fails(
        capsys,
        "it has no model_index.json",
        student,
        "--to",
        "merged",
        "--base",
        tmp_path,
        *out,
    )
    tensors = load_file(student)
    save_file(tensors, tmp_path / "no-card.safetensors")
    fails(capsys, "holds no student card", tmp_path / "no-card.safetensors", "--to", "kohya", *out)
    key = "lora_unet_conv_out.lora_up.weight"
    save_file(tensors | {key: tensors[key] * torch.nan}, tmp_path / "nan.safetensors", base.card().to_metadata())
    fails(capsys, "are no numbers (NaN or infinity)", tmp_path / "nan.safetensors", "--to", "kohya", *out)


def test_a_base_with_weights_that_are_no_numbers_leaves_nothing(student, base, tmp_path, capsys):
    assert run(student, "--to", "merged", "--base", base.folder, "--out", tmp_path / "base.safetensors") == 0
    tensors = load_file(tmp_path / "base.safetensors")
    tensors["first_stage_model.decoder.conv_in.weight"] *= torch.nan
    save_file(tensors, tmp_path / "base.safetensors")
    given = ["--base", tmp_path / "base.safetensors", "--out", tmp_path / "out.safetensors"]
    assert run(student, "--to", "merged", *given) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "first_stage_model.decoder.conv_in.weight holds what is no number" in told
    assert names(tmp_path) == ["base.safetensors", "student.safetensors"]


def test_a_full_student_is_told_what_it_can_be(base, tmp_path, capsys):
    full = base.student(tmp_path / "full.safetensors", full=True)
    fails(capsys, "use --to lora with --rank", full, "--to", "peft", "--out", tmp_path / "out.safetensors")
    given = ["--base", base.folder, "--out", tmp_path / "out.safetensors"]
    fails(capsys, "--to lora needs --rank", full, "--to", "lora", *given)
    assert run(full, "--to", "lora", "--rank", "2", *given) == 0
    assert "relative error of the change" in capsys.readouterr().out


@pytest.mark.parametrize("rank", ["0", "2000", "many"])
def test_a_rank_out_of_bounds_is_told(student, tmp_path, capsys, rank):
    with pytest.raises(SystemExit):
        run(student, "--to", "lora", "--rank", rank, "--out", tmp_path / "out.safetensors")
    assert "give a whole number from 1 to 1024" in capsys.readouterr().err


# --- Nothing half-written ---


@pytest.fixture(params=["merged", "diffusers"])
def large(request, student, base, tmp_path):
    """The arguments of an export that takes a while, over an output that is there."""
    out = tmp_path / ("out.safetensors" if request.param == "merged" else "out")
    given = [student, "--to", request.param, "--base", base.folder, "--out", out]
    assert run(*given) == 0
    return [*given, "--force"]


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_disk_that_fills_up_leaves_the_old_output(large, tmp_path, capsys):
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk, but for the error's name
    try:
        fails(capsys, "free some space or choose another folder", *large, "--dtype", "bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before and not list(tmp_path.glob("*.part"))


def test_a_disk_too_small_is_told_before_anything_is_written(large, tmp_path, capsys, monkeypatch):
    before = snapshot(tmp_path)
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("turbodistill.trainer.data.files.shutil.disk_usage", lambda _: free)
    monkeypatch.setattr(exports, "write_safetensors", None)
    fails(capsys, "GB are free there: make room, or choose another place", *large)
    assert snapshot(tmp_path) == before


def test_ctrl_c_leaves_the_old_output(large, tmp_path, capsys, monkeypatch):
    before, write = snapshot(tmp_path), exports.write_safetensors

    def broken_off(*arguments):
        for k, nbytes in enumerate(write(*arguments)):
            if k == 20:
                raise KeyboardInterrupt
            yield nbytes

    monkeypatch.setattr(exports, "write_safetensors", broken_off)
    assert run(*large, "--dtype", "bfloat16") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "turbodistill: interrupted"
    assert snapshot(tmp_path) == before and not list(tmp_path.glob("*.part"))
