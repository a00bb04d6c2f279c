"""Files of transformers with their text encoders and autoencoder in one, as ComfyUI writes them."""

import pytest
import torch
from turbodistill.trainer.checkpoint import load, tokenizer
from turbodistill.trainer.checkpoint.errors import ModelError
from turbodistill.trainer.checkpoint.load import architecture_of_module, load_pipeline

AT = "text_encoders."


@pytest.fixture(scope="module")
def sd3(files, layouts):
    """Stable Diffusion 3 with all three text encoders; the class that T5 is of takes its embedding from either name."""
    from transformers import T5Config, T5EncoderModel

    size = T5Config(
        vocab_size=8, d_model=64, d_kv=8, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    parts = {
        "text_encoder": files.clip(128, True),
        "text_encoder_2": files.clip(128, True, "gelu"),
        "text_encoder_3": files.seeded(lambda: T5EncoderModel(size), 4),
        "vae": files.vae(16, use_quant_conv=False, use_post_quant_conv=False),
    }
    with torch.no_grad():  # its summary is taken as it is: projected by one
        parts["text_encoder"].text_projection.weight.copy_(torch.eye(128))
    weights = {f"{files.WHOLE}{k}": torch.randn(v).half() for k, v in layouts.sd3(pooled=256).items()}
    weights |= files.vae_weights(parts["vae"])
    weights |= files.clip_weights(parts["text_encoder"], f"{AT}clip_l.transformer.")
    weights |= files.clip_weights(parts["text_encoder_2"], f"{AT}clip_g.transformer.")
    t5 = {f"{AT}t5xxl.transformer.{k}": v for k, v in parts["text_encoder_3"].state_dict().items()}
    weights |= {k: v for k, v in t5.items() if "embed_tokens" not in k} | {f"{AT}t5xxl.logit_scale": torch.ones(())}
    return files.Made(weights, parts)


@pytest.fixture
def no_t5(monkeypatch):
    monkeypatch.setattr(tokenizer, "HOSTS", {})
    monkeypatch.setattr(load, "t5_tokenizer", tokenizer.t5_tokenizer)


def test_without_t5_a_pipeline_works_with_two_text_encoders(sd3, files, vocabulary, tmp_path):
    path = sd3.without(f"{AT}t5xxl.").write(tmp_path / "mine.safetensors")
    loaded = load_pipeline(path, tokenizer=vocabulary)
    assert architecture_of_module(loaded.pipe.transformer) == "stable-diffusion-v3-medium"
    assert loaded.pipe.text_encoder_3 is None and loaded.pipe.tokenizer_3 is None
    for part in ("text_encoder", "text_encoder_2", "vae"):
        assert files.equal(getattr(loaded.pipe, part), sd3.modules[part]), part
    assert loaded.pipe.vae.config.shift_factor == 0.0609 and loaded.pipe.scheduler.config.shift == 3.0


def test_t5_is_read_and_its_tokenizer_asked_for(sd3, files, vocabulary, no_t5, tmp_path):
    path = sd3.write(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=r"needs the tokenizer_3: give as components .*stable-diffusion-3-medium"):
        load_pipeline(path, tokenizer=vocabulary)


def test_t5_s_tokenizer_is_found_in_a_host(sd3, files, vocabulary, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models

    host = tmp_path / "comfy" / "text_encoders" / "t5_tokenizer"
    host.mkdir(parents=True)
    words = models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=2)
    Tokenizer(words).save(str(host / "tokenizer.json"))
    monkeypatch.setattr(tokenizer, "HOSTS", {"COMFYUI_PATH": str(tmp_path)})
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    loaded = load_pipeline(sd3.write(tmp_path / "mine.safetensors"), tokenizer=vocabulary)
    t5 = loaded.pipe.text_encoder_3
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    # T5's class keeps some of its weights in float32: they overflow in float16.
    assert {p.dtype for n, p in t5.named_parameters() if ".wo." in n} == {torch.float32}
    assert t5.shared.weight.dtype == torch.float16
    wanted = sd3.modules["text_encoder_3"].state_dict()
    assert all(torch.equal(v.float(), wanted[k].float()) for k, v in t5.state_dict().items())
    assert loaded.pipe.tokenizer_3("a").input_ids[-1] == loaded.pipe.tokenizer_3.eos_token_id


def test_a_transformer_alone_names_what_it_lacks(sd3, vocabulary, tmp_path):
    path = sd3.without(AT, "first_stage_model.").write(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match="holds no vae, text_encoder, text_encoder_2 and text_encoder_3: give as comp"):
        load_pipeline(path, tokenizer=vocabulary)
