"""AUROC that others have published for the peers, to see whether ours are what they should be.

All from one comparison on ResNet-18: the poster of TED++ (ICDM 2025); TED and TED++ there have 5 clean images a class.
"""

from typing import Final

PUBLISHED: Final[dict[tuple[str, str], dict[str, float]]] = {
    ("cifar10", "badnets"): {"scaleup": 0.96, "strip": 0.64, "ibdpsc": 0.99, "ted": 0.96, "tedpp": 0.99},
    ("cifar10", "wanet"): {"scaleup": 0.72, "strip": 0.45, "ibdpsc": 0.97, "ted": 0.96, "tedpp": 0.91},
    ("cifar10", "idba"): {"scaleup": 0.96, "strip": 0.98, "ibdpsc": 1.00, "ted": 0.81, "tedpp": 0.99},
    ("gtsrb", "badnets"): {"scaleup": 0.90, "strip": 0.95, "ibdpsc": 0.96, "ted": 0.95, "tedpp": 0.93},
    ("gtsrb", "wanet"): {"scaleup": 0.30, "strip": 0.45, "ibdpsc": 0.88, "ted": 0.91, "tedpp": 0.91},
    ("gtsrb", "idba"): {"scaleup": 0.89, "strip": 0.99, "ibdpsc": 0.96, "ted": 0.93, "tedpp": 0.97},
}
