"""The command line: every setting has a flag, mistakes end with one line, and what it makes says how."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from turbodistill.app import cli
from turbodistill.core.card import read_student
from turbodistill.measure import bench
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.pipeline import load
from turbodistill.trainer.run import run, training
from turbodistill.trainer.run.memory import OutOfMemory
from turbodistill.trainer.run.state_file import read_values

COMMANDS = ("demo", "distill", "sample", "evaluate", "info", "export", "push")
QUICK = [
    *(
        "--rank",
        "2",
        "--pairs",
        "8",
        "--pair-steps",
        "2",
        "--pair-sampler",
        "euler",
        "--batch-size",
        "2",
        "--updates",
        "4",
    ),
    *(
        "--regression-updates",
        "1",
        "--head-channels",
        "8",
        "--precision",
        "float32",
        "--preview-every",
        "2",
        "--evaluate-every",
        "2",
    ),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and f"turbodistill {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def other(field):
    """A value that is not the default, as typed."""
    if field.metadata["choices"]:
        return next(c for c in field.metadata["choices"] if c != field.default)
    if isinstance(field.default, str):
        return {"sizes": "64x64"}.get(field.name, "blocks")
    low, high = field.metadata["low"], field.metadata["high"]
    value = field.default + 1
    if high is not None and value > high:
        value = (low + high) / 2 if field.default == low else (field.default + low) / 2
    return str(type(field.default)(value))


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_every_setting_has_a_flag(field, capsys):
    flag = "--" + field.name.replace("_", "-")
    typed = [flag] if field.type == "bool" else [flag, other(field)]
    config = cli.settings(cli.make_parser().parse_args(["distill", *typed]))
    changed = {k for k, v in config.to_dict().items() if v != getattr(Config(), k)}
    assert changed == {field.name}
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert flag in told and f"(default: {field.default})" in told


def test_flags_go_before_the_settings_file_and_that_before_the_defaults(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("rank = 8\nlr = 1e-3\ncondition_image = true\n")
    flags = ["--config", str(path), "--rank", "4", "--no-condition-image", "--r1-noise", "0.1"]
    config = cli.settings(cli.make_parser().parse_args(["distill", *flags]))
    assert config == Config(rank=4, lr=1e-3)


def fails(capsys, arguments, told):
    """The command ends with status 1 and one line on stderr that says why."""
    assert cli.main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("turbodistill: ") and told in line and out == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("learning_rate = 1", "there is no setting 'learning_rate'"),
        ("rank = 1000", "rank is 1000: the most is 512"),
        ('adversarial = "wasserstein"', "adversarial is 'wasserstein': use one of hinge"),
        ("rank =", "is no TOML"),
    ],
)
def test_a_bad_settings_file_ends_with_one_line(tmp_path, capsys, content, told):
    path = tmp_path / "settings.toml"
    path.write_text(content)
    fails(capsys, ["distill", "--config", path], told)


def test_an_unknown_flag_names_the_nearest_setting(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["distill", "--checkpointing"])
    assert "the setting nearest to --checkpointing is --gradient-checkpointing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sample", "a fox", "--speed", "3"])
    assert "nearest" not in capsys.readouterr().err


def test_bad_values_and_files_end_with_one_line(tmp_path, capsys, pipeline_folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("")
    fails(capsys, ["distill", "--rank", "-1"], "rank is -1: the least is 0")
    fails(capsys, ["distill", "--config", tmp_path / "none.toml"], "does not exist")
    fails(capsys, ["distill", "--model", tmp_path / "none"], "none does not exist")
    fails(capsys, ["sample", "a fox", "--model", tmp_path / "none"], "none does not exist")
    fails(capsys, ["info", tmp_path / "none"], "none does not exist")
    fails(capsys, ["info", prompts], "is no model file: give a .safetensors file")
    capsys.readouterr()


def argument(capsys, *wrong):
    """What the parser says of arguments of `distill` that cannot be."""
    with pytest.raises(SystemExit):
        cli.main(["distill", *wrong])
    return capsys.readouterr().err


def test_an_argument_of_the_wrong_type_is_told_by_the_parser(capsys):
    for wrong in (["--rank", "many"], ["--updates", "1.5"], ["--adversarial", "wasserstein"], ["--unknown", "1"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["distill", *wrong])
        said = capsys.readouterr().err
        assert end.value.code == 2 and wrong[0] in said and "int value" not in said
    assert "--rank: is 'many': give a whole number" in argument(capsys, "--rank", "many")
    assert "--lr: is 'fast': give a number" in argument(capsys, "--lr", "fast")
    assert cli.settings(cli.make_parser().parse_args(["distill", "--updates", "1e3"])).updates == 1000


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red fox\nan owl\na blue cod\n")
    return path


@pytest.fixture(scope="module")
def made(pipeline_folder, prompts, tmp_path_factory):
    """A folder in which `turbodistill distill` ran."""
    out = tmp_path_factory.mktemp("made")
    assert (
        cli.main(["distill", "--model", str(pipeline_folder), "--prompts", str(prompts), "--out", str(out), *QUICK])
        == 0
    )
    return out


def test_distill_makes_a_student_a_history_and_previews(made):
    assert (made / training.BEST).exists() and (made / training.HISTORY).exists()
    previews = sorted(p.name for p in (made / "previews").iterdir())
    assert previews == ["0000000.png", "0000002.png", "0000004.png"]
    with Image.open(made / "previews" / previews[0]) as sheet:
        assert sheet.width > 200 and sheet.height > 100


def test_a_finished_run_is_told_again_and_a_changed_one_refused(made, pipeline_folder, prompts, capsys):
    command = ["distill", "--model", pipeline_folder, "--prompts", prompts, "--out", made, *QUICK]
    assert cli.main([str(c) for c in command]) == 0
    assert f"student: {made / training.BEST}" in capsys.readouterr().out
    assert cli.main([*(str(c) for c in command), "--lr", "1e-5"]) == 1
    assert "cannot go on with other settings: lr was 0.0002 and is 1e-05" in capsys.readouterr().err


def test_what_stops_a_run_is_told_in_one_line(tmp_path, capsys, pipeline_folder, prompts):
    model = ["distill", "--model", pipeline_folder]
    fails_at = [
        ([*model, "--prompts", tmp_path / "none.txt"], "none.txt does not exist"),
        ([*model, "--prompts", prompts, "--positives", "real", "--out", tmp_path], "there are no images"),
        ([*model, "--prompts", prompts, "--targets", "nothing", "--out", tmp_path], "match no layer"),
    ]
    for command, told in fails_at:
        assert cli.main([str(c) for c in command]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("turbodistill: ") and told in last


def test_the_list_that_suits_the_model_is_told(tmp_path, capsys, pipeline_folder, monkeypatch):
    taken = []

    def stop(host, config, folder, prompts, *_, **more):
        taken.append(prompts)
        raise ConfigError("enough")

    monkeypatch.setattr(run, "run", stop)
    monkeypatch.chdir(tmp_path)
    for given in ([], ["--prompts", "auto"], ["--prompts", "tags"]):
        assert cli.main(["distill", "--model", str(pipeline_folder), "--out", "out", *given]) == 1
    told = "prompts: the built-in list of prose, since nothing says that the model learnt tags"
    assert capsys.readouterr().out.splitlines() == [told] * 2
    assert [len(prompts) for prompts in taken] == [63, 63, 50]
    (tmp_path / "auto").write_text("a __colour__ fox")  # a file of that name goes before, where it is named
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "colour.txt").write_text("red")
    for given in ([], ["--prompts", "auto", "--wildcards", "mine"]):
        assert cli.main(["distill", "--model", str(pipeline_folder), "--out", "out", *given]) == 1
    assert len(taken[-2]) == 63 and taken[-1] == ["a {red} fox"]


def test_info_prints_the_card_in_words(made, capsys):
    assert cli.main(["info", str(made / training.BEST)]) == 0
    told = capsys.readouterr().out
    assert "One-step student of tiny-sd, a LoRA of rank 2 (all)" in told
    assert "The noise enters at timestep 999." in told and "The network predicts eps, as the base model does." in told
    assert "The teacher's guidance of 4 is baked in" in told and "Resolution: 16 x 16." in told and "updates" in told


def sample(pipeline_folder, made, out, *arguments):
    student = str(made / training.BEST)
    command = ["sample", "--model", str(pipeline_folder), "--student", student, "--out", str(out), *arguments]
    assert cli.main(command) == 0
    return {p.name: Image.open(p) for p in sorted(out.iterdir())}


def pixels(picture):
    return torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).int()


def test_a_picture_says_how_it_was_made(pipeline_folder, made, tmp_path, capsys):
    pictures = sample(pipeline_folder, made, tmp_path, "A red fox!", "--seed", "7")
    name = "00001-a-red-fox-7.png"
    assert list(pictures) == [name] and capsys.readouterr().out.strip().endswith(name)
    picture = pictures[name]
    first, second = picture.text["parameters"].splitlines()
    assert first == "A red fox!" and picture.size == (16, 16)
    assert second.startswith("Steps: 1, Sampler: ADD 1-step, CFG scale: 1, Seed: 7, Size: 16x16, ")
    assert second.endswith("Model: tiny-sd, Student: student.safetensors")


def test_of_choices_one_is_drawn_for_each_picture(pipeline_folder, made, tmp_path, capsys):
    pictures = sample(pipeline_folder, made, tmp_path, "a {red|blue} fox", "--count", "8")
    assert {picture.text["parameters"].splitlines()[0] for picture in pictures.values()} == {"a red fox", "a blue fox"}
    capsys.readouterr()
    fails(capsys, ["sample", "a {red fox", "--model", pipeline_folder], "has a brace without its other one")


def test_the_same_seed_gives_the_same_file_and_a_batch_its_singles(pipeline_folder, made, tmp_path):
    both = sample(pipeline_folder, made, tmp_path / "a", "a fox", "an owl", "--count", "2")
    assert list(both) == ["00001-a-fox-0.png", "00002-a-fox-1.png", "00003-an-owl-2.png", "00004-an-owl-3.png"]
    again = sample(pipeline_folder, made, tmp_path / "b", "a fox", "an owl", "--count", "2")
    for name in both:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert again[name].text == both[name].text
    alone = sample(pipeline_folder, made, tmp_path / "c", "an owl", "--seed", "2")
    # Another batch size rounds otherwise: a level of 255 at most.
    assert (pixels(alone["00001-an-owl-2.png"]) - pixels(both["00003-an-owl-2.png"])).abs().max() <= 1
    assert (pixels(both["00001-a-fox-0.png"]) != pixels(both["00002-a-fox-1.png"])).any()


def test_a_picture_is_never_written_over(pipeline_folder, made, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "00007-mine.png")
    sample(pipeline_folder, made, tmp_path, "a fox", "???")
    sample(pipeline_folder, made, tmp_path, "a fox")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00007-mine.png", "00008-a-fox-0.png", "00009-picture-1.png", "00010-a-fox-0.png"]
    for number in ("99999", "1234567"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}-a-fox-0.png")
        added = sample(pipeline_folder, made, tmp_path, "a fox").keys() - names - {f"{number}-a-fox-0.png"}
        assert added == {f"{int(number) + 1}-a-fox-0.png"}
        names = [path.name for path in tmp_path.iterdir()]


def test_files_that_are_missing_are_told_before_a_model_is_loaded(
    tmp_path, capsys, pipeline_folder, prompts, reference_zip, monkeypatch
):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    model, gone = ["--model", pipeline_folder], tmp_path / "gone"
    distil = ["distill", *model, "--out", tmp_path / "out", "--prompts"]
    fails(capsys, [*distil, gone], "gone does not exist")
    fails(capsys, [*distil, prompts, "--config", gone], "gone does not exist")
    fails(capsys, [*distil, prompts, "--images", gone, "--positives", "both"], "gone does not exist")
    fails(capsys, [*distil, prompts, "--images", prompts, "--positives", "both"], "prompts.txt is no folder: give one")
    fails(capsys, [*distil, prompts, "--init-student", gone], "gone does not exist")
    fails(capsys, [*distil, prompts, "--positives", "both"], "there are no images")
    fails(capsys, ["sample", *model, "--prompts", gone], "gone does not exist")
    fails(capsys, ["evaluate", *model, "--reference", gone], "gone does not exist")
    fails(capsys, ["evaluate", *model, "--reference", reference_zip, "--student", gone], "gone does not exist")


def test_a_seed_with_no_room_for_the_next_pictures_is_told(capsys, pipeline_folder, monkeypatch):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["sample", "a fox", "--model", pipeline_folder, "--seed", 2**63 - 1, "--count", 2]
    fails(capsys, command, "of 2 pictures the last would have one above 9223372036854775807")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["sample", "a fox", "--count", "0"], "--count: is '0': give a whole number from 1 to 10000"),
        (["sample", "a fox", "--steps", "1001"], "--steps: is '1001': give a whole number from 1 to 1000"),
        (["sample", "a fox", "--seed", "-1"], "--seed: is '-1': give a whole number from 0 to 9223372036854775807"),
        (
            ["sample", "a fox", "--seed", "99999999999999999999"],
            "--seed: is '99999999999999999999': give a whole number from 0 to",
        ),
        (["sample", "a fox", "--seed", "one"], "--seed: is 'one': give a whole number from 0 to"),
        (["evaluate", "--count", "7"], "--count: is '7': give a whole number from 8 to 100000"),
        (["evaluate", "--seeds", "0"], "--seeds: is '0': give a whole number from 1 to 100"),
        (["demo", "--minutes", "nan"], "--minutes: is 'nan': give 0.1 to 10000"),
        (["demo", "--count", "-3"], "--count: is '-3': give a whole number from 8 to 100000"),
        (["sample", "a fox", "--out", f"{__file__}/sub"], "is a file: give a folder"),
        (["evaluate", "--out", "."], "is '.', a folder: give a file's name"),
        (["info", ""], "file: is empty: give a path"),
        (["sample", "a fox", "--student", " "], "--student: is empty: give a path"),
        (["ui", "--port", "0"], "--port: is '0': give a whole number from 1 to 65535"),
        (["sample", "a fox", "--out", __file__], "is a file: give a folder"),
        (["distill", "--out", __file__], "is a file: give a folder"),
        (["demo", "--out", __file__], "is a file: give a folder"),
        (["ui", "--out", __file__], "is a file: give a folder"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(capsys, flags, told):
    with pytest.raises(SystemExit):
        cli.main(flags)
    assert told in capsys.readouterr().err


def test_a_model_of_ones_own_is_not_measured_against_emoji(capsys, pipeline_folder):
    fails(capsys, ["evaluate", "--model", pipeline_folder], "--model needs --reference: a zip of pictures")


def test_sampling_with_a_student_that_is_none_is_told(tmp_path, capsys, pipeline_folder):
    prompt = ["sample", "a fox", "--model", pipeline_folder, "--student"]
    unet = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    for student, told in ((tmp_path / "none", "does not exist"), (unet, "holds no student card")):
        assert cli.main([str(a) for a in [*prompt, student]]) == 1
        assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_sampling_half_a_letter_is_told(capsys):
    assert cli.main(["sample", "a \udcff fox"]) == 1  # a byte of the shell's that is no UTF-8
    assert "is half a letter, or a byte that is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run_distill", "run_evaluate", "run_demo"])
def test_no_command_shows_what_other_libraries_write(monkeypatch, command):
    def noisy(_args):
        warnings.warn("nobody's to act on", stacklevel=1)
        return int(os.environ.get("DIFFUSERS_VERBOSITY") != "error")

    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    monkeypatch.setattr(cli, command, noisy)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert cli.main([command.removeprefix("run_")]) == 0
    assert not shown


MAIN = "import sys; from turbodistill.app.cli import main; sys.exit(main())"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_saves_and_says_how_to_go_on(pipeline_folder, prompts, tmp_path, name):
    flags = ["--model", str(pipeline_folder), "--prompts", str(prompts), "--out", str(tmp_path), *QUICK]
    flags += ["--preview-every", "0", "--save-every", "100000", "--evaluate-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "distill", *flags, "--updates", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    history = tmp_path / training.HISTORY
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if history.exists() and len(history.read_text().splitlines()) > 3:
            process.send_signal(getattr(signal, name))
            process.send_signal(getattr(signal, name))  # a key that bounces
            break
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), err
    assert ("stopping, and saving" in err) == (name == "SIGINT") and "Traceback" not in err
    assert f"saved; to go on: turbodistill distill --model {pipeline_folder}" in out
    done = read_values(tmp_path / training.STATE)["update"]
    assert done == len(history.read_text().splitlines()) - 1 >= 3
    assert cli.main(["distill", *flags, "--updates", str(done + 2)]) == 0
    assert len(history.read_text().splitlines()) - 1 == done + 2


@pytest.mark.slow
def test_evaluate_measures_a_student_against_its_teacher(
    pipeline_folder, made, reference_zip, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "ALIKE_PROMPTS", 2)
    stranger = tmp_path / "stranger.safetensors"  # the student of another base
    tensors, card = read_student(made / training.BEST)
    save_file(tensors, stranger, dataclasses.replace(card, base_hash="0" * 16).to_metadata())
    out = tmp_path / "figures.json"
    flags = ["--reference", str(reference_zip), "--count", "8", "--seeds", "1", "--out", str(out)]
    command = ["evaluate", "--model", str(pipeline_folder), "--student", str(made / training.BEST), *flags]
    assert cli.main([*command, "--student", str(stranger)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{stranger} was made for tiny-sd ({'0' * 16}), the loaded model is another")
    assert "teacher, 50 steps" in told and "x faster than teacher, 50 steps" in told
    assert " 1 pass, " in told and " 100 passes, " in told
    figures = json.loads(out.read_text())
    (scores,) = figures["seeds"]
    assert f"{made.name}/student" in scores and len(scores) == 5
    assert figures["timings"][f"{made.name}/student"]["passes"] == 1
    assert figures["timings"]["teacher, 50 steps"]["passes"] == 100  # two rows a step: with guidance


def test_of_choices_in_prompts_one_is_drawn_for_each_pair(pipeline_folder, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a {red|blue} fox\n")
    flags = ["--model", str(pipeline_folder), "--prompts", str(lines), "--out", str(tmp_path / "out"), *QUICK]
    assert cli.main(["distill", *flags]) == 0
    assert set(load_pairs(tmp_path / "out" / "pairs").prompts) == {"a red fox", "a blue fox"}


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and re.fullmatch(r"turbodistill \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("error", [OutOfMemory("lower batch_size"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_ends_with_a_line(monkeypatch, capsys, error):
    def fail(_args):
        raise error

    monkeypatch.setattr(cli.info, "run", fail)
    assert cli.main(["info", "x"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("turbodistill: ") and told.count("\n") == 1 and "Traceback" not in told


def test_a_part_of_a_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["distill", "--prompt", "p.txt"])
    assert "unrecognized arguments: --prompt" in capsys.readouterr().err


def test_an_interruption_ends_with_a_line(monkeypatch, capsys):
    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "run", interrupted)
    assert cli.main(["info", "x"]) == 130
    assert capsys.readouterr().err == "turbodistill: interrupted\n"
