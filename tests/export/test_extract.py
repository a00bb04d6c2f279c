"""A LoRA out of a full student: exact where the change has that rank, else the nearest, and its error told."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from turbodistill.core.card import read_card
from turbodistill.core.low_rank import nearest
from turbodistill.core.student import FULL_PREFIX
from turbodistill.generate.export import extract
from turbodistill.generate.export.extract import Errors


@pytest.fixture(scope="module")
def full(make, tmp_path_factory):
    return make("sd1").student(tmp_path_factory.mktemp("full") / "full.safetensors", torch.float32, full=True)


def low_rank(make, folder, rank):
    """A full student whose layers changed by matrices of a rank, and whose biases and norms did not."""
    base = make("sd1")
    tensors = load_file(base.student(folder / "full.safetensors", torch.float32, full=True))
    before = {k: v for k, v in zip(tensors, tensors.values(), strict=True)}
    from turbodistill.core.naming import to_single_file

    own = base.denoiser.backbone.state_dict()
    table = {FULL_PREFIX + v: own[k] for k, v in to_single_file(own).items()}
    for name in before:
        weight = table[name].clone()
        if weight.ndim > 1:
            flat = weight.flatten(1)
            change = torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1]) / flat.shape[1]
            weight = weight + change.reshape(weight.shape)
        tensors[name] = weight
    save_file(tensors, folder / "full.safetensors", base.card(kind="full", rank=0, alpha=0.0).to_metadata())
    return folder / "full.safetensors"


def test_a_change_of_that_rank_is_extracted_exactly(kit, make, tmp_path):
    base, student = make("sd1"), low_rank(make, tmp_path, 3)
    made = kit.export(student, "lora", tmp_path / "lora.safetensors", base=base.folder, rank=3, dtype="float32")
    assert kit.gap(base.picture(tmp_path / "lora.safetensors"), base.picture(student)) < 1e-3
    assert made.card.training["extraction_error"] < 1e-3


def test_the_card_says_how_it_was_made_and_the_report_what_is_lost(kit, make, full, tmp_path):
    made = kit.export(full, "lora", tmp_path / "lora.safetensors", base=make("sd1").folder, rank=4)
    card = read_card(tmp_path / "lora.safetensors")
    assert (card.kind, card.rank, card.alpha, card.targets) == ("lora", 4, 4.0, "all")
    assert card.method.endswith("a LoRA extracted from the full student by SVD")
    assert card.training["extracted_rank"] == 4 and 0.3 < card.training["extraction_error"] < 1
    words = "\n".join(made.report)
    for kind in ("attention", "feed-forward", "convolutions", "projections and embeddings", extract.LEFT_OUT, "all"):
        assert f"\n{kind} " in words
    assert (
        f"{extract.LEFT_OUT}  1.000" in words and f"{card.training['extraction_error']:.3f}" in words.splitlines()[-1]
    )


def test_the_error_is_that_of_the_whole_svd(kit, make, full, tmp_path):
    """By the singular values that a plain SVD of each layer leaves out, and all of biases and norms."""
    base, rank = make("sd1"), 4
    made = kit.export(full, "lora", tmp_path / "lora.safetensors", base=base.folder, rank=rank, dtype="float32")
    from turbodistill.core.naming import to_single_file

    own, tensors = base.denoiser.backbone.state_dict(), load_file(full)
    lost = changed = 0.0
    for name, single in to_single_file(own).items():
        change = tensors[FULL_PREFIX + single] - own[name]
        changed += float(change.square().sum())
        values = torch.linalg.svdvals(change.flatten(1)) if change.ndim > 1 else change
        lost += float((values[rank:] if change.ndim > 1 else values).square().sum())
    assert made.card.training["extraction_error"] == pytest.approx((lost / changed) ** 0.5, abs=2e-4)


def test_more_rank_is_nearer(kit, make, full, tmp_path):
    errors = []
    for rank in (1, 8, 32):
        out = tmp_path / f"{rank}.safetensors"
        errors.append(
            kit.export(full, "lora", out, base=make("sd1").folder, rank=rank).card.training["extraction_error"]
        )
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", [(700, 900), (600, 64, 3, 3)])
def test_a_large_layer_s_randomised_svd_is_as_good_as_the_whole(shape):
    torch.manual_seed(0)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    values = 0.9 ** torch.arange(min(rows, columns))  # as trained changes have them: few large, many small
    u, _ = torch.linalg.qr(torch.randn(rows, len(values)))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values)))
    matrix = u @ torch.diag(values) @ v.T
    layer = nearest(matrix.reshape(shape), 16)
    assert layer.down.shape == (16, *shape[1:]) and layer.up.shape[:2] == (rows, 16)
    error = float((matrix.reshape(shape) - layer.delta()).norm())
    assert error < 1.001 * float(values[16:].norm())
    assert torch.equal(nearest(matrix.reshape(shape), 16).up, layer.up)


def test_both_halves_are_equally_large():
    layer = nearest(1e-6 * torch.randn(20, 30), 4)
    assert float(layer.up.norm()) == pytest.approx(float(layer.down.norm()), rel=1e-4)


def test_a_layer_that_did_not_change_has_a_lora_of_zeros():
    layer, errors = nearest(torch.zeros(8, 8), 2), Errors()
    errors.add("attention", 0.0, 0.0)
    assert not layer.delta().any() and errors.relative() == {"attention": 0.0, "all": 0.0}
