"""A label that does not fit a model's own output is told; a network that is not trained is accused of nothing."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from turbodistill.core.denoiser import Cond
from turbodistill.core.schedule import DiscreteSchedule, FlowSchedule, expand, scaled_linear, zero_terminal
from turbodistill.demo.files import MODEL
from turbodistill.trainer.pipeline.load import load_model
from turbodistill.trainer.prediction_check import check_prediction, reading_distance
from turbodistill.trainer.run import run
from turbodistill.trainer.run.events import PairsMade, Warned

SIDE = 16
TOLD = {
    "eps": r"is labelled epsilon, but .* predicts v_prediction: load it as one that predicts v",
    "v": r"is labelled v_prediction, but .* predicts epsilon: load it as one that predicts eps",
}
SCHEDULES = {"usual": DiscreteSchedule(), "zero-terminal": DiscreteSchedule(zero_terminal(scaled_linear()))}


class Ideal(nn.Module):
    """The best network there can be for smooth pictures, which are Gaussian: Wiener's filter, put out as eps or v.

    A picture's frequency f along a side has the variance 1 / (1 + (f / 2)^4), so that most of it is coarse.
    """

    def __init__(self, prediction, schedule):
        super().__init__()
        self.prediction, self.schedule = prediction, schedule
        f = torch.fft.fftfreq(SIDE, 1 / SIDE)
        variance = 1 / (1 + ((f[:, None] ** 2 + f[None] ** 2).sqrt() / 2) ** 4)
        self.variance = variance / variance.mean()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, scaled, time, context):
        sigma = self.schedule.sigma(time * self.schedule.timesteps)
        alpha, s = (expand(v, scaled) for v in self.schedule.alpha_sigma(sigma))
        x = scaled / alpha
        spectrum = torch.fft.fft2(x) * self.variance / (self.variance + expand(sigma, x) ** 2)
        x0 = torch.fft.ifft2(spectrum).real
        noise = (x - x0) / expand(sigma, x)
        return noise if self.prediction == "eps" else alpha * noise - s * x0


def relabelled(denoiser, label):
    other = copy.copy(denoiser)
    other.prediction = label
    return other


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("label", ["eps", "v"])
@pytest.mark.parametrize("truth", ["eps", "v"])
def test_a_model_that_is_labelled_wrongly_is_told(truth, label, schedule, toys):
    schedule = SCHEDULES[schedule]
    model = toys.Toy(Ideal(truth, schedule), schedule, label)
    said = check_prediction(model, (4, SIDE, SIDE), toys.cond(1))
    if truth == label:
        assert said == ""
    else:
        assert re.search(TOLD[label], said)


@pytest.fixture(scope="module")
def embedded():
    if not MODEL.exists():
        pytest.skip("the embedded model is not in this checkout: demo/model.safetensors")
    return load_model(None, "cpu")


class AsEps(nn.Module):
    """A network that predicts v, with its output turned into eps: another trained model."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.v = denoiser, denoiser.backbone

    def forward(self, scaled, time, context):
        schedule = self.denoiser.schedule
        alpha, s = (expand(v, scaled) for v in schedule.alpha_sigma(schedule.sigma(time * schedule.timesteps)))
        v = self.v(scaled, time * schedule.timesteps, context).sample
        return s * scaled + alpha * v


@pytest.mark.parametrize("prompt", ["", "fire, sky & weather, in flat noto style"])
def test_the_embedded_model_is_told_when_it_is_labelled_wrongly(prompt, embedded, toys):
    """It predicts v, and so weakly that it stands for any model; the same weights as an eps model are told, too."""
    cond, shape = embedded.encode_text([prompt]), embedded.latent_shape
    assert check_prediction(embedded.denoiser, shape, cond) == ""
    assert "predicts v_prediction" in check_prediction(relabelled(embedded.denoiser, "eps"), shape, cond)
    eps = toys.Toy(AsEps(embedded.denoiser), embedded.denoiser.schedule, "eps")
    assert check_prediction(eps, shape, cond) == ""
    assert "predicts epsilon" in check_prediction(relabelled(eps, "v"), shape, cond)


@pytest.mark.parametrize("label", ["eps", "v"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["conv", "row", "unet", "plain", "zero"])
def test_a_network_that_is_not_trained_is_accused_of_nothing(name, seed, label, toys):
    shape = (4, SIDE, SIDE)
    if name == "unet":
        model = toys.unet()
    else:
        kinds = {"conv": toys.ConvBackbone, "row": toys.BlockBackbone}
        model = toys.conv("eps", seed, kinds.get(name, toys.PlainBackbone))
    if name == "zero":
        for parameter in model.backbone.conv_out.parameters():
            nn.init.zeros_(parameter)
    torch.manual_seed(seed)
    assert check_prediction(relabelled(model, label), shape, toys.cond(1)) == ""


def test_models_of_other_kinds_are_not_looked_at(toys):
    recorder = toys.Recorder(schedule=FlowSchedule())
    for prediction in ("flow", "x0"):
        recorder.prediction = prediction
        assert check_prediction(recorder, (4, 8, 8), toys.cond(1)) == ""
    assert recorder.calls == []


def test_a_right_label_costs_one_pass_of_two_small_pictures(toys):
    model = toys.Toy(Ideal("v", SCHEDULES["usual"]), SCHEDULES["usual"], "v")
    seen = []
    model.backbone.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    assert check_prediction(model, (4, SIDE, SIDE), toys.cond(3)) == "" and seen == [(2, 4, SIDE, SIDE)]
    assert check_prediction(relabelled(model, "eps"), (4, SIDE, SIDE), toys.cond(3)) and len(seen) == 1 + 1 + 4 + 3


def test_of_a_large_picture_a_part_is_looked_at(toys):
    seen = []
    model = toys.conv("v")
    model.backbone.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    assert check_prediction(model, (4, 128, 96), toys.cond(1)) == "" and seen[0] == (2, 4, 64, 64)


def test_an_output_that_is_no_number_tells_nothing(toys):
    model = toys.conv("eps")
    with torch.no_grad():
        model.backbone.conv_out.bias.fill_(torch.nan)
    assert reading_distance(model, (4, 8, 8), toys.cond(1), "eps") == float("inf")
    assert check_prediction(model, (4, 8, 8), toys.cond(1)) == ""


def train(prediction, toys):
    """A small network, trained for seconds on smooth pictures."""
    torch.manual_seed(0)
    model = toys.Toy(toys.BlockBackbone(16), DiscreteSchedule(), prediction)
    optimizer = torch.optim.Adam(model.backbone.parameters(), 3e-3)
    text = Cond(torch.zeros(32, 3, toys.TEXT))
    for _ in range(100):
        x0 = 1.3 * F.interpolate(torch.randn(32, 4, 2, 2), size=(8, 8), mode="bilinear", align_corners=True)
        noise, sigma = torch.randn_like(x0), model.schedule.sigma(torch.randint(0, 1000, (32,)))
        x = model.schedule.add_noise(x0, noise, sigma)
        loss = F.mse_loss(model.output(x, sigma, text), model.schedule.from_x0(prediction, x, x0, sigma))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_network_that_was_trained_for_seconds_is_told_when_it_is_labelled_wrongly(toys):
    model, shape, cond = train("eps", toys), (4, 8, 8), Cond(torch.zeros(1, 3, toys.TEXT))
    assert check_prediction(model, shape, cond) == ""
    assert "predicts epsilon" in check_prediction(relabelled(model, "v"), shape, cond)


def test_a_run_says_it_before_the_first_pair(embedded, kit, tmp_path):
    host = copy.copy(embedded)
    settings = kit.config(taps="")
    for label, first in (("v", PairsMade), ("eps", Warned)):
        host.denoiser = relabelled(embedded.denoiser, label)
        events = run.run(host, settings, tmp_path / label, ["a fox", "an owl"])
        event = next(events)
        events.close()
        assert isinstance(event, first)
        assert label == "v" or "predicts v_prediction" in event.text
