"""Hosts' transformers by their rows: where the picture stands, what is tapped, which layers get a LoRA."""

import pytest
import torch
from torch import nn
from turbodistill.core.denoiser import Cond
from turbodistill.core.features import default_taps
from turbodistill.core.gradient_checkpointing import blocks
from turbodistill.core.layouts import LAYOUTS, layout_of
from turbodistill.core.lora import matching_layers

TEXT, PICTURE = 5, 24  # tokens, of latents of 8 x 12


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(4, 12), nn.Linear(4, 4)


def network(kind, **depths):
    """A network of a class of this name, with lists of so many blocks."""
    made = type(kind, (nn.Module,), {})()
    for name, depth in depths.items():
        made.add_module(name, nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(depth)))
    setattr(made, LAYOUTS[kind].patch, 2)
    return made


def tokens(count, first):
    """(1, count, 1) numbered from `first`."""
    return torch.arange(first, first + count).float().view(1, -1, 1)


def sequence(kind, name, multiple=1):
    """What a block of a kind puts out, where the picture's tokens have the numbers from 100; and its network."""
    made, place = network(kind, **{name: 1}), LAYOUTS[kind].blocks[name]
    if place.multiple:
        setattr(made, place.multiple, multiple)
    fill = torch.zeros(1, -PICTURE % multiple, 1)
    text, picture = tokens(TEXT, 0), tokens(PICTURE, 100)
    if name in ("single_blocks", "layers", "single_stream_blocks"):
        parts = [picture, text] if place.first else [text, torch.cat([picture, fill], 1)]
        return made, torch.cat(parts, 1)
    if name == "blocks":
        return made, picture.unflatten(1, (1, 4, 6))
    return made, (text, picture) if place.part == -1 else (picture, text)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, row in LAYOUTS.items() for name in row.blocks])
@pytest.mark.parametrize("multiple", [1, 32])
def test_the_picture_s_tokens_are_found(kind, name, multiple):
    made, output = sequence(kind, name, multiple if LAYOUTS[kind].blocks[name].multiple else 1)
    found = layout_of(made).picture(made, f"{name}.0", output, torch.zeros(1, 16, 8, 12))
    assert torch.equal(found, tokens(PICTURE, 100))


def test_an_odd_latent_s_tokens_are_counted_rounded_up():
    made = network("Flux", double_blocks=1, single_blocks=1)
    found = layout_of(made).picture(made, "single_blocks.0", tokens(TEXT + 12, 0), torch.zeros(1, 16, 5, 7))
    assert torch.equal(found, tokens(12, TEXT))


def test_blocks_of_all_kinds_are_tapped_where_the_first_are_few():
    assert default_taps(network("Flux", double_blocks=2, single_blocks=4)) == ["double_blocks.0", "double_blocks.1"]
    few = default_taps(network("Flux", double_blocks=2, single_blocks=8))
    assert few == ["double_blocks.1", *(f"single_blocks.{i}" for i in (1, 3, 5, 7))]
    assert len(
        default_taps(network("HiDreamImageTransformer2DModel", double_stream_blocks=16, single_stream_blocks=32))
    )


def test_what_no_pass_runs_gets_no_lora():
    made = network("Anima", blocks=1)
    made.llm_adapter = nn.ModuleDict({"blocks": nn.ModuleList([Attention()])})
    assert list(matching_layers(made, "all")) == ["blocks.0.attn.qkv", "blocks.0.attn.mlp"]


def test_a_router_is_no_layer_to_adapt():
    """Its weight chooses an expert, and it puts out no tokens."""
    router = nn.Module()
    router.weight = nn.Parameter(torch.zeros(4, 8))
    assert list(matching_layers(nn.ModuleDict({"gate": router, "expert": nn.Linear(8, 8)}), "all")) == ["expert"]


def test_streams_are_blocks_to_compute_again():
    made = network("HiDreamImageTransformer2DModel", double_stream_blocks=2, single_stream_blocks=1)
    assert list(blocks(made)) == ["double_stream_blocks.0", "double_stream_blocks.1", "single_stream_blocks.0"]


# --- texts of different lengths ---


def cond_of(*lengths, extra=()):
    """Rows of so many tokens, each with its number in the context and, one more, in `extra`, as one batch."""
    return Cond.cat(
        [
            Cond(
                torch.full((1, n, 2), float(n)), extra={name: torch.full((1, 3, n + 1, 2), float(n)) for name in extra}
            ).measured(["context", *extra])
            for n in lengths
        ]
    )


def test_filled_up_texts_stay_as_long_as_they_are():
    cond = cond_of(3, 5, extra=["deep"])
    assert cond.context.shape == (2, 5, 2) and cond.extra["deep"].shape == (2, 3, 6, 2)
    assert cond.lengths["context"].tolist() == [3, 5] and cond.lengths["deep"].tolist() == [4, 6]
    assert torch.equal(
        cond.rows(slice(0, 1)).cut({"context": 3, "deep": 4}).extra["deep"], torch.full((1, 3, 4, 2), 3.0)
    )
    assert torch.equal(cond.summary, torch.tensor([[3.0, 3.0], [5.0, 5.0]]))


def test_a_whole_batch_joins_one_of_lengths():
    both = Cond.cat([cond_of(3, 5), Cond(torch.full((2, 4, 2), 4.0)), cond_of(7)])
    assert both.lengths["context"].tolist() == [3, 5, 4, 4, 7] and both.context.shape[1] == 7
    assert not both.context[2, 4:].any()


@pytest.mark.parametrize("lengths", [(3, 5, 3, 4), (5, 5)])
def test_rows_of_a_length_go_together_and_come_back_in_order(lengths):
    from turbodistill.core.denoiser import by_length

    seen = []

    def run(x, sigma, cond):
        assert not cond.lengths and (cond.context == cond.context.shape[1]).all()
        seen.append(len(x))
        return [x * 10 + cond.context.shape[1], sigma]

    x, sigma = torch.arange(len(lengths)).float(), torch.rand(len(lengths))
    found, levels = by_length(run, x, sigma, cond_of(*lengths))
    assert found.tolist() == [10 * k + n for k, n in enumerate(lengths)] and torch.equal(levels, sigma)
    assert len(seen) == len(set(lengths))
