"""A frozen decoder with gradients, and copies of what a host owns."""

import pytest
import torch
from torch import nn
from turbodistill.core.decoder import ENCODES, Decoder, decoded_at_once, frozen_copy, has_blocks


class Autoencoder(nn.Module):
    """The names of a host's."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def decode(self, z):
        return self.decoder(z) * self.scale


def test_a_copy_is_ordinary_frozen_and_without_the_encoder():
    with torch.inference_mode():
        theirs = Autoencoder()
    made = frozen_copy(theirs, torch.device("cpu"), without=ENCODES)
    assert made.encoder is None and theirs.encoder is not None
    assert not any(p.requires_grad or p.is_inference() for p in (*made.parameters(), *made.buffers()))
    assert all(p.is_inference() for p in theirs.parameters())
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    made.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(made.decode(z), theirs.decode(z))


@pytest.mark.parametrize(
    ("own", "found"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]
)
def test_half_precision_without_room_for_gradients_becomes_float32(own, found):
    made = frozen_copy(Autoencoder().to(own), torch.device("cpu"))
    assert {p.dtype for p in made.parameters()} == {found}


class Wrapped(nn.Module):
    """As hosts write them, with a `train` of their own."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Conv2d(4, 3, 1)
        self.train = lambda mode=True: mode

    @torch.no_grad()
    @torch.inference_mode()
    def decode(self, z):
        return self.decoder(z)


def test_what_takes_gradients_away_is_taken_away():
    theirs = Wrapped()
    made = frozen_copy(theirs, torch.device("cpu"))
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    made.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0 and not any(m.training for m in made.modules())
    assert not theirs.decode(z).requires_grad
    with torch.no_grad():
        assert torch.equal(made.decode(z), theirs.decode(z))


def test_a_decoder_without_a_gradient_is_told():
    Decoder(8, Wrapped, lambda network, z: network.decoder(z)).check(4)
    with pytest.raises(ValueError, match=r"no gradient comes through the decoder of this host .Wrapped.: leave"):
        Decoder(8, Wrapped, lambda network, z: network.decode(z)).check(4)


def test_a_copy_leaves_the_original_s_tensors_alone():
    theirs = Autoencoder().half()
    before = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    made = frozen_copy(theirs, torch.device("cpu"))
    assert {name: p.data_ptr() for name, p in theirs.named_parameters()} == before
    assert all(p.requires_grad and p.dtype == torch.float16 for p in theirs.parameters())
    assert not {p.data_ptr() for p in made.parameters()} & set(before.values())


def test_large_pictures_are_decoded_one_by_one_and_the_network_is_made_once():
    made, seen = [], []

    def decode(_network, z):
        seen.append(len(z))
        return z[:, :3]

    decoder = Decoder(64, lambda: made.append(1) or nn.Identity(), decode)
    assert not made
    assert decoder(torch.rand(3, 4, 8, 8)).shape == (3, 3, 8, 8) and seen == [1, 1, 1]
    assert decoder.at_once(torch.rand(3, 4, 2, 2)) == decoded_at_once((128, 128)) == 16
    decoder(torch.rand(3, 4, 2, 2))
    assert seen[3:] == [3] and made == [1]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("decoder.up_blocks.0.resnets.1", True),  # diffusers'
        ("decoder.up.2.block.0", True),  # the hosts'
        ("decoder.mid.attn_1", True),
        ("decoder.upsamples.3", True),  # Wan's
        ("taesd_decoder.3", True),
        ("3", True),  # TAESD's decoder alone
        ("decoder.conv_in", False),
    ],
)
def test_blocks_of_decoders_are_known_by_name(name, known):
    root = nn.Module()
    here = root
    for part in name.split("."):
        here.add_module(part, nn.Module())
        here = getattr(here, part)
    assert has_blocks(root) == known
