"""IBD-PSC: triggered predictions stay confident when the last batch-norm layers are amplified."""

import copy
from typing import Final

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from benchmarks.peers.base import Inspected, Labels, Matrix, Model, pick
from diffense.errors import OptionError

SCALE: Final = 1.5  # omega
ERROR: Final = 0.6  # xi
COPIES: Final = 5  # n
IMAGES: Final = 500  # the paper takes 100; more only steadies the error rate
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)


class IbdPsc:
    """Hou et al., ICML 2024, "IBD-PSC: input-level backdoor detection via parameter-oriented scaling consistency".

    ``f_k``: weight and bias of the last k batch-norm layers times 1.5. k is the smallest count at which more than 60 % of clean
    labelled images go wrong; the score is the mean over ``f_k .. f_(k+4)`` of the probability of the label that the untouched
    target gives. Fewer copies where the network has fewer layers left.
    """

    name, title, cheap = "ibdpsc", "IBD-PSC", True

    def fit(self, model: Model, clean: Inspected, labels: Labels) -> None:
        """Find k and make the amplified copies; the target is left as it is.

        Raises:
            OptionError: the network has no batch norm, or no k reaches the error: the paper defines no score then.
        """
        images, truth = clean.images[:IMAGES], labels[:IMAGES]
        norms = order_norms(model, clean)
        first, largest = 0, 0.0
        for count in range(1, len(norms) + 1):
            copied = amplify(model, norms, count)
            wrong = float((copied.predict(images).argmax(axis=1) != truth).mean())
            model.forwards += copied.forwards
            largest = max(largest, wrong)
            if wrong > ERROR:
                first = count
                break
        if not first:
            raise OptionError(
                f"IBD-PSC amplifies batch norms until {ERROR:.0%} of clean images go wrong, and with all {len(norms)} of this "
                f"network {largest:.0%} do; leave it out"
            )
        self.copies = [amplify(model, norms, count) for count in range(first, min(first + COPIES, len(norms) + 1))]

    def score(self, model: Model, inspected: Inspected) -> Matrix:
        """Five forward passes an image, besides the target's own."""
        total = np.zeros(len(inspected.images))
        for copied in self.copies:
            logits = copied.predict(inspected.images).astype(np.float64)
            total += pick(softmax(logits, axis=1), inspected.predicted)
            model.forwards += len(inspected.images)
        return total / len(self.copies)


def order_norms(model: Model, clean: Inspected) -> list[str]:
    """Names of the batch-norm layers in the order in which one image passes them.

    Raises:
        OptionError: there are none.
    """
    seen: list[str] = []
    hooks = []
    for name, module in model.network.named_modules():
        if isinstance(module, NORMS) and module.affine:

            def note(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
                seen.append(name)

            hooks.append(module.register_forward_hook(note))
    if not hooks:
        raise OptionError("IBD-PSC amplifies batch-norm layers and is not defined for a network without any; leave it out")
    model.predict(clean.images[:1])
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(seen))


def amplify(model: Model, norms: list[str], count: int) -> Model:
    """A copy whose last `count` batch-norm layers give 1.5 times as much."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for name in norms[len(norms) - count :]:
            norm = network.get_submodule(name)
            if isinstance(norm, NORMS):
                norm.weight.mul_(SCALE)
                norm.bias.mul_(SCALE)
    return Model(network, model.classes)
