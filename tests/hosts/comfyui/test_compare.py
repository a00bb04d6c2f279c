"""Compare Teacher and Student: both columns are what the single nodes make, with times above."""

import pytest

pytestmark = pytest.mark.host


def test_teacher_beside_student(comfyui, graph, demo):
    negative = graph.add("CLIPTextEncode", clip=demo.clip, text="blurry")
    sampled = {"positive": demo.positive, "negative": negative, "latent_image": demo.latent, "seed": 3}
    compare = graph.add(
        "TurboDistillCompare",
        teacher=demo.base,
        student=demo.model,
        vae=demo.vae,
        teacher_steps=4,
        teacher_cfg=5.0,
        student_steps=1,
        **sampled,
    )
    teacher = graph.add(
        "KSampler",
        model=demo.base,
        steps=4,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        **sampled,
    )
    student = graph.sample(demo.model, demo.positive, demo.latent, seed=3)
    singles = [
        graph.add("PreviewImage", images=graph.add("VAEDecode", samples=x, vae=demo.vae)) for x in (teacher, student)
    ]
    run = comfyui.run(graph)
    sheet = comfyui.pictures(run, compare)
    assert sheet.shape == (4, 256 + 26, 2 * 256 + 8, 3)  # four rows of 64 x 64 pictures, enlarged, with their titles
    title = sheet[:, :26]
    for column, single in ((slice(256), singles[0]), (slice(264, None), singles[1])):
        pixels = sheet[:, 26:, column][:, 2::4, 2::4]
        assert (pixels - comfyui.pictures(run, single)).abs().max() < 1.5 / 255
        assert title[:, :, column].min() < 0.2 < title.mean()  # black words on white
    assert (sheet[:, 26:, :256] - sheet[:, 26:, 264:]).abs().mean() > 0.01
