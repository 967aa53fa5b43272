"""How useful frozen features are: k-nearest-neighbour and linear-probe accuracy.

Both read the pooled features of a network, with or without a classifier, and train nothing in it.
They are deterministic: no random number is drawn.

References:
    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    section 3.4 (weighted k-nearest neighbours).
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (k = 20,
    temperature 0.07).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InputError
from ..data.splits import Split
from ..network.modules.model import CompactModel
from .report import last_stream
from .sensitivity import features

NEIGHBOURS = 20
TEMPERATURE = 0.07
# Strengths of the penalty of the linear probe; every fifth image chooses one.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 5
STEPS = 100
BATCH = 16


@dataclass(frozen=True)
class Probe:
    """Accuracies of frozen features, as shares of the test images.

    Attributes:
        train_images: Labelled images that neighbours and the linear probe come from.
        test_images: Images that were classified.
        knn: Of the weighted vote of the nearest neighbours.
        linear: Of a linear classifier on the features.
    """

    train_images: int
    test_images: int
    knn: float
    linear: float


def probe(
    model: CompactModel,
    train: Split,
    test: Split,
    *,
    progress: Callable[[int], None] | None = None,
) -> Probe:
    """Measure the k-nearest-neighbour and the linear-probe accuracy of a network's features.

    Args:
        model: The network, with or without a classifier.
        train: Labelled images; 1,000 or more are useful.
        test: Other labelled images of the same classes.
        progress: Called with the number of images whose features are computed.

    Returns:
        Both accuracies.

    Raises:
        InputError: A split has no image.
    """
    done = progress or (lambda images: None)
    known = split_features(model, train, done)
    found = split_features(model, test, lambda images: done(len(train) + images))
    labels, wanted = torch.from_numpy(train.targets), torch.from_numpy(test.targets)
    nearest = nearest_neighbours(known, labels, found)
    straight = linear_probe(known, labels, found)
    return Probe(len(train), len(test), _share(nearest, wanted), _share(straight, wanted))


def split_features(model: CompactModel, split: Split, progress: Callable[[int], None]) -> Tensor:
    """The pooled features of every image of a split: (images, channels)."""
    if not len(split):
        raise InputError("probe: there is no image; give some hundred with labels")
    parts = []
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            images = split.floats(slice(start, start + BATCH))
            parts.append(features(model, last_stream(model, images)).flatten(1))
            progress(start + len(images))
    return torch.cat(parts)


def nearest_neighbours(
    known: Tensor,
    labels: Tensor,
    found: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Classify features by the vote of their nearest neighbours, weighted by exp(cosine / T).

    Args:
        known: Features with labels, (images, channels).
        labels: Their class numbers, (images,).
        found: Features to classify, (others, channels).
        neighbours: How many vote; at most all.
        temperature: T.

    Returns:
        Class numbers, (others,).
    """
    cosines = F.normalize(found, dim=1) @ F.normalize(known, dim=1).T
    best = cosines.topk(min(neighbours, len(known)), dim=1)
    votes = torch.zeros(len(found), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[best.indices], (best.values / temperature).exp())
    return votes.argmax(dim=1)


def linear_probe(known: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """Classify features by multinomial logistic regression on standardized features.

    The penalty of the squared weights is the one of `PENALTIES` whose classifier, fitted without
    every fifth image, classifies most of those; the final one is fitted on all images by L-BFGS.

    Args:
        known: Features with labels, (images, channels).
        labels: Their class numbers, (images,).
        found: Features to classify, (others, channels).

    Returns:
        Class numbers, (others,).
    """
    mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0).clamp(min=1e-6)
    x, other = ((values - mean) / deviation for values in (known, found))
    held_out = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    penalty = PENALTIES[1]
    if bool(held_out.any()):

        def hits(strength: float) -> int:
            weight, bias = _regression(x[~held_out], labels[~held_out], strength)
            return int(((x[held_out] @ weight + bias).argmax(dim=1) == labels[held_out]).sum())

        penalty = max(PENALTIES, key=hits)
    weight, bias = _regression(x, labels, penalty)
    return (other @ weight + bias).argmax(dim=1)


def _regression(x: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (channels, classes) and bias (classes,) of a logistic regression."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())
