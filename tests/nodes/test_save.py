"""Save Student: a LoRA or a whole checkpoint, where ComfyUI finds it, whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from turbodistill.core.card import read_card, read_student
from turbodistill.trainer.data.files import DataError


@pytest.fixture
def student_with(nodes, graph, toys, student_of, saved):
    """Rank -> what Distill gives for such a student of the graph's model."""

    def build(rank):
        student = student_of(toys.row(), rank)
        path = saved(student)
        tensors, card = read_student(path)
        model, warning = nodes.patcher.with_student(graph.model, tensors, card, 1.0, path.name)
        assert warning == ""
        return nodes.distill.Trained(path, card, model)

    return build


@pytest.fixture
def student(student_with):
    return student_with(2)


def made(model):
    """x0 of some noise, with the MODEL's patches and its own reading of the output."""
    with model.loaded() as network, torch.no_grad():
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        return network.apply_model(14 * noise, torch.tensor([14.0, 14.0]), torch.ones(2, 3, 6))


def test_a_lora_is_found_by_load_student(nodes, graph, student, places):
    saved = graph.save(student)
    assert saved.args == ("loras/my-turbo.safetensors",)
    path = places.loras / "my-turbo.safetensors"
    assert path.read_bytes() == student.path.read_bytes()
    assert saved.ui.value == f"saved {path}\n{student.card.in_words()}"
    again, words = nodes.load.LoadStudent.run(model=graph.model, student=saved[0], strength=1.0).args
    assert words == student.card.in_words()  # no warning
    assert torch.equal(made(again), made(student.model)) and not torch.equal(made(again), made(graph.model))


def test_a_full_copy_goes_to_the_diffusion_models(nodes, graph, student_with):
    student = student_with(0)
    assert graph.save(student).args == ("diffusion_models/my-turbo.safetensors",)
    again, words = nodes.load.LoadStudent.run(
        model=graph.model, student="diffusion_models/my-turbo.safetensors", strength=1.0
    ).args
    assert words == student.card.in_words() and torch.equal(made(again), made(student.model))


def test_a_whole_checkpoint_has_it_merged_in(nodes, graph, student, places):
    saved = graph.save(student, save_as=nodes.distill.SaveStudent.MERGED, clip=graph.clip, vae=graph.vae)
    assert saved.args == ("checkpoints/my-turbo.safetensors",)
    path = places.checkpoints / "my-turbo.safetensors"
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    parts = {name.partition(".")[0] for name in names}
    assert parts == {"model", "cond_stage_model", "first_stage_model"}
    card = read_card(path)
    assert (card.kind, card.rank, card.base_hash) == ("full", 0, student.card.base_hash)
    assert card.timesteps == student.card.timesteps and card.prediction == student.card.prediction
    # It is told how it is sampled by itself, and on its base it makes the same.
    assert nodes.patcher.sampling_by_files([path.name], graph.model) == nodes.patcher.of_card(card)
    for others in (["lightning_bolt_style.safetensors", path.name], [path.name, "sd_turbo.safetensors"]):
        assert nodes.patcher.sampling_by_files(others, graph.model) == nodes.patcher.of_card(
            card
        )  # a card counts before every name
    again, _ = nodes.load.LoadStudent.run(model=graph.model, student=saved[0], strength=1.0).args
    assert torch.allclose(made(again), made(student.model), atol=1e-5)
    assert [p.name for p in places.checkpoints.iterdir()] == ["my-turbo.safetensors"]


def test_a_whole_checkpoint_may_be_the_network_alone(nodes, graph, student, places):
    graph.save(student, save_as=nodes.distill.SaveStudent.MERGED)
    with safe_open(places.checkpoints / "my-turbo.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"model"}  # noqa: SIM118


def test_a_file_that_is_there_stays_and_the_new_one_gets_a_number(graph, student, places):
    names = ["fox", "fox", "fox.safetensors", " fox "]
    told = [graph.save(student, name)[0] for name in names]
    assert told == [f"loras/{name}.safetensors" for name in ("fox", "fox-2", "fox-3", "fox-4")]
    assert sorted(p.name for p in places.loras.iterdir()) == [f"fox{n}.safetensors" for n in ("-2", "-3", "-4", "")]


def test_a_subfolder_is_made_and_told(nodes, graph, student, places):
    told = [graph.save(student, "mine/of 2026/v1.5")[0] for _ in range(2)]
    assert told == ["loras/mine/of 2026/v1.5.safetensors", "loras/mine/of 2026/v1.5-2.safetensors"]
    for name in told:
        assert nodes.load.LoadStudent.validate_inputs(student=name) is True


@pytest.mark.parametrize("name", ["", "  ", ".safetensors", "../fox", "a/../../fox", "/outside/fox", "mine/", ".."])
def test_a_name_that_is_none_or_leads_out_of_the_folder_is_refused(graph, student, places, name):
    beside = sorted(places.loras.parent.rglob("*"))
    with pytest.raises(ValueError, match="give one that stays in models/loras, with / for subfolders"):
        graph.save(student, name)
    assert sorted(places.loras.parent.rglob("*")) == beside


def test_a_folder_s_list_is_made_anew(comfyui, graph, student):
    listed = comfyui.server.filename_list_cache
    listed.update(loras=["old"], checkpoints=["old"])
    graph.save(student)
    assert listed == {"checkpoints": ["old"]}
    graph.save(student, save_as=graph.nodes.distill.SaveStudent.MERGED)
    assert listed == {}


def unwritable(tmp_path):
    """A place where a folder cannot be: root may write to any that is one."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "loras"


def test_a_folder_that_cannot_be_written_to_is_passed_over(comfyui, graph, student, places, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(comfyui.server, "MORE", {"loras": [unwritable(tmp_path), tmp_path / "not there", other]})
    assert graph.save(student).ui.value.startswith(f"saved {other / 'my-turbo.safetensors'}\n")
    assert not (tmp_path / "not there").exists()  # a disk that is not connected, maybe
    monkeypatch.setattr(comfyui.server, "MORE", {})
    assert graph.save(student).ui.value.startswith(f"saved {places.loras / 'my-turbo.safetensors'}\n")


def test_no_folder_that_can_be_written_to(comfyui, graph, student, tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui.server, "FOLDERS", {"loras": unwritable(tmp_path)})
    with pytest.raises(PermissionError, match=r"no file can be made in .*file/loras: allow it, or name another folder"):
        graph.save(student)


def test_a_file_that_has_gone_is_saved_again(nodes, graph, student, places):
    """ComfyUI runs a node again when its fingerprint is another."""
    seen = []
    for _ in range(2):
        for _ in range(2):  # before it runs, and once more when it need not
            seen.append(nodes.distill.SaveStudent.fingerprint_inputs(name="again", save_as="the student (LoRA)"))
            path = places.loras / "again.safetensors"
            if not path.exists():
                graph.save(student, "again")
        path.unlink()
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_a_student_whose_run_was_deleted_is_told(graph, student, places):
    """ComfyUI keeps Distill's result: the file may have gone long since."""
    student.path.unlink()
    with pytest.raises(
        DataError, match=r"student.safetensors cannot be read \(No such file.*put it back, or let Distill run again"
    ):
        graph.save(student)
    assert not list(places.loras.iterdir())


@pytest.mark.parametrize("way", ["LORA", "MERGED"])
def test_a_full_disk_leaves_nothing_half(nodes, graph, student, places, monkeypatch, way):
    def full(path, *_told, **_more):
        Path(path).touch()
        with Path(path).open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(nodes.save.comfy.sd, "save_checkpoint", full)
        with pytest.raises(
            OSError, match=r"cannot write .*my-turbo.safetensors .*No space left on device.*: free some"
        ):
            graph.save(student, save_as=getattr(nodes.distill.SaveStudent, way))
    assert [p for p in places.loras.parent.rglob("*") if p.is_file()] == []
    assert graph.save(student)[0] == "loras/my-turbo.safetensors"


def test_packed_weights_are_not_written_as_a_checkpoint(nodes, graph, student, monkeypatch):
    """Those of GGUF files, which ComfyUI lists without their numbers."""
    network = type(student.model.model)
    state_dict = network.state_dict
    monkeypatch.setattr(network, "state_dict", lambda self: {k: v.to("meta") for k, v in state_dict(self).items()})
    with pytest.raises(ValueError, match="save the student as a LoRA, or load the model from a file that is not"):
        graph.save(student, save_as=nodes.distill.SaveStudent.MERGED, clip=graph.clip, vae=graph.vae)
