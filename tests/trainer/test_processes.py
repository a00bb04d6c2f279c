"""A training in several processes is that of one, and goes on in any other number."""

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from turbodistill.app import cli, processes
from turbodistill.trainer import world
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.run import run, training
from turbodistill.trainer.world import ALONE, World, average_gradients

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("together.py")
SHORT = {"updates": 4, "evaluate_every": 2, "preview_every": 2, "save_every": 2, "lr": 1e-3}
RECIPES = {
    "latents": {"network": "unet", "taps": "down_blocks.0,mid_block"},
    "full copy": {"rank": 0, "fresh_noise_share": 0.5},
    "pictures": {"positives": "both", "mismatch_weight": 0.5},
    "pixels": {"pixel_backbone": "embedded", "taps": "", "mismatch_weight": 0.5},
    "matching": {"distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2},
    "adversarial diffusion": {"distillation_weight": 2.5, "teacher_steps": 2},
    "exact R1": {"r1": "exact", "r1_weight": 0.01},
    "relativistic, features, image": {"adversarial": "relativistic", "feature_weight": 0.2, "condition_image": True},
    "several steps": {"student_steps": 3, "fresh_noise_share": 0.3},
    "accumulation": {"gradient_accumulation": 2, "discriminator_updates": 2},
    "two time scales, R1 of the data": {
        "distillation": "matching", "distillation_weight": 0.5, "fake_score_rank": 2, "fake_score_updates": 3,
        "discriminator_updates": 2, "r1": "data",
    },
    "checkpointing": {"gradient_checkpointing": True, "network": "unet", "taps": "down_blocks.0,mid_block"},
    "guidance alone": {"guidance_only": True, "guidance_start": 0.1, "guidance_end": 0.8},
    "several sizes": {"sizes": "32x32, 24x40", "pairs": 16},
    "float16": {"precision": "float16"},
}  # fmt: skip


def begin(folder, jobs):
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))


def launch(folder, jobs, count=2, *more, wait=True):
    """Start so many processes on these jobs; what they printed, or the launcher that goes on."""
    begin(folder, jobs)
    return _start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)], folder, more, wait)


def _start(launcher, folder, more=(), wait=True):
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    said = (folder / f"said-{time.monotonic_ns()}.txt").open("w+")
    started = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment)
    started.said = said
    if not wait:
        return started
    ended = started.wait(240)
    said.seek(0)
    text = said.read()
    assert ended == 0, text
    return text


def job(kit, name, images=None, network="conv", slow=0.0, apart=False, **changes):
    settings = asdict(kit.config(**SHORT | changes))
    about = {"name": name, "settings": settings, "network": network, "slow": slow, "apart": apart}
    return about | ({} if images is None else {"images": str(images)})


def losses(folder):
    with (folder / training.HISTORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in rows]


def distance(kit, one, other):
    """How far two students are apart, over how long the one is."""
    a, b = (kit.tensors(folder / training.BEST) for folder in (one, other))
    assert a.keys() == b.keys()
    apart = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((apart / sum(v.double().square().sum() for v in a.values())).sqrt())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(5):
        Image.effect_noise((40, 40), 20 + 30 * k).convert("RGB").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(("fox", "owl", "elk", "ant", "gnu")[k])
    return folder


@pytest.fixture(scope="module")
def both(kit, together, pictures, tmp_path_factory):
    """The folders of every recipe's training, in one process and in two."""
    folder = tmp_path_factory.mktemp("both")
    jobs = [job(kit, name, pictures if name == "pictures" else None, **changes) for name, changes in RECIPES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")  # else, without a GPU, it starts each alone
        begin(folder / "two", jobs)
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        _start([*launcher, "--main_process_port", "0"], folder / "two")
    assert {path.name for path in (folder / "two").glob("process-*")} == {"process-0", "process-1"}
    for each in jobs:
        together.train(folder / "one", ALONE, **each)
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def together():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("turbodistill_together", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_train_as_one_does(kit, both, recipe):
    one, two = (folder / recipe for folder in both)
    for alone, shared in zip(losses(one), losses(two), strict=True):
        assert shared == pytest.approx(alone, rel=1e-3, abs=2e-3)
    assert distance(kit, one, two) < 1e-4
    mine, theirs = kit.saved(one), kit.saved(two)
    assert mine["update"] == theirs["update"] == 4
    assert theirs["extra"]["best"] == pytest.approx(mine["extra"]["best"], rel=0.02)
    pairs = [sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors")) for folder in (one, two)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_goes_on_in_any_number_of_processes(kit, together, tmp_path, fsdp):
    """Two, one, and two again; of a full student also with each process holding a part of it."""
    changes = {"rank": 0, "lr": 1e-4} if fsdp else {"distillation": "matching", "distillation_weight": 0.5}
    flags = ["--fsdp"] if fsdp else []
    launch(tmp_path / "shared", [job(kit, "run", updates=2, **changes)], 2, *flags)
    together.train(tmp_path / "shared", ALONE, **job(kit, "run", updates=4, **changes))
    launch(tmp_path / "shared", [job(kit, "run", updates=6, **changes)], 2, *flags)
    together.train(tmp_path / "alone", ALONE, **job(kit, "run", updates=6, **changes))
    one, two = tmp_path / "alone" / "run", tmp_path / "shared" / "run"
    assert kit.updates(two) == [1, 2, 3, 4, 5, 6]
    for alone, shared in zip(losses(one), losses(two), strict=True):
        assert shared == pytest.approx(alone, rel=2e-3, abs=2e-3)
    assert distance(kit, one, two) < 0.01


def test_a_student_in_parts_is_trained_as_a_whole_one(kit, together, tmp_path):
    checkpointed = {"network": "unet", "taps": "down_blocks.0,mid_block", "gradient_checkpointing": True, "updates": 2}
    jobs = [job(kit, name, rank=0, lr=1e-4, **changes) for name, changes in {"conv": {}, "unet": checkpointed}.items()]
    launch(tmp_path / "parts", jobs, 2, "--fsdp")
    for each in jobs:
        together.train(tmp_path / "whole", ALONE, **each)
        one, two = (tmp_path / way / each["name"] for way in ("whole", "parts"))
        for alone, shared in zip(losses(one), losses(two), strict=True):
            assert shared == pytest.approx(alone, rel=1e-3, abs=2e-3)
        assert distance(kit, one, two) < 1e-4
        mine, theirs = kit.saved(one)["average"], kit.saved(two)["average"]
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_others_end_and_the_run_goes_on(kit, together, tmp_path, killed):
    jobs = [job(kit, "run", updates=500, save_every=1, evaluate_every=0, slow=0.02)]
    launcher = launch(tmp_path, jobs, wait=False)
    state = tmp_path / "run" / training.STATE
    until = time.monotonic() + 100
    while not state.exists():
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    os.kill(int((tmp_path / f"process-{killed}").read_text()), signal.SIGKILL)
    assert launcher.wait(120) != 0  # the other does not wait for its own patience of hours
    launcher.said.seek(0)
    assert "another process of this training has ended" in launcher.said.read()
    done = kit.saved(tmp_path / "run")["update"]
    together.train(tmp_path, ALONE, **job(kit, "run", updates=done + 2, save_every=1, evaluate_every=0))
    assert kit.updates(tmp_path / "run") == list(range(1, done + 3))


def test_two_launchers_are_two_machines(kit, together, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = [job(kit, "run")]
    begin(tmp_path, jobs)
    started = [
        _start(
            ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", port],
            tmp_path, wait=False,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [launcher.wait(240) for launcher in started] == [0, 0]
    together.train(tmp_path / "alone", ALONE, **jobs[0])
    assert distance(kit, tmp_path / "alone" / "run", tmp_path / "run") < 0.01


def test_a_folder_that_is_not_shared_is_refused(kit, tmp_path):
    launcher = launch(tmp_path, [job(kit, "run", apart=True)], wait=False)
    assert launcher.wait(100) != 0
    launcher.said.seek(0)
    assert "is not the same folder for every process: choose one that all machines share" in launcher.said.read()
    assert not list(tmp_path.rglob(".together*"))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(kit, host, tmp_path):
    with pytest.raises(ConfigError, match="batch_size is 4, which 3 processes cannot share evenly"):
        list(run.run(host, kit.config(), tmp_path / "run", kit.WORDS, world=OfThree(0)))
    assert not (tmp_path / "run").exists()


def test_processes_that_are_not_joined_are_refused(kit, monkeypatch):
    """Each would train alone, over the other's files: what accelerate does where it finds no GPU."""
    import accelerate

    monkeypatch.setenv("WORLD_SIZE", "2")
    state = type("State", (), {"num_processes": 1, "process_index": 0})()
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: state)
    with pytest.raises(ConfigError, match="2 processes were started, and only 1 joined"):
        processes.join(kit.config())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        processes.join(kit.config())


def test_one_process_needs_nothing(kit, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert processes.join(kit.config()) is ALONE
    with pytest.raises(ConfigError, match="--fsdp spreads a full student over several processes: give --rank 0"):
        processes.join(kit.config(rank=0), fsdp=True)


def test_other_commands_are_not_run_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(["info", "nothing.safetensors"])
    assert "only distill runs in several processes" in capsys.readouterr().err


def test_a_signal_to_the_launcher_saves_once(pipeline_folder, tmp_path):
    flags = ["--pairs", "4", "--pair-steps", "2", "--updates", "5000", "--batch-size", "2", "--taps", "down_blocks.0"]
    flags += ["--regression-updates", "0", "--evaluate-every", "0", "--preview-every", "0", "--precision", "float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["turbodistill", "distill", "--model", str(pipeline_folder), "--out", str(tmp_path / "run"), *flags]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        history, until = tmp_path / "run" / training.HISTORY, time.monotonic() + 120
        while not history.exists():
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    finally:
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=60)[0]
    assert said.count("saved; to go on: turbodistill distill") == 1
    assert (tmp_path / "run" / training.STATE).exists()


class OfThree(World):
    """One of three processes that are asked for nothing but their rows."""

    size = 3

    def __init__(self, rank):
        self.rank = rank


def test_rows_are_shared_as_evenly_as_can_be():
    for whole in range(12):
        rows = [list(range(whole))[OfThree(rank).rows(whole)] for rank in range(3)]
        assert [row for part in rows for row in part] == list(range(whole))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_gradients_are_averaged_a_bucket_at_a_time(monkeypatch):
    """The same numbers, whatever the buckets; a parameter without a gradient has none."""

    class Halving(World):
        size, seen = 2, []

        def average(self, tensor):
            self.seen.append(tensor.numel())
            return tensor.div_(2)

    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).double(), nn.Linear(5, 6).double())
    for p in list(module.parameters())[:-1]:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(world, "BUCKET", 30)
    average_gradients(Halving(), module)
    assert all((p.grad == 0.5).all() for p in list(module.parameters())[:-1])
    assert list(module.parameters())[-1].grad is None
    assert Halving.seen == [16, 25, 30]
