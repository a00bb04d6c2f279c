"""Negative prompt, prefix and suffix: what of them the teacher is given, what the student, and who says so."""

import pytest
import torch
from turbodistill.core.card import StudentCard, read_card
from turbodistill.core.denoiser import Guidance, Guided
from turbodistill.core.sampling import sample_euler, trailing_sigmas
from turbodistill.trainer.config import Config, ConfigError, check_resumable
from turbodistill.trainer.data.affixes import Affixes
from turbodistill.trainer.data.files import OtherRun
from turbodistill.trainer.data.pairs import pairs_recipe
from turbodistill.trainer.loop.batch import draw_batch, generator

WORDS = {"negative_prompt": "blurry", "prompt_prefix": "best, ", "prompt_suffix": " , photo"}


def near(found, expected):
    """To half precision, in which they are stored."""
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("", "", "a {fox} ,"),
        ("best,", "", "best, a {fox}"),
        ("", "by night", "a {fox}, by night"),
        ("best, 8k", ", ", "best, 8k, a {fox}"),
    ],
)
def test_affixes_stand_around_a_prompt_with_one_comma_between(prefix, suffix, expected):
    typed, baked = Affixes(prefix, suffix), Affixes(prefix, suffix, True)
    assert typed.teacher("a {fox} ,") == typed.student("a {fox} ,") == baked.teacher("a {fox} ,") == expected
    assert baked.student("a {fox} ,") == "a {fox} ,"
    assert Affixes.of_recipe(baked.in_recipe()).student("a") == "a"
    assert Affixes("best").student("") == "best"


@pytest.mark.parametrize("baked", [False, True])
def test_the_teacher_s_pictures_have_them_all(kit, host, tmp_path, baked):
    config = kit.config(pairs=4, pair_steps=3, bake_affixes=baked, **WORDS)
    samples = kit.pairs(host, config, tmp_path, ["fox", "owl"])
    full, bare = "best, owl, photo", "owl"
    model = Guided(host.denoiser, host.encode_text([full]), host.encode_text(["blurry"]), Guidance.of(config))
    sigmas = trailing_sigmas(host.denoiser.schedule, 3)
    with torch.no_grad():
        latents = sample_euler(model, samples.noise(torch.tensor([1])) * sigmas[0], sigmas)
    near(samples.latents[1:2], latents)
    assert samples.prompts == ["fox", "owl"] * 2
    near(samples.cond.rows(slice(1, 2)).context, host.encode_text([bare if baked else full]).context)
    assert (samples.teacher_cond is not None) == baked
    some = samples.select(torch.tensor([3, 1]))
    if baked:
        near(some.teacher_cond.rows(slice(0, 1)).context, host.encode_text([full]).context)


def test_guided_losses_ask_the_teacher_with_its_own_prompt(kit, host, tmp_path):
    """The student's pass and the discriminator have the student's."""
    config = kit.config(pairs=4, bake_affixes=True, batch_size=4, **WORDS)
    samples = kit.pairs(host, config, tmp_path, ["fox"])
    state = kit.state(host, config, samples)
    batch = draw_batch(config, state.student, samples, None, generator(0, 0))
    near(batch.cond.context, host.encode_text(["fox"] * 4).context)
    near(batch.teacher_cond.context, host.encode_text(["best, fox, photo"] * 4).context)
    state.release()


@pytest.mark.parametrize("distillation", ["exponential", "nfsd", "matching"])
def test_every_guided_loss_moves_away_from_the_negative_prompt(kit, host, tmp_path, distillation):
    """A student of the same pairs is another with another negative prompt in the loss."""
    settings = {"updates": 3, "regression_updates": 0, "adversarial_weight": 0.0, "distillation_weight": 1.0}
    lora = {}
    for negative in ("", "blurry"):
        config = kit.config(distillation=distillation, guidance=1.0, negative_prompt=negative, **settings)
        *_, finished = kit.go(host, config, tmp_path / (negative or "none"))
        lora[negative] = kit.tensors(finished.path)
        assert read_card(finished.path).negative_prompt == negative
    assert not kit.same(lora[""], lora["blurry"])


OTHERS = {
    **dict.fromkeys(WORDS, "other"),
    "bake_affixes": True,
    "guidance_rescale": 0.5,
    "guidance_start": 0.1,
    "guidance_end": 0.9,
}


@pytest.mark.parametrize("changed", OTHERS)
def test_each_of_them_makes_other_pairs_and_says_which(kit, host, tmp_path, changed):
    name = changed.replace("_", " ")
    kit.pairs(host, kit.config(**WORDS), tmp_path)
    with pytest.raises(OtherRun, match=rf"are others \({name} was .* and is "):
        kit.pairs(host, kit.config(**WORDS | {changed: OTHERS[changed]}), tmp_path)
    assert len(kit.pairs(host, kit.config(**WORDS), tmp_path)) == 12


def test_pairs_without_any_are_those_of_before(kit, host):
    recipe = pairs_recipe(host, kit.config(), ["a"])
    assert set(recipe) == {"model", "sampler", "steps", "guidance", "seed", "size", "prompts"}
    with_negative = pairs_recipe(host, kit.config(negative_prompt="x"), ["a"])
    assert recipe.items() < with_negative.items()
    check_resumable({k: v for k, v in kit.config().to_dict().items() if k not in WORDS}, kit.config())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"negative_prompt": "x" * 4001}, "negative_prompt has 4001 letters: the most is 4000"),
        ({"prompt_suffix": "a\ud800"}, "prompt_suffix is no valid text"),
        ({"negative_prompt": "x", "guidance": 1.0}, "guidance is 1, which leaves it out: raise guidance"),
    ],
)
def test_what_cannot_be_is_told(values, told):
    with pytest.raises(ConfigError, match=told):
        Config(**values)


@pytest.mark.parametrize(
    ("baked", "words"),
    [
        (True, "Prompts: 'best' before them and 'photo' behind them is baked in, leave it out."),
        (False, "Prompts: write 'best' before them and 'photo' behind them."),
    ],
)
def test_the_card_says_what_to_type(kit, host, tmp_path, baked, words):
    config = kit.config(
        updates=2, negative_prompt="blurry", prompt_prefix="best", prompt_suffix="photo", bake_affixes=baked
    )
    *_, finished = kit.go(host, config, tmp_path)
    card = read_card(finished.path)
    assert StudentCard.from_metadata(card.to_metadata()) == card
    assert words in card.in_words() and "away from 'blurry' is baked in" in card.in_words()
    assert Affixes.of(card) == Affixes("best", "photo", baked)
