"""Which number format training runs in, and which memory order."""

import time
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def mix_precision() -> torch.autocast:
    """A context of bfloat16 where that is faster; for one step at a time, as it keeps the weights it has cast until it ends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=probe_bfloat16())


@lru_cache(maxsize=1)
def probe_bfloat16() -> bool:
    """Whether bfloat16 convolutions are faster than float32 ones here; without AVX-512 they are many times slower."""
    if torch.cuda.is_available():
        return True
    conv = to_channels_last(nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(64, 64, 16, 16).to(memory_format=torch.channels_last)
    took = {}
    with torch.no_grad():
        for half in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                conv(x)
                start = time.perf_counter()
                for _ in range(3):
                    conv(x)
            took[half] = time.perf_counter() - start
    return took[True] < took[False]


def to_channels_last(module: Module) -> Module:
    """Order the weights' memory as the fast convolutions want it."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module
