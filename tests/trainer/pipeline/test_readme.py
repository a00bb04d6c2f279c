"""The README's lines on a loaded pipeline run as they stand there, on a tiny one."""

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[3]


def test_the_readme_s_lines_distil_a_pipeline_and_use_it(tiny_kit, monkeypatch, tmp_path, capsys):
    import diffusers

    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    pipe = tiny_kit.tiny.make("sdxl")
    kind = type(pipe)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(kind, "to", lambda pipe, *_: pipe)
    monkeypatch.chdir(tmp_path)
    small, count = re.subn(r"td\.Config\(.*?\)", "SMALL", code)
    assert count == 1 and type(pipe) is kind
    noise = tiny_kit.noise(tiny_kit.host("sdxl", pipe))
    bare = tiny_kit.pictures(pipe, "sdxl", noise, 2)
    exec(compile(small, "README.md", "exec"), {"SMALL": tiny_kit.settings(student_steps=1)})
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == ["1", "2"]  # a line an update
    assert Image.open(tmp_path / "fox.png").size == (16, 16)
    assert (tiny_kit.pictures(pipe, "sdxl", noise, 2) == bare).all()
