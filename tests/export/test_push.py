"""`turbodistill push` against a stand-in of the hub: what arrives, the page, and clear words for what goes wrong."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from turbodistill.app import cli
from turbodistill.core.card import read_card
from turbodistill.core.schedule import trailing_timesteps
from turbodistill.generate.hub import push
from turbodistill.generate.hub.model_card import Page, readme

HERE = Path(__file__).parent
TOKEN = "hf_" + "s3cret" * 5
# The commands of one process: huggingface_hub reads the hub's address when it is imported.
SCRIPT = """
import contextlib, io, json, sys
from turbodistill.app import cli
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("turbodistill_stand_in_hub", HERE / "hub.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    with module.serve() as server:
        yield server


@pytest.fixture
def base(make):
    return make("sd1")


@pytest.fixture
def run_folder(base, tmp_path):
    """A run's folder with a student and previews."""
    training = {"updates": 500, "lr": 1e-4, "note": "a | b\nc"}
    folder = tmp_path / "run"
    (folder / "previews").mkdir(parents=True)
    for number, colour in ((1, "red"), (20, "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "previews" / f"{number:07d}.png")
    return base.student(folder / "fox.safetensors", training=training, metrics={"KID": 1.2345678})


def commands(url, *lists, **environment):
    """Each command's status, output and errors, in one process of its own that knows the hub by this address."""
    told = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    told |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    environment = {k: v for k, v in (os.environ | told).items() if v is not None}
    asked = json.dumps([["push", *map(str, given)] for given in lists])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=asked, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def front(text):
    """The front matter of a page, and the rest."""
    import yaml

    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_everything_arrives_with_its_page(hub, run_folder, tmp_path):
    common = ["--license", "openrail++"]
    model = ["--base-model", "someone/base-model"]
    (tmp_path / "mine.webp").write_bytes((run_folder.parent / "previews" / "0000001.png").read_bytes())
    done = commands(
        hub.url,
        [run_folder, "me/fox", *common, *model],
        [run_folder, "me/fox", *common, "--revision", "half", "--private", "--grid", tmp_path / "mine.webp"],
        [run_folder, "me/fox", *common, "--create-pr"],
        [run_folder, "me/fox", *common, "--token", "hf_another"],
    )
    assert [status for status, _, _ in done] == [0] * 4, done
    assert done[0][1].splitlines()[-1] == f"{hub.url}/me/fox/commit/{'a' * 40}"
    assert done[2][1].splitlines()[-1] == f"{hub.url}/me/fox/discussions/1"
    names = {path for repo, branch, path in hub.files if (repo, branch) == ("me/fox", "main")}
    assert names == {"README.md", "fox.safetensors", "grid.png", "pytorch_lora_weights.safetensors"}
    assert hub.files["me/fox", "main", "fox.safetensors"] == run_folder.read_bytes()
    assert hub.files["me/fox", "main", "grid.png"] == (run_folder.parent / "previews" / "0000020.png").read_bytes()
    assert ("me/fox", "half", "grid.webp") in hub.files and hub.branches == ["half"]
    assert [told.get("visibility") or told.get("private") for told in hub.created][:2] in (
        [None, "private"],
        [None, True],
    )
    assert len(hub.created) == 3 and "create_pr=1" in hub.commits[2]["asked"]
    assert hub.tokens == {f"Bearer {TOKEN}", "Bearer hf_another"}
    head, body = front(hub.files["me/fox", "half", "README.md"].decode())
    assert head["license"] == "openrail++" and head["pipeline_tag"] == "text-to-image" and "base_model" not in head
    assert "![Teacher and student from the same noise](grid.webp)" in body
    (tmp_path / "peft.safetensors").write_bytes(hub.files["me/fox", "main", "pytorch_lora_weights.safetensors"])
    assert read_card(tmp_path / "peft.safetensors").base_model == "tiny-sd1"


def test_what_goes_wrong_is_told_in_words(hub, run_folder, tmp_path):
    common = ["--license", "mit"]
    asked = {
        ("nobody/fox", *common): "the hub does not accept the token for nobody/fox (401): log in with `hf auth login`",
        ("stranger/fox", *common): "the token may not write to stranger/fox (403): give one with the role write",
        ("missing/fox", *common, "--create-pr"): "missing/fox is not on the hub (404): check the name",
        ("broken/fox", *common): "the hub refused broken/fox (500",
        ("me/fox", *common, "--create-pr", "--revision", "x"): "--create-pr goes to the main branch",
        ("fox", *common): "repository is 'fox': give owner/name",
        ("me/f--x", *common): "repository is 'me/f--x': give owner/name",
        ("me/fox/../x", *common): "give owner/name",
        ("me/fox", "--license", "do what you want"): "license is 'do what you want': give the hub's short name",
        ("me/fox", *common, "--base-model", "C:/models/x y"): "--base-model is 'C:/models/x y': give owner/name",
        ("me/fox", *common, "--grid", tmp_path / "no.png"): "no.png does not exist",
        ("me/fox", *common, "--grid", run_folder): "give a picture",
        ("me/fox", *common, "--out", tmp_path / "x"): "--out belongs to --dry-run",
    }
    before = len(hub.commits)
    done = commands(hub.url, *([run_folder, *given] for given in asked))
    for (status, _, err), told in zip(done, asked.values(), strict=True):
        last = err.splitlines()[-1]
        assert status == 1 and last.startswith("turbodistill: ") and told in last, err
    assert len(hub.commits) == before


def test_a_hub_that_is_not_there_is_told(run_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and not listened to
        ((status, _, err),) = commands(url, [run_folder, "me/fox", "--license", "mit"])
    assert status == 1 and f"the hub at {url} cannot be reached (" in err and "check the network" in err


def test_offline_and_without_a_token_nothing_is_tried(hub, run_folder, tmp_path):
    given, before = [run_folder, "me/fox", "--license", "mit"], len(hub.created)
    ((status, _, err),) = commands(hub.url, given, HF_HUB_OFFLINE="1")
    assert status == 1 and "HF_HUB_OFFLINE is set, so nothing is uploaded: unset it" in err
    ((status, _, err),) = commands(hub.url, given, HF_TOKEN=None, HF_HOME=str(tmp_path / "home"))
    assert status == 1 and "nobody is logged in on the hub: log in with `hf auth login`" in err
    assert len(hub.created) == before


def test_a_dry_run_prints_and_writes_what_would_be_uploaded(run_folder, tmp_path, capsys):
    given = ["push", run_folder, "me/fox", "--license", "MIT", "--dry-run", "--out", tmp_path / "dry"]
    assert cli.main(list(map(str, given))) == 0
    printed, remarks = capsys.readouterr()
    assert remarks == ""
    files = sorted(p.name for p in (tmp_path / "dry").iterdir())
    assert files == ["README.md", "fox.safetensors", "grid.png", "pytorch_lora_weights.safetensors"]
    assert all(f"MB  {name}\n" in printed for name in files) and "nothing was uploaded" in printed
    assert front((tmp_path / "dry" / "README.md").read_text())[0]["license"] == "mit"
    assert cli.main(list(map(str, given))) == 1
    assert "is there already: give another folder by --out" in capsys.readouterr().err


# --- The page ---


def page_of(card, **changes):
    return Page(**({"repo": "me/fox", "card": card, "license": "mit", "base_model": "someone/base"} | changes))


def test_the_page_says_what_it_is_and_how_it_was_made(run_folder):
    head, body = front(readme(page_of(read_card(run_folder), file="fox.safetensors", lora=True)))
    assert head["base_model"] == "someone/base" and head["base_model_relation"] == "adapter"
    assert head["library_name"] == "diffusers" and {"lora", "one-step", "stable-diffusion"} <= set(head["tags"])
    for words in (
        "makes a picture of 64 x 64 in one step: a LoRA of rank 4",
        "| updates | 500 |", "| lr | 0.0001 |", "| note | a \\| b c |", "| KID | 1.235 |", "`models/loras`",
        "`<lora:fox:1>`", "sampler *ADD 1-step*", "scheduler `sgm_uniform`", "## Base model",
    ):  # fmt: skip
        assert words in body


def test_a_sampler_that_knows_nothing_of_it_is_named_only_where_it_can_do_it(base):
    for card in (base.card(prediction="x0"), base.card(timesteps=(399,))):
        body = readme(page_of(card, file="fox.safetensors", lora=True))
        assert "sgm_uniform" not in body and "SGM Uniform" not in body and "ADD 1-step" in body


def test_a_student_of_guidance_alone_is_for_any_sampler(base):
    card = base.card(timesteps=tuple(trailing_timesteps(16)), guidance_only=True, method="guidance distillation")
    head, body = front(readme(page_of(card, file="fox.safetensors", lora=True)))
    assert "guidance-distillation" in head["tags"] and "one-step" not in head["tags"]
    for words in (
        "that is sampled as its base, with any sampler, 16 steps or as many as you like, at half the cost: a LoRA of",
        "distilled by guidance distillation", "KSampler at CFG 1, with sampler, scheduler and steps as for the base",
        "`<lora:fox:1>` into the prompt. Sampler, schedule type and steps as for the base, CFG 1.",
        'pipe("a red fox", num_inference_steps=16, guidance_scale=0)',
    ):  # fmt: skip
        assert words in body, words
    for words in ("ADD 1-step", "One-Step Sample", "sgm_uniform", "EulerDiscreteScheduler", "in one step"):
        assert words not in body, words
    whole = readme(page_of(base.card(guidance_only=True, kind="full", rank=0), file="fox.safetensors", whole=True))
    assert "load it as any checkpoint: KSampler at CFG 1" in whole and "1 step," not in whole


def test_a_folder_s_page_speaks_of_a_full_model(kit, base, run_folder, tmp_path):
    kit.export(run_folder, "diffusers", tmp_path / "repo", base=base.folder)
    given = ["push", tmp_path / "repo", "me/fox", "--license", "mit", "--dry-run", "--out", tmp_path / "dry"]
    assert cli.main([*map(str, given)]) == 0
    head, body = front((tmp_path / "dry" / "README.md").read_text())
    assert "lora" not in head["tags"] and ": a full model, distilled by" in body


@pytest.mark.parametrize("way", ["lora", "whole", "folder"])
@pytest.mark.parametrize("changes", [{}, {"prediction": "x0"}, {"timesteps": (799,)}], ids=["eps", "x0", "799"])
def test_the_page_s_lines_of_python_make_the_student_s_picture(kit, base, peft, tmp_path, monkeypatch, way, changes):
    """As they stand there, but for the GPU, the precision, and files here in place of the hub's."""
    import diffusers
    import huggingface_hub

    student = base.student(tmp_path / "fox.safetensors", torch.float32, **changes)
    page = page_of(read_card(student), file="fox.safetensors", lora=True)
    repo = tmp_path / "repo"
    if way == "folder":
        kit.export(student, "diffusers", repo, base=base.folder, dtype="float32")
        page = page_of(read_card(student))
    elif way == "whole":
        repo.mkdir()
        kit.export(student, "merged", repo / "fox.safetensors", base=base.folder, dtype="float32")
        page = page_of(read_card(repo / "fox.safetensors"), file="fox.safetensors", whole=True)
    else:
        repo.mkdir()
        kit.export(student, "peft", repo / "pytorch_lora_weights.safetensors", dtype="float32")
    (code,) = re.findall(r"```python\n(.*?)```", readme(page), re.DOTALL)
    code = code.replace('.to("cuda")', "").replace("torch.float16", "torch.float32").replace("me/fox", str(repo))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(Path(repo) / name))
    if way == "whole":
        kind = diffusers.StableDiffusionPipeline
        offline = {"config": str(base.folder), "local_files_only": True, "feature_extractor": None}
        load = kind.from_single_file
        monkeypatch.setattr(kind, "from_single_file", lambda path, **more: load(path, **offline, **more))
    call = diffusers.StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        diffusers.StableDiffusionPipeline, "__call__",
        lambda self, prompt, **more: call(
            self, prompt_embeds=base.cond.context, latents=base.noise.clone(), output_type="latent", **more
        ),
    )  # fmt: skip
    named = {}
    exec(code.replace("someone/base", str(base.folder)), named)
    assert kit.gap(named["picture"], base.picture(student)[0]) < 1e-4


def test_a_folder_and_a_merged_file_are_uploaded_as_they_are(kit, base, tmp_path):
    student = base.student(tmp_path / "fox.safetensors")
    kit.export(student, "diffusers", tmp_path / "folder", base=base.folder)
    kit.export(student, "merged", tmp_path / "whole.safetensors", base=base.folder)
    with push.prepared(tmp_path / "folder", "me/fox", "mit") as upload:
        there = {p.relative_to(tmp_path / "folder").as_posix() for p in (tmp_path / "folder").rglob("*") if p.is_file()}
        assert set(upload.files) == there | {"README.md"}
        assert 'from_pretrained("me/fox"' in upload.files["README.md"].decode()
    with push.prepared(tmp_path / "whole.safetensors", "me/fox", "mit") as upload:
        assert set(upload.files) == {"whole.safetensors", "README.md"}
        assert "`models/checkpoints`" in upload.files["README.md"].decode()
    with (
        pytest.raises(ValueError, match="is no diffusers folder of a student"),
        push.prepared(tmp_path, "me/fox", "mit"),
    ):
        pass


def test_a_transformer_s_lora_goes_without_diffusers_form_unless_its_base_is_given(base, tmp_path, capsys):
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv." + part: torch.zeros(4, 4) for part in
               ("lora_down.weight", "lora_up.weight")}  # fmt: skip
    card = base.card(architecture="flux-1-dev", prediction="flow", base_prediction="flow")
    save_file(tensors, tmp_path / "flux.safetensors", card.to_metadata())
    with push.prepared(tmp_path / "flux.safetensors", "me/fox", "mit") as upload:
        assert set(upload.files) == {"flux.safetensors", "README.md"}
        head, body = front(upload.files["README.md"].decode())
        assert "### diffusers" not in body and "library_name" not in head
    given = ["push", tmp_path / "flux.safetensors", "me/fox", "--license", "mit", "--dry-run", "--out", tmp_path / "x"]
    assert cli.main(list(map(str, given))) == 0
    assert "goes without diffusers' form of it, pytorch_lora_weights.safetensors: give" in capsys.readouterr().err
    assert load_file(tmp_path / "flux.safetensors").keys() == tensors.keys()
