"""A state of other content is told in words, and none runs code."""

import io
import pickle
import zipfile

import torch
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.run.training import STATE, check_saved, resume


class Runs:
    """A pickle that writes a file when it is loaded by one who trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archive(**parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in parts.items():
            made.writestr(f"archive/{name.replace('_', '.')}", content)
    return file.getvalue()


def test_states(fuzz, kit, host, tmp_path):
    """A state of other content is told in words, whatever its tensors; none runs code."""
    settings, ran = kit.config(), tmp_path / "ran"
    samples = kit.pairs(host, settings, tmp_path / "pairs")
    recipe = {"model": "m"}
    state = kit.state(host, settings, samples)
    state.extra["pairs"] = recipe
    saved = state.state_dict()
    path = tmp_path / STATE

    def written(value):
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    whole = written(saved)
    evil = [pickle.dumps(Runs(ran)), archive(data_pkl=pickle.dumps(Runs(ran)), version="3"), b"", b"PK\3\4"]

    def load(draws):
        kind = draws.random()
        if kind < 0.25:
            path.write_bytes(fuzz.bytes_of(draws, whole))
        elif kind < 0.35:
            path.write_bytes(draws.choice(evil))
        else:
            value = fuzz.values_of(draws, saved)
            if draws.random() < 0.5:
                value = draws.choice([*fuzz.VALUES, {"student": fuzz.tensors_of(draws, saved["student"])} | saved])
                part = draws.choice(["student", "average", "discriminator"])
                value = draws.choice([value, saved | {part: fuzz.tensors_of(draws, saved[part])}])
            path.write_bytes(written(value))
        fresh = kit.state(host, settings, samples)
        try:
            check_saved(tmp_path, settings, recipe)
            resume(fresh, tmp_path)
            assert isinstance(fresh.update, int) and fresh.update >= 0 and 0 <= fresh.spent < float("inf")
        finally:
            fresh.release()

    try:
        assert fuzz.endures(load, fuzz.TRIES // 30, (ConfigError,))
    finally:
        state.release()
    assert not ran.exists()
