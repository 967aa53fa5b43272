"""SCOP for patches: trained gates between the tokens of an image and their knockoffs.

Each patch after each attention is mixed with a knockoff, k z + (1 - k) z~, and only the gates k are
trained, so that the network's output stays what it was. SCOP generates knockoffs by a network of
their own. Here the knockoff of a patch is the patch at the same place of another image of the
batch: it has the same distribution and knows nothing of this image. That is ours, not the source's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import InputError
from ..masks.groups import token_sites
from ..network.modules.model import CompactModel
from ..oneshot.sensitivity import features
from ..oneshot.stream import check_images
from .counts import attention_steps
from .streaming import Progress, batch_size, run_step

EPOCHS, LEARNING_RATE = 8, 0.1


def knockoff_scores(
    model: CompactModel,
    images: Tensor,
    progress: Progress,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
) -> dict[int, Tensor]:
    """Train the gates, and return k - (1 - k) for each patch.

    Args:
        model: A working copy.
        images: Unlabeled images, at least two, (images, channels, height, width). The loss is the
            divergence from the classes that the network predicts without gates, or the squared
            error of the features without a head.
        progress: Called after each batch.
        seed: Of the order of the images, and so of their pairs.
        epochs: Passes over the images.

    Returns:
        By step with attention, the score of each token that the network carries after it,
        (tokens,), between -1 and 1; 1 for prefix tokens.

    Raises:
        InputError: The images do not fit, or there is only one.

    References:
        Tang et al. 2020, "SCOP: Scientific Control for Reliable Neural Network Pruning", eq. 6-9.
    """
    check_images(model, images)
    if len(images) < 2:
        raise InputError("tokens = 'scop' needs at least two images: each is another's knockoff")
    architecture = model.architecture
    sizes = list(token_sites(architecture).values())
    gates = nn.ParameterDict(
        {
            str(step): nn.Parameter(images.new_zeros(sizes[step + 1]))
            for step in attention_steps(architecture)
        }
    )
    optimizer = torch.optim.Adam(gates.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    size = max(2, batch_size(model))
    count = len(images) // size if len(images) > size else 1
    for epoch in range(epochs):
        # Parts of at least two images.
        parts = torch.randperm(len(images), generator=generator).tensor_split(count)
        for number, part in enumerate(parts):
            loss = _loss(model, images[part], gates)
            optimizer.zero_grad()
            # Nothing depends on a gate where the head reads prefix tokens of the only attention.
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
            progress("gates", epoch * count + number + 1, epochs * count)
    found = {}
    for step in attention_steps(architecture):
        score = 2 * gates[str(step)].detach().double().sigmoid() - 1
        score[: architecture.prefix] = 1.0
        found[step] = score
    return found


def _loss(model: CompactModel, images: Tensor, gates: nn.ParameterDict) -> Tensor:
    prefix = model.architecture.prefix
    with torch.no_grad():
        x = model.embed(images)
        streams = [x]
        for number in range(len(model.steps)):
            streams.append(run_step(model, number, streams[-1]))
        wanted = _outputs(model, streams[-1])
    with torch.enable_grad():
        for number in range(len(model.steps)):
            x = run_step(model, number, x)
            if str(number) in gates:
                gate = gates[str(number)].sigmoid()[prefix:, None]
                knockoff = streams[number + 1].roll(1, dims=0)[:, prefix:]
                mixed = gate * x[:, prefix:] + (1 - gate) * knockoff
                x = torch.cat([x[:, :prefix], mixed], dim=1)
        found = _outputs(model, x)
    if model.head is None:
        return F.mse_loss(found, wanted) / wanted.var(correction=0).clamp_min(1e-12)
    return F.kl_div(
        found.log_softmax(dim=-1),
        wanted.log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def _outputs(model: CompactModel, x: Tensor) -> Tensor:
    return features(model, x) if model.head is None else model.classify(x)
