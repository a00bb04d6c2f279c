"""The background job: from a request to a student in the Lora folder, one at a time, ended as asked."""

import json
import threading
import time

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from turbodistill.core.card import read_card
from turbodistill.page import job, pictures, runs
from turbodistill.page.request import Request
from turbodistill.trainer.config import Config, ConfigError
from turbodistill.trainer.data.files import DataError
from turbodistill.trainer.data.lock import LOCK, locked
from turbodistill.trainer.data.pairs import load_pairs
from turbodistill.trainer.run.training import BEST

PATIENCE = 60


def ask(toy, **changes):
    """A request for a quick distillation; settings in `changes` win."""
    settings = changes.pop("settings", {})
    return Request(**{"prompts": toy.PROMPTS, "settings": toy.QUICK | settings} | changes)


def finish(begun):
    """The job's last snapshot."""
    begun.wait(PATIENCE)
    assert not begun.working
    return begun.snapshot()


def go(toy, backend, **changes):
    return finish(job.start(backend, ask(toy, **changes)))


def until(true, what):
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < PATIENCE, what
        time.sleep(0.01)


# --- to its end ---


def test_a_card_s_memory_chooses_what_the_form_does_not_set(toy, backend):
    backend.settings = backend.settings | {"gradient_checkpointing": True}  # where a WebUI's form begins
    ticked = {"gradient_checkpointing": True}
    told = go(toy, backend, settings={"vram": 12.0} | ticked)
    assert (told["state"], told["error"]) == ("done", "")
    assert told["memory"].startswith("for a card of 12.0 GB: gradient_checkpointing false; training takes about")
    told = go(toy, backend, name="api", settings={"vram": 12.0})  # which leaves it out
    assert told["memory"].startswith("for a card of 12.0 GB: gradient_checkpointing false; training")
    told = go(toy, backend, name="mine", settings={"vram": 12.0, "batch_size": 4})
    assert "set by hand, and kept: batch_size; training" in told["memory"]
    told = go(toy, backend, kind="estimate", settings={"vram": 0.9} | ticked)
    assert told["result"].startswith("for a card of 0.9 GB: ") and "No settings make it fit" in told["result"]


def test_a_student_lands_in_the_lora_folder(toy, backend):
    told = go(toy, backend)
    assert (told["state"], told["error"], told["done"], told["total"]) == ("done", "", 4, 4)
    path = backend.students_folder() / "my-turbo.safetensors"
    assert path.read_bytes() == (backend.runs_folder() / "my-turbo" / BEST).read_bytes()
    assert backend.told == [path] and "<lora:my-turbo:1>" in told["result"]
    assert read_card(path).base_hash == backend.before[0]
    assert toy.kit.same(toy.kit.weights(backend.host.denoiser.backbone), backend.before[1])
    assert all(not m._forward_pre_hooks for m in backend.host.denoiser.backbone.blocks)
    assert told["checkpoint"] == "toy.safetensors" and (told["width"], told["height"]) == (32, 32)


def test_its_snapshot_is_json_with_curves_and_pictures(toy, backend):
    told = json.loads(json.dumps(go(toy, backend)))
    assert told["history"]["update"] == [1, 2, 3, 4] and "regression" in told["history"]["losses"]
    assert [p["update"] for p in told["previews"]] == [0, 2, 4, 4]
    for preview in told["previews"]:
        assert len(preview["student"]) == len(preview["teacher"]) > 0
        assert all(p.startswith("data:image/png;base64,") for p in preview["student"])
    assert told["best"]["update"] in (2, 4) and told["memory"].startswith("training takes about")
    job_now = job.current()
    assert job_now.snapshot()["history"] == told["history"]


def test_pairs_that_were_made_are_taken(toy, backend):
    told = go(toy, backend, kind="pairs")
    (folder,) = (backend.runs_folder().parent / "pairs").iterdir()
    (file,) = folder.glob("pairs-*")
    made = file.stat().st_mtime_ns
    assert (told["state"], told["done"], len(told["pictures"])) == ("done", 8, 4) and str(folder) in told["result"]
    assert not backend.runs_folder().exists()
    assert go(toy, backend)["state"] == "done" and file.stat().st_mtime_ns == made


def test_memory_is_estimated_on_the_loaded_model(toy, backend):
    begun = job.start(backend, ask(toy, kind="estimate"))
    told = finish(begun)
    assert (
        told["state"] == "done"
        and told["result"] == begun.estimate.in_words()
        and begun.estimate.memory.activations > 0
    )
    assert not backend.runs_folder().exists()
    lora = backend.host.denoiser.backbone
    assert not any(m._forward_hooks for m in lora.modules())


def test_captions_are_the_prompts_where_none_are_given(toy, backend, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(toy.png(k))
        (folder / f"{k}.txt").write_text(f"thing {k}")
    begun = job.start(backend, ask(toy, prompts="", images=str(folder)))
    assert begun.prompts == [f"thing {k}" for k in range(4)] and begun.config.positives == "both"
    assert finish(begun)["state"] == "done"


def test_resolution_buckets_are_those_of_the_pictures_and_the_run_goes_on(toy, backend, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, size in enumerate([(60, 40), (90, 60), (50, 50), (60, 90)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"thing {k}")
    asked = {"images": str(folder), "settings": {"sizes": "buckets", "pairs": 12}}
    assert go(toy, backend, **asked, kind="pairs")["state"] == "done"
    made = sorted(p.name for p in (backend.folder / "outputs" / "pairs").glob("*/*"))
    assert made == ["24x40", "32x32", "40x24"]
    told = go(toy, backend, **asked)
    assert (told["state"], told["error"]) == ("done", "")
    assert read_card(backend.students_folder() / "my-turbo.safetensors").sizes == "24x40, 32x32, 40x24"
    further = {**asked, "settings": asked["settings"] | {"updates": 6}}
    assert go(toy, backend, **further)["done"] == 6  # the same form goes on


@pytest.mark.parametrize("name", ["my-turbo", "my-turbo.safetensors", ""])
def test_a_student_is_gone_on_from_by_its_name_or_path(toy, backend, tmp_path, name):
    go(toy, backend)
    first = backend.students_folder() / "my-turbo.safetensors"
    backend.readable = [tmp_path / "elsewhere"] if name else None  # its name is no path
    told = go(toy, backend, name="second", settings={"init_student": name or str(first)})
    assert told["state"] == "done"
    training = read_card(backend.students_folder() / "second.safetensors").training
    assert training["init_student"] == first.name and training["updates"] in (6, 8)  # those of both
    backend.readable = [tmp_path / "elsewhere"]
    with pytest.raises(DataError, match="outside the folders"):
        job.start(backend, ask(toy, name="third", settings={"init_student": "../outputs/runs/my-turbo/student"}))


def test_pictures_that_cannot_be_used_stop_it_or_are_told_beside_the_run(toy, backend, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(toy.png(k) if k else b"broken")
        (folder / f"{k}.txt").write_text(f"thing {k}")
    (folder / "notes.pdf").touch()
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        job.start(backend, ask(toy, images=str(folder)))
    told = go(toy, backend, images=str(folder), settings={"broken_pictures": "skip"})
    first, second = told["warnings"][:2]
    assert told["state"] == "done" and first.endswith("left out: 1 other files (.pdf)")
    assert second.startswith("3 pictures of ") and "1 pictures that cannot be read (picture " in second


def test_the_list_that_suits_is_chosen_told_and_kept(toy, backend, tmp_path):
    (tmp_path / "tags.txt").write_text("1girl\nsolo\n1boy\nno humans")
    backend.lists = {"auto": tmp_path / "tags.txt", "tags": tmp_path / "tags.txt"}
    backend.title = "animagine-xl.safetensors"
    begun = job.start(backend, ask(toy, prompts="", built_in="auto"))
    done = finish(begun)
    assert begun.prompts == ["1girl", "solo", "1boy", "no humans"]
    told = "prompts: the built-in list of tags, since the model's name says animagine"
    assert [told in words for words in done["warnings"]].count(True) == 1
    assert runs.asked(backend.runs_folder(), "my-turbo").built_in == "tags"  # as it goes on, whatever is loaded then


def test_wildcards_and_pictures_give_prompts(toy, backend, tmp_path):
    folder = backend.wildcards()[0]
    folder.mkdir()
    (folder / "colour.txt").write_text("red\nblue\n")
    assert job.Job(backend, ask(toy, prompts="a __colour__ fox")).prompts == ["a {red|blue} fox"]
    about = PngInfo()
    about.add_text("parameters", "an owl, <lora:x:1>\nNegative prompt: y")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about)
    begun = job.Job(backend, ask(toy, prompts="", prompt_file=str(tmp_path / "a.png")))
    assert begun.prompts == ["an owl"] and "1 prompts of 1 pictures" in begun.snapshot()["warnings"][0]
    backend.readable = [tmp_path / "allowed"]
    with pytest.raises(DataError, match="is outside the folders"):
        job.Job(backend, ask(toy, prompts="", prompt_file=str(tmp_path / "a.png")))


def test_choices_in_prompts_are_drawn(toy, backend, tmp_path):
    go(toy, backend, kind="pairs", prompts="a {red|blue} fox")
    (folder,) = (backend.runs_folder().parent / "pairs").iterdir()
    made = load_pairs(folder).prompts
    assert len(made) == 8 and set(made) == {"a red fox", "a blue fox"}


def test_a_full_copy_lies_beside_the_others_where_it_can_be_used(toy, backend):
    told = go(toy, backend, settings={"rank": 0})
    assert told["state"] == "done"
    assert read_card(backend.students_folder() / "my-turbo.safetensors").kind == "full"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0: give 1 or more in Toy"),
        ({"pixel_size": 64}, "pixel_size is 64: Toy cannot do this, leave it out or distil on the command line"),
    ],
)
def test_what_cannot_be_used_here_is_refused_before_anything_starts(toy, backend, settings, words):
    backend.limits = {"rank": {"low": 1}, "pixel_size": None}
    with pytest.raises(ConfigError, match=words):
        job.start(backend, ask(toy, settings=settings))
    assert not backend.runs_folder().exists()


def test_a_lora_of_somebody_else_is_never_written_over(toy, backend):
    theirs = backend.students_folder() / "my-turbo.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"somebody's")
    told = go(toy, backend)
    assert theirs.read_bytes() == b"somebody's" and "<lora:my-turbo-2:1>" in told["result"]
    go(toy, backend, settings={"updates": 6})  # longer: its own file is renewed
    assert sorted(p.name for p in theirs.parent.iterdir()) == ["my-turbo-2.safetensors", "my-turbo.safetensors"]
    assert read_card(theirs.with_name("my-turbo-2.safetensors")).training["updates"] in (2, 4, 6)


def test_a_model_that_is_one_step_already_is_told_so(toy, backend):
    backend.title = "sdxl_lightning_4step.safetensors"
    told = go(toy, backend)
    assert "SDXL-Lightning, which is distilled already" in told["warnings"][0]


# --- ended as asked ---


@pytest.fixture
def training(toy, backend):
    """A job that trains, held back in a pass."""
    begun = job.start(backend, ask(toy, settings={"updates": 1000, "evaluate_every": 0}))
    until(lambda: begun.monitor.running and begun.snapshot()["done"] > 2, "it does not train")
    yield begun
    if begun.working:
        begun.cancel()
        backend.gate.set()
        begun.wait(PATIENCE)


def test_cancel_is_within_a_pass_and_the_run_goes_on(toy, backend, training):
    backend.gate.clear()
    backend.entered.clear()
    assert backend.entered.wait(PATIENCE)
    training.cancel()
    assert training.snapshot()["cancelling"]
    passes = []
    handle = backend.host.denoiser.backbone.conv_out.register_forward_hook(lambda *_: passes.append(1))
    backend.gate.set()
    told = finish(training)
    handle.remove()
    assert passes in ([], [1])  # not one whole pass more than the one that was begun
    assert told["state"] == "cancelled" and not told["cancelling"]
    done = told["done"]
    again = finish(job.start(backend, ask(toy, settings={"updates": done + 2, "evaluate_every": 0})))
    assert again["state"] == "done" and again["done"] == done + 2
    assert again["history"]["update"] == list(range(1, done + 3))  # its curves from the beginning


def test_stop_keeps_the_best(toy, backend, training):
    training.stop()
    told = finish(training)
    assert told["state"] == "stopped" and told["done"] < 1000
    assert read_card(backend.students_folder() / "my-turbo.safetensors").training["updates"] == told["done"]


def test_a_preview_comes_when_it_is_asked_for(backend, training):
    before = len(training.snapshot()["previews"])
    training.preview()
    until(lambda: len(training.snapshot()["previews"]) > before, "no preview")


def test_what_is_asked_of_nothing_is_refused(toy, backend):
    done = job.start(backend, ask(toy))
    finish(done)
    for wish in (done.stop, done.preview, done.cancel, job.must_run):
        with pytest.raises(job.NothingRuns):
            wish()
    backend.gate.clear()
    pairs = job.start(backend, ask(toy, name="other"))
    assert backend.entered.wait(PATIENCE)
    for wish in (pairs.stop, pairs.preview):
        with pytest.raises(job.NoTraining, match="Cancel"):
            wish()
    pairs.cancel()
    backend.gate.set()
    assert finish(pairs)["state"] == "cancelled"


def test_it_waits_while_the_model_is_in_use_and_may_be_cancelled_then(toy, backend):
    with backend.lock:
        begun = job.start(backend, ask(toy))
        time.sleep(0.1)
        told = begun.snapshot()
        assert (told["state"], told["what"], told["total"]) == ("working", "", 0)
        begun.cancel()
    assert finish(begun)["state"] == "cancelled" and not backend.entered.is_set()


# --- one at a time ---


def test_the_second_is_told(toy, backend, training):
    with pytest.raises(
        job.Busy, match=r"runs already \(my-turbo, training \d+ of 1000(, .* left)?\): stop or cancel it"
    ):
        job.start(backend, ask(toy, name="other"))
    assert training.working and job.current() is training


def test_of_many_at_once_one_begins(toy, backend):
    backend.gate.clear()
    begun, refused = [], []

    def press():
        try:
            begun.append(job.start(backend, ask(toy)))
        except job.Busy as error:
            refused.append(error)

    threads = [threading.Thread(target=press) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.gate.set()
    assert len(begun) == 1 and len(refused) == 7 and finish(begun[0])["state"] == "done"


# --- what cannot be ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "../x"}, "name is '../x'"),
        ({"name": ""}, "name is ''"),
        ({"prompts": " \n# none\n"}, "there are no prompts"),
        ({"prompts": "", "prompt_file": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"prompts": "", "built_in": "poems"}, "no prompt list 'poems': known are words"),
        ({"images": "nowhere"}, "nowhere does not exist"),
        ({"settings": {"lr": -1.0}}, "lr is -1.0"),
        ({"settings": {"speed": 3}}, "there is no setting 'speed'"),
    ],
)
def test_mistakes_are_told_before_anything_begins(toy, backend, changes, told):
    with pytest.raises((ConfigError, DataError)) as caught:
        job.start(backend, ask(toy, **changes))
    assert told in str(caught.value) and job.current() is None and not (backend.folder / "outputs").exists()


def test_without_a_checkpoint_nothing_begins(toy, backend):
    backend.title = ""
    with pytest.raises(ConfigError, match="no checkpoint is loaded: choose one first"):
        job.start(backend, ask(toy))


def test_where_nothing_can_be_distilled_it_is_said_before_anything_begins(toy, backend, monkeypatch):
    monkeypatch.setattr(backend, "refusal", lambda: "this host cannot distil")
    with pytest.raises(ConfigError, match="this host cannot distil"):
        job.start(backend, ask(toy))
    assert job.current() is None and not (backend.folder / "outputs").exists()


def test_a_size_that_cannot_be_is_told(toy, backend):
    told = go(toy, backend, width=48)
    assert (told["state"], told["error"]) == ("failed", "48 x 32 pixels: the toy makes 32 x 32")


def test_an_unwritable_folder_is_told_and_the_next_one_works(toy, backend):
    (backend.folder / "outputs").write_text("a file where the folder should be")
    told = go(toy, backend)
    assert told["state"] == "failed" and "cannot write" in told["error"]
    (backend.folder / "outputs").unlink()
    assert go(toy, backend)["state"] == "done"


def test_a_student_that_cannot_be_put_there_is_kept(toy, backend):
    backend.students_folder().write_text("a file where the folder should be")
    told = go(toy, backend)
    kept = backend.runs_folder() / "my-turbo" / BEST
    assert told["state"] == "failed" and told["error"].endswith(f"the student is kept: {kept}") and kept.exists()


def test_out_of_memory_says_what_to_change(toy, backend):
    def full(*_):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = backend.host.denoiser.backbone.register_forward_pre_hook(full)
    told = go(toy, backend)
    handle.remove()
    assert told["state"] == "failed" and "out of memory while training" in told["error"] and "batch" in told["error"]
    backend.host.decode = raises(RuntimeError("CUDA out of memory"))
    assert "out of memory while showing pictures" in go(toy, backend, name="other")["error"]


def raises(error):
    def fail(*_):
        raise error

    return fail


def test_a_fault_of_the_host_fails_the_job_alone(toy, backend, caplog):
    backend.host.encode_text = raises(KeyError("token"))
    told = go(toy, backend)
    assert (told["state"], told["error"]) == ("failed", "KeyError: 'token'") and "my-turbo failed" in caplog.text


# --- it goes on ---


def test_other_settings_are_refused_at_once(toy, backend):
    go(toy, backend)
    with pytest.raises(ConfigError, match="rank was 2 and is 4"):
        job.start(backend, ask(toy, settings={"rank": 4}))
    assert go(toy, backend, settings={"updates": 5})["done"] == 5


def test_another_model_is_refused_before_pairs_are_made(toy, backend, tmp_path_factory):
    go(toy, backend)
    backend.host = toy.kit.conv_host(seed=1)
    told = go(toy, backend)
    assert told["state"] == "failed" and "was begun with toy.safetensors" in told["error"]
    assert len(list((backend.runs_folder().parent / "pairs").iterdir())) == 1


def test_runs_are_listed_with_how_they_ended(toy, backend):
    assert runs.listed(backend.runs_folder()) == []
    go(toy, backend, name="first")
    backend.host.encode_text, real = raises(ValueError("no words")), backend.host.encode_text
    go(toy, backend, name="second")
    backend.host.encode_text = real
    (backend.runs_folder() / "of another program").mkdir()
    second, first = runs.listed(backend.runs_folder())
    assert first.in_words() == "first: done, update 4 of 4"
    assert second.in_words() == "second: failed, no update yet" and second.record.error == "no words"
    folder = backend.runs_folder() / "first"
    runs.replace(runs.read_record(folder), state="working").write(folder)
    (folder / LOCK).touch()  # as a program that was killed leaves it
    states = {r.name: r.state for r in runs.listed(backend.runs_folder())}
    assert states["first"] == "broken off"
    with locked(folder):
        states = {r.name: r.state for r in runs.listed(backend.runs_folder())}
    assert states["first"] == "runs elsewhere"
    assert {r.name: r.state for r in runs.listed(backend.runs_folder(), "first")}["first"] == "working"


def test_a_run_goes_on_as_it_was_asked_for(toy, backend):
    go(toy, backend, name="first")
    asked = runs.asked(backend.runs_folder(), "first")
    assert asked.prompts == toy.PROMPTS and (asked.width, asked.height) == (32, 32)
    assert asked.config() == Config(**toy.QUICK) and set(asked.settings) == set(Config().to_dict())
    assert finish(job.start(backend, asked))["state"] == "done"
    for name in ("second", "../first"):
        with pytest.raises(ConfigError):
            runs.asked(backend.runs_folder(), name)


def test_a_run_that_another_program_has_is_refused_and_keeps_its_record(toy, backend):
    go(toy, backend)
    folder = backend.runs_folder() / "my-turbo"
    with locked(folder):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        told = go(toy, backend, settings={"updates": 6})
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert told["state"] == "failed" and "is in use by process" in told["error"]
    assert go(toy, backend, settings={"updates": 6})["state"] == "done"


def test_a_broken_record_is_no_run(toy, backend):
    folder = backend.runs_folder() / "first"
    for text in ("{", "{}", '{"request": {"name": 3}}', '{"request": {"settings": {"lr": -1}}, "checkpoint": ""}'):
        runs.write_whole(folder / runs.RECORD, text.encode())
        assert runs.read_record(folder) is None and runs.listed(backend.runs_folder()) == []


def test_what_is_asked_is_checked():
    assert Request.from_dict({"name": "x", "settings": {"lr": 1}}).config().lr == 1
    for values, told in (
        ({"nmae": "x"}, "unknown field 'nmae'"),
        ({"width": "64"}, "width is '64': give a whole number"),
        ({"settings": []}, "settings is []"),
        ({"kind": "train"}, "kind is 'train': use one of pairs, distill, estimate"),
    ):
        with pytest.raises(ConfigError) as caught:
            Request.from_dict(values)
        assert told in str(caught.value)


# --- pictures ---


def test_small_pictures_are_kept_without_loss(toy):
    values = torch.randint(0, 256, (2, 3, 5, 7)) / 255
    for url, picture in zip(pictures.data_urls(values), values, strict=True):
        assert torch.equal(toy.pixels(url), (picture * 255).round().byte())


def test_large_pictures_are_made_smaller(toy):
    url = pictures.data_url(torch.rand(3, 600, 1200))
    assert url.startswith("data:image/jpeg") and toy.pixels(url).shape == (3, 192, 384)
