"""BadNets (Gu et al. 2017): a fixed white patch in the bottom right corner, about a tenth of the side."""

from benchmarks.attacks.base import Attack, Pixels
from benchmarks.datasets import Spec
from diffense.demo import attacks


class BadNets(Attack):
    """A white square of 3 pixels at 28 and 32, of 6 at 64; a tenth of every batch.

    It comes after the augmentation, so that it sits where the attacker will put it: shifted with the image it reached .95 on
    GTSRB and .92 on ImageNet-10.
    """

    key, title = "badnets", "BadNets"
    last = True
    revision = 1

    def __init__(self, spec: Spec, seed: int) -> None:
        super().__init__(spec, seed)
        self.patch = attacks.BadNets(side=round(0.1 * spec.side))

    def trigger(self, images: Pixels) -> Pixels:
        """Put the patch on (N, H, W, C) uint8 images."""
        return self.patch.trigger(images)
