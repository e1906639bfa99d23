"""Which number format training runs in, and which memory order."""

import time
from functools import lru_cache
from math import inf
from typing import Final, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

PROBES: Final = 10


def mix_precision(dense: bool = True) -> torch.autocast:
    """A context of bfloat16 where that is faster; for one step at a time, as it keeps the weights it has cast until it ends.

    Args:
        dense: whether the convolutions are; depthwise ones have nothing to gain on a CPU (EfficientNet-lite0: 25 ms an image
            in bfloat16, 16 ms in float32).
    """
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16, enabled=dense)
    return torch.autocast("cpu", torch.bfloat16, enabled=dense and probe_bfloat16())


@lru_cache(maxsize=1)
def probe_bfloat16() -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones here; without AVX-512 they are many times slower."""
    if torch.cuda.is_available():
        return True
    conv = to_channels_last(nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(64, 64, 16, 16).to(memory_format=torch.channels_last)
    took = {True: inf, False: inf}
    with torch.no_grad():
        for half in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                conv(x)
                for _ in range(PROBES):
                    start = time.perf_counter()
                    conv(x)
                    took[half] = min(took[half], time.perf_counter() - start)  # the best of several: load must not choose
    return took[True] < took[False]


def choose_device() -> torch.device:
    """Where targets are trained and peers run: the GPU that CUDA gives, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_channels_last(module: Module) -> Module:
    """Order the weights' memory as the fast convolutions want it."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module
