"""The embedded model's text encoder: MiniLM's token embeddings over a small vocabulary, two layers.

Torch alone, so that it runs inside any host; only the tokenizer needs the `tokenizers` package,
which every host ships with transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Embedding, LayerNorm, TransformerEncoder, TransformerEncoderLayer

WIDTH, LAYERS, HEADS, LENGTH = 384, 2, 12, 32


class TextEncoder(nn.Module):
    """BERT in miniature, distilled from all-MiniLM-L6-v2; positions past the text are zero in the output.

    `tokenizer` is a WordPiece description in the JSON of the `tokenizers` library.
    """

    def __init__(self, tokenizer: str):
        super().__init__()
        from tokenizers import Tokenizer

        self.tokenizer_json = tokenizer
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding(length=LENGTH)
        self.word = Embedding(self.tokenizer.get_vocab_size(), WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.norm = LayerNorm(WIDTH, eps=1e-12)
        layer = TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", 1e-12, batch_first=True)
        self.layers = TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids and mask, both (B, 32); the mask is true on the text."""
        encoded = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([e.ids for e in encoded], device=self.position.device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=self.position.device)
        return ids, mask.bool()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, T) -> states (B, T, 384)."""
        states = self.norm(self.word(ids) + self.position[: ids.shape[1]])
        states = self.layers(states, src_key_padding_mask=~mask)
        return states * mask.unsqueeze(-1)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Texts -> token states (B, 32, 384); an empty text is the unconditional one."""
        return self(*self.tokens(texts))
