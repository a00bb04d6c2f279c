"""Files that the command line is given: models, references, students, and paths that are typed wrongly."""

import io
import json
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from turbodistill.app import cli
from turbodistill.core.card import CardError
from turbodistill.demo.files import HEADER
from turbodistill.measure.evaluate import load_reference
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.pipeline.host import ModelError
from turbodistill.trainer.pipeline.load import load_model

pytest.importorskip("diffusers.loaders.single_file_utils", reason="needs diffusers: pip install 'turbodistill[demo]'")
OURS = (CardError, ConfigError, DataError, ModelError)


def test_models_in_one_file(fuzz, tmp_path):
    """The architecture in the header says anything at all."""
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [8],
        "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "cross_attention_dim": 8, "attention_head_dim": 2,
    }  # fmt: skip
    vae = {"block_out_channels": [8], "norm_num_groups": 4, "scaling_factor": 0.2}
    header = {
        "schedule": {"steps": 1000, "start": 0.001, "end": 0.01}, "prediction": "eps", "resolution": [64, 64],
        "unet": unet, "vae": vae, "text_encoder": {"tokenizer": {"version": "1.0", "model": {"type": "BPE"}}},
    }  # fmt: skip
    path = tmp_path / "model.safetensors"

    def model(draws):
        text = json.dumps(fuzz.values_of(draws, header))
        about = {HEADER: "[" * 3000 if draws.random() < 0.05 else text.encode("utf-8", "replace").decode()}
        save_file(fuzz.tensors_of(draws, {"a": torch.zeros(2)}), path, about)
        load_model(path)

    tries = fuzz.TRIES // 50
    assert fuzz.endures(model, tries, OURS) == tries


def test_models_in_a_folder(fuzz, pipeline_folder, tmp_path):
    import shutil

    def model(draws):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pipeline_folder, folder)
        path = draws.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        if path.suffix == ".json" and draws.random() < 0.7:
            values = json.loads(path.read_text())
            path.write_text(
                json.dumps(fuzz.values_of(draws, values) if isinstance(values, dict) else draws.choice(fuzz.VALUES))
            )
        else:
            path.write_bytes(fuzz.bytes_of(draws, path.read_bytes()))
        load_model(folder)

    fuzz.endures(model, fuzz.TRIES // 100, OURS)


def test_references(fuzz, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    rows = [
        {"file_name": "a.png", "text": "a fox", "style": "x", "split": split}
        for split in ("train", "heldout")
        for _ in range(9)
    ]
    path = tmp_path / "reference.zip"

    def reference(draws):
        made = list(rows)
        for _ in range(draws.randint(0, 2)):
            made[draws.randrange(len(made))] = draws.choice([fuzz.values_of(draws, rows[0]), draws.choice(fuzz.VALUES)])
        kind = draws.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        raw = io.BytesIO()
        with zipfile.ZipFile(raw, "w", kind) as archive:
            odd = draws.random() < 0.3
            archive.writestr("a.png", fuzz.bytes_of(draws, picture.getvalue()) if odd else picture.getvalue())
            archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, made)))
        path.write_bytes(fuzz.bytes_of(draws, raw.getvalue()) if draws.random() < 0.5 else raw.getvalue())
        load_reference(path)

    assert fuzz.endures(reference, fuzz.TRIES // 20, OURS)


FLAGS = ("--student", "--model", "--out")
COMMANDS = {
    "info": (), "sample": FLAGS, "evaluate": (*FLAGS, "--reference"),
    "distill": ("--model", "--prompts", "--images", "--config", "--out", "--pairs-folder", "--init-student"),
}  # fmt: skip


def test_paths(fuzz, tmp_path, monkeypatch, capsys):
    """Each ends with one line and a status, whatever stands in place of a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a fox")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "deep.toml").write_text("rank = " + "[" * 3000)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    paths = [
        *("text.txt", "empty", "folder", "deep.toml", "other.safetensors", "other.safetensors/x", "folder/", "nothing"),
        *(odd for odd in fuzz.ODD if "\0" not in odd and odd not in ("", "..", "~")), "'text.txt'", " text.txt ",
    ]  # fmt: skip

    def stops(*_, **__):
        raise ModelError("a model would be loaded here")

    import turbodistill.trainer.pipeline.load as hosts

    real = hosts.load_model
    monkeypatch.setattr(
        hosts, "load_model", lambda path=None, *_, **how: stops() if path is None else real(path, **how)
    )

    def command(draws):
        name = draws.choice(list(COMMANDS))
        given = [draws.choice(paths)] if name in ("info", "sample") else []
        for flag in draws.sample(COMMANDS[name], min(len(COMMANDS[name]), draws.randint(1, 3))):
            given += [f"{flag}={draws.choice(paths)}"]
        try:
            status = cli.main([name, "--", *given] if name == "info" else [name, *given])
        except SystemExit as end:
            status = end.code
        told = capsys.readouterr()
        if name == "info" and status == 0:  # it says of any file what it is
            assert 10 < len(told.out) < 3000 and not told.err, (given, told)
            return
        assert status in (1, 2) and "turbodistill" in told.err and "Traceback" not in told.err, (given, told)
        assert len(told.err.strip().splitlines()[-1]) < 1500 or status == 2

    fuzz.endures(command, fuzz.TRIES // 15, ())
