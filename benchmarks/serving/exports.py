"""The guarded models that are measured: target, guard and repository, kept in the bench's cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.networks import write_network
from benchmarks.settings import find_cache
from diffense.errors import DiffenseError, OptionError
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.serving.settings import Loop
from diffense.settings import FitSettings
from diffense.target import Target
from diffense_export.configs import Accelerator
from diffense_export.repository import export_guard

PLACEMENTS: Final = ("separate", "shared")
LOOPS: Final = ("bls", "fused", "whole", "direct")
IMAGES: Final = 320  # to fit on; random weights have nothing to learn, only the guard's cost counts


@dataclass(frozen=True)
class Served:
    """One export: which target, how placed, which loop, whether clients ask the gateway, and what runs its graphs on a GPU."""

    target: str
    placement: Literal["separate", "shared"]
    loop: Loop
    gateway: bool
    accelerator: Accelerator = "none"


def prepare_repository(served: Served, images: NDArray[np.uint8], model: str) -> Path:
    """Export a guard of the target into a repository of its own."""
    target, guard = prepare_guard(served.target, images)
    repository = target.parent / f"{served.placement}-{served.loop}-{served.accelerator}"
    export_guard(guard, target, repository, model, placement=served.placement, loop=served.loop, accelerator=served.accelerator)
    return repository


def prepare_guard(name: str, images: NDArray[np.uint8]) -> tuple[Path, Guard]:
    """Write a target and fit its guard, unless they lie in the cache."""
    folder = find_cache() / "serving" / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "target.onnx"
    if not target.exists():
        write_network(name, images, target)
    return target, fit_or_load(target, images, folder / "guard")


def fit_or_load(target: Path, images: NDArray[np.uint8], folder: Path) -> Guard:
    """The guard of these weights, its network on: the costlier of the two that a user may get."""
    try:
        return Guard.load(folder, target)
    except DiffenseError:  # none yet, of other weights, or of an older version
        return fit_guard(Target.open(target), images, folder, settings=FitSettings(network="on", training_steps=100))


def choose(text: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """Names separated by commas.

    Raises:
        OptionError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise OptionError(f"unknown {name!r}; known: {', '.join(known)}")
    return names
