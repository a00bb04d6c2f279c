"""Text encoders and autoencoder wait off the device in a training, come to work, and are back at its end."""

import pytest
import torch
from torch import nn
from turbodistill.trainer.pipeline.aside import Aside


class Placed(nn.Module):
    """A module that says it is on a device."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, dtype=torch.float16))
        self.places = [device]

    def parameters(self, recurse=True):
        device = self.places[-1]

        class On:
            pass

        on = On()
        on.device = torch.device(device)
        yield on

    def to(self, device):
        self.places.append(torch.device(device).type)
        return self


def test_modules_are_away_and_come_to_work():
    module = Placed()
    aside = Aside(lambda: [module])
    with aside.at_work():
        pass
    assert module.places == ["cuda"]  # it is at work all the time
    with pytest.raises(KeyError), aside.away():
        assert module.places[-1] == "cpu"
        with pytest.raises(ValueError, match="a pass"), aside.at_work():
            assert module.places[-1] == "cuda"
            raise ValueError("a pass")
        assert module.places[-1] == "cpu"
        raise KeyError
    assert module.places[-1] == "cuda"
    with aside.at_work():
        assert module.places[-1] == "cuda"


def test_on_a_cpu_nothing_moves():
    module = Placed("cpu")
    with Aside(lambda: [module]).away():
        pass
    assert module.places == ["cpu"]


def test_the_host_counts_them_and_sends_them_away(tiny_kit, name):
    model = tiny_kit.host(name)
    pipe = model.pipe
    encoders = [v for k, v in pipe.components.items() if k.startswith("text_encoder") and v is not None]

    def size(*modules):
        return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))

    assert model.beside == (size(*encoders), size(pipe.vae)) and min(model.beside) > 0
    moved = []
    for aside, what in ((model._encoders, "encoders"), (model._decoders, "autoencoder")):
        aside._move = lambda device, what=what: moved.append((what, str(device)))
        aside._home = torch.device("cuda")  # as within `away`
    smaller = model.sized(*model.resolution)  # another size is of the same parts
    smaller.encode_text(["a"])
    assert moved == [("encoders", "cuda"), ("encoders", "cpu")]
    moved.clear()
    smaller.decode(torch.zeros(1, *model.latent_shape))
    assert moved == [("autoencoder", "cuda"), ("autoencoder", "cpu")]
