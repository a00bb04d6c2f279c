"""Distilling in a real AUTOMATIC1111 and Forge, on the checkpoint that is loaded there."""

import base64
import io
import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from turbodistill.core.card import fingerprint, read_student

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {"updates": 100000, "save_every": 100000, "evaluate_every": 0, "preview_every": 0}


@pytest.fixture(scope="module")
def first(trainer):
    """A distillation that has run to its end, and what the model was before and after it."""
    with trainer.unchanged():
        trainer.start("first")
        told = trainer.ended()
    assert told["state"] == "done", told["error"]
    return told


def pixels(url):
    """A data URL's picture (H, W, 3) as floats 0 to 255."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as file:
        return np.asarray(file.convert("RGB"), dtype=np.float32)


def checkpoint(webui):
    """The tensors of the server's checkpoint that are its UNet's."""
    folder = webui.data / "models" / "Stable-diffusion"
    (path,) = (path for path in folder.iterdir() if path.suffix in (".ckpt", ".safetensors"))
    if path.suffix == ".ckpt":
        tensors = torch.serialization.load(path, weights_only=True)["state_dict"]
    else:
        tensors = load_file(path)
    prefix = "model.diffusion_model."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def test_a_size_that_cannot_be_is_refused_before_anything_starts(webui, trainer):
    for width in (60, -64, 10**9):
        asked = {"name": "bad", "prompts": "a fox", "width": width}
        assert webui.status("turbodistill/v1/distill", asked, {}) == 400
    assert "bad" not in [run["name"] for run in webui.call("turbodistill/v1/runs")["runs"]]


@pytest.mark.share
def test_another_site_s_page_can_start_nothing(webui, trainer):
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ):
        asked = {"name": "evil", "prompts": "a fox"}
        assert webui.status("turbodistill/v1/distill", asked, headers) == status
    assert "evil" not in [run["name"] for run in webui.call("turbodistill/v1/runs")["runs"]]


@pytest.mark.share
def test_it_ends_with_curves_and_previews(first):
    assert first["done"] == 4 and first["history"]["update"] == [1, 2, 3, 4]
    assert first["best"] and first["previews"] and not first["warnings"]
    assert "<lora:first:1>" in first["result"]


@pytest.mark.share
def test_the_student_is_in_the_lora_folder_and_knows_its_base(webui, trainer, first):
    tensors, card = read_student(webui.data / "models" / "Lora" / "first.safetensors")
    # The same as of the file's tensors: a student moves between hosts without a warning.
    assert card.base_hash == fingerprint(checkpoint(webui)) and card.architecture == "stable-diffusion-v1"
    assert "first" in [found["name"] for found in webui.call("sdapi/v1/loras")]
    assert "first" in [found["name"] for found in webui.call("turbodistill/v1/students")["students"]]
    assert all(tensors[name].any() for name in tensors if name.endswith("lora_up.weight"))  # each layer has learnt


@pytest.mark.share
def test_its_picture_is_the_preview_s_with_all_layers_matched(webui, trainer, first, distance):
    shown = first["previews"][-1]
    tensors, _ = read_student(webui.data / "models" / "Lora" / "first.safetensors")
    for prompt, seed, student, teacher in zip(
        *(shown[k] for k in ("prompts", "seeds", "student", "teacher")), strict=True
    ):
        made = webui.txt2img(prompt=f"{prompt} <lora:first:1>", seed=seed)
        assert trainer.inspect("matched") == {"first": len(tensors) // 3}
        assert made.remarks == []
        bare = webui.txt2img(prompt=prompt, seed=seed).picture
        assert distance(made.picture, pixels(student)) < 2 < distance(bare, made.picture)
        assert distance(made.picture, pixels(teacher)) > 2


@pytest.mark.share
def test_a_lora_that_was_applied_before_is_neither_trained_on_nor_lost(webui, trainer, first):
    prompt = "a fox <lora:first:1>"
    before = webui.txt2img(**trainer.PLAIN | {"prompt": prompt}).picture
    plain = webui.txt2img(**trainer.PLAIN).picture
    assert not np.array_equal(before, plain)
    webui.txt2img(**trainer.PLAIN | {"prompt": prompt})
    trainer.start("second", {"gradient_checkpointing": True, "precision": "auto"})
    assert trainer.ended()["state"] == "done"
    _, card = read_student(webui.data / "models" / "Lora" / "second.safetensors")
    assert card.base_hash == fingerprint(checkpoint(webui))
    assert np.array_equal(webui.txt2img(**trainer.PLAIN | {"prompt": prompt}).picture, before)
    assert np.array_equal(webui.txt2img(**trainer.PLAIN).picture, plain)


@pytest.mark.share
def test_generation_waits_the_page_lives_and_cancel_ends_it_within_a_step(webui, trainer, first):
    with trainer.unchanged():
        trainer.start("long", LONG | {"gradient_accumulation": 4})
        trainer.until(trainer.trains)
        with pytest.raises(trainer.refused, match=r"409.*runs already"):
            trainer.start("other")
        drawn = threading.Event()

        def draw():
            webui.txt2img(**trainer.PLAIN)
            drawn.set()

        waiting = threading.Thread(target=draw)
        waiting.start()
        asked = time.monotonic()
        assert "ADD 1-step" in webui.samplers() and time.monotonic() - asked < 10
        assert not drawn.wait(2)
        done = trainer.run("none")["done"]
        trainer.ask("cancel")
        told = trainer.ended()
        assert told["state"] == "cancelled" and told["done"] <= done + 1
        assert drawn.wait(120)
        waiting.join()
    # It goes on where it was.
    trainer.start("long", LONG | {"gradient_accumulation": 4, "updates": told["done"] + 1})
    assert trainer.ended()["state"] == "done"


def test_what_would_wait_for_the_model_is_told_why(webui, trainer, first, other, refused):
    own = webui.call("sdapi/v1/options")["sd_model_checkpoint"]
    with trainer.unchanged():
        trainer.start("long-too", LONG)
        trainer.until(trainer.trains)
        waiting = threading.Thread(target=lambda: webui.txt2img(**trainer.PLAIN, force_task_id="task(waits)"))
        waiting.start()
        ends = time.monotonic() + 60
        while not (told := webui.call("internal/progress", {"id_task": "task(waits)"}))["queued"]:
            assert time.monotonic() < ends
            time.sleep(0.1)
        assert re.match(
            r"A distillation runs \(long-too, training \d+ of 100000, .* left\): wait, or", told["textinfo"]
        )
        asked = time.monotonic()
        if not webui.kind.backend:
            with pytest.raises(refused, match=r"409.*sd_model_checkpoint stays as it is. A distillation runs"):
                webui.set(sd_model_checkpoint=other)
        else:  # Forge and Neo load it for the next picture
            webui.set(sd_model_checkpoint=other)
            webui.set(sd_model_checkpoint=own)
        assert time.monotonic() - asked < 30
        assert webui.call("sdapi/v1/options")["sd_model_checkpoint"] == own
        trainer.ask("cancel")
        waiting.join()


def test_settings_that_cannot_be_used_here_are_not_offered(webui, trainer):
    settings = {row["name"]: row for row in webui.call("turbodistill/v1/settings")["settings"]}
    assert settings["rank"]["low"] == 1 and not settings.keys() & {"base_precision", "offload"}
    for wrong in ({"rank": 0}, {"base_precision": "int8"}):
        with pytest.raises(trainer.refused, match=f"400.*{next(iter(wrong))} is"):
            trainer.start("bad", wrong)


def test_buckets_blocks_a_card_s_memory_and_a_student_to_begin_from(webui, trainer, first, tmp_path):
    for k in range(3):
        Image.new("RGB", (80, 80), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a square")
    settings = {"sizes": "buckets", "targets": "all, not middle_block", "vram": 24.0, "evaluate_every": 0}
    with trainer.unchanged():
        trainer.start("card", settings, images=str(tmp_path))
        told = trainer.ended()
    assert (told["state"], told["error"]) == ("done", "")
    assert told["memory"].startswith("for a card of 24.0 GB: ")
    assert "gradient_checkpointing false; set by hand, and kept: batch_size; training takes" in told["memory"]
    tensors, card = read_student(webui.data / "models" / "Lora" / "card.safetensors")
    assert card.sizes == "64x64" and tensors and not any("middle_block" in name for name in tensors)
    trainer.start("further", {"targets": "all, not middle_block", "init_student": "card", "evaluate_every": 0})
    assert trainer.ended()["state"] == "done"
    card = read_student(webui.data / "models" / "Lora" / "further.safetensors")[1]
    assert card.training["init_student"] == "card.safetensors"


@pytest.mark.share
def test_stop_keeps_the_best(webui, trainer, first):
    trainer.start("stopped", LONG | {"evaluate_every": 1})
    trainer.until(trainer.trains)
    trainer.ask("stop")
    told = trainer.ended()
    assert told["state"] == "stopped" and (webui.data / "models" / "Lora" / "stopped.safetensors").exists()


def test_a_failure_is_told_and_leaves_the_model_as_it_was(webui, trainer, first):
    with trainer.unchanged():
        trainer.start("failing", LONG)
        trainer.until(trainer.trains)
        trainer.inspect("fail")
        told = trainer.ended()
        assert told["state"] == "failed" and "a fault of another extension" in told["error"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompts": "a fox <lora:first:1>"}, "names lora"),
        ({"settings": {"targets": "nothing like it"}}, "match no layer"),
    ],
)
def test_what_cannot_be_is_told_in_words(webui, trainer, first, asked, words):
    with trainer.unchanged():
        trainer.start("bad", **asked)
        told = trainer.ended()
        assert told["state"] == "failed" and words in told["error"]


@pytest.fixture
def other(webui, trainer):
    """A second checkpoint, with the weights of the first: its title. It goes again, and the first one is loaded."""
    folder = webui.data / "models" / "Stable-diffusion"
    own = [path for path in folder.iterdir() if path.is_file()]
    copies = [folder / f"other{path.suffix}" for path in own]
    for path, copy in zip(own, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    webui.call("sdapi/v1/refresh-checkpoints", {})
    yield "other"
    trainer.inspect(f"switch?title={own[0].stem}")
    for copy in copies:
        copy.unlink()
    webui.call("sdapi/v1/refresh-checkpoints", {})


def test_a_checkpoint_switched_meanwhile_is_told(webui, trainer, first, other):
    own = webui.txt2img(**trainer.PLAIN).picture
    trainer.start("switched", LONG)
    trainer.until(trainer.trains)
    assert trainer.inspect(f"switch?title={other}") == {"loaded": other}
    told = trainer.ended()
    words = r"another checkpoint was loaded in place of|was unloaded while it was trained"  # reForge unloads it first
    assert told["state"] == "failed" and re.search(words, told["error"])
    assert np.array_equal(webui.txt2img(**trainer.PLAIN).picture, own)  # the host lives, and its model works


@pytest.mark.share
def test_without_a_checkpoint_it_says_so(bare):
    _, answer, samplers = bare
    assert re.match(r"400.*no checkpoint", answer, re.DOTALL)
    assert "ADD 1-step" in samplers
