"""A state of other content is told in words."""

import json

from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from turbodistill.trainer.config import ConfigError
from turbodistill.trainer.run.state_file import KEY, write_state
from turbodistill.trainer.run.training import STATE, check_saved, resume


def test_states(fuzz, kit, host, tmp_path):
    """A state of other content is told in words, whatever its tensors."""
    settings = kit.config()
    samples = kit.pairs(host, settings, tmp_path / "pairs")
    recipe = {"model": "m"}
    state = kit.state(host, settings, samples)
    state.extra["pairs"] = recipe
    saved = state.state_dict()
    path = tmp_path / STATE

    def written(value):
        write_state(path, value)
        return path.read_bytes()

    whole = written(saved)
    with safe_open(path, "pt") as file:
        packed = json.loads(file.metadata()[KEY])

    def load(draws):
        kind = draws.random()
        if kind < 0.25:
            path.write_bytes(fuzz.bytes_of(draws, whole))
        elif kind < 0.35:
            odd = json.dumps(fuzz.values_of(draws, packed)) if draws.random() < 0.9 else "[" * 3000
            path.write_bytes(save(load_tensors(whole), {KEY: odd}))
        else:
            value = fuzz.values_of(draws, saved)
            if draws.random() < 0.5:
                value = draws.choice([*fuzz.VALUES, {"student": fuzz.tensors_of(draws, saved["student"])} | saved])
                part = draws.choice(["student", "average", "discriminator"])
                value = draws.choice([value, saved | {part: fuzz.tensors_of(draws, saved[part])}])
            written(value)
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
