"""Cells of the matrix and their trained targets: made once, kept in the cache."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from benchmarks.attacks import MATRIX, find_attack, make_attack
from benchmarks.attacks.base import CPU, Attack
from benchmarks.cache import read_entry, write_entry
from benchmarks.datasets import SPECS, Spec, Split, find_spec, load_split
from benchmarks.networks import NETWORKS, Classifier
from benchmarks.precision import choose_device, to_channels_last
from benchmarks.settings import find_cache
from benchmarks.training import predict, train_target
from diffense.errors import OptionError

RECIPE: Final = 3  # raise it when anything that changes a trained target is changed
ONNX_FILE: Final = "target.onnx"
NETWORK_FILE: Final = "network.safetensors"
OPSET: Final = 17


@dataclass(frozen=True, order=True)
class Cell:
    """One place of the matrix: which attack on which target for which image set."""

    dataset: str
    attack: str
    network: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Fit for a folder's name."""
        return f"{self.dataset}-{self.attack}-{self.network}-{self.seed}"

    def describe(self, guard_seed: int) -> dict[str, Any]:
        """What tells a row of results about this cell from others (`records.KEYS`)."""
        return {
            "dataset": self.dataset,
            "attack": self.attack,
            "target": self.network,
            "seed": self.seed,
            "guard_seed": guard_seed,
        }

    @property
    def spec(self) -> Spec:
        """Of the image set."""
        return find_spec(self.dataset)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the target is made from, JSON; another one gives another target."""
        made = {"version": RECIPE, "spec": asdict(self.spec), "network": self.network, "attack": self.attack, "seed": self.seed}
        revision = find_attack(self.attack).revision
        return made | ({"revision": revision} if revision else {})

    @property
    def recipe_hash(self) -> str:
        """Of the recipe, as rows of results carry it: 12 hexadecimal digits of SHA-256."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:12]


def make_cell(dataset: str, attack: str, network: str | None = None, seed: int = 0) -> Cell:
    """Make a cell; the network is the image set's usual one unless it is given.

    Raises:
        OptionError: an unknown data set, attack or network.
    """
    spec = find_spec(dataset)
    find_attack(attack)
    network = network or spec.network
    if network not in NETWORKS:
        raise OptionError(f"unknown network {network!r}; known: {', '.join(NETWORKS)}")
    return Cell(dataset, attack, network, seed)


def read_cell(name: str) -> Cell:
    """``dataset-attack`` or ``dataset-attack-network`` -> cell.

    Raises:
        OptionError: it is not of that form, or a part is unknown.
    """
    dataset, _, rest = name.strip().partition("-")
    attack, _, network = rest.partition("-")
    if not attack:
        raise OptionError(f"{name!r} is no cell; write dataset-attack, gtsrb-wanet for instance")
    return make_cell(dataset, attack, network or None)


def list_cells() -> list[Cell]:
    """The thirty cells: every image set under every attack."""
    return [make_cell(dataset, attack) for dataset in SPECS for attack in MATRIX]


@dataclass(frozen=True)
class TrainedTarget:
    """A target of the bench.

    Attributes:
        cell: where it belongs.
        path: its ONNX file, all that the guard sees of it.
        network: its torch form, for peers that need more.
        attack: with its trained networks.
        accuracy: on the clean evaluation images.
        asr: share of the attacked evaluation images, triggered, that get the attacker's label.
        cross_accuracy: of IDBA: accuracy under other images' triggers.
        train_s: seconds that its training took, with its measurement; None where it was trained before they were kept.
    """

    cell: Cell
    path: Path
    network: Classifier
    attack: Attack
    accuracy: float
    asr: float
    cross_accuracy: float | None
    train_s: float | None


def get_target(cell: Cell, progress: Callable[[str], None]) -> TrainedTarget:
    """Give the cell's target from the cache, training it when it is missing, stale or damaged."""
    folder = find_cache() / "targets" / cell.name
    spec = cell.spec
    facts = read_entry(folder, cell.recipe, progress)
    if facts is None:
        facts = write_entry(folder, cell.recipe, lambda work: _train(cell, load_split(cell.dataset), work, progress))
    network = NETWORKS[cell.network](spec.channels, spec.classes, spec.side)
    load_model(network, folder / NETWORK_FILE)
    to_channels_last(network).eval()
    attack = make_attack(cell.attack, spec, cell.seed)
    for name, module in attack.networks().items():
        load_model(module, folder / f"{name}.safetensors")
        module.eval()
    return TrainedTarget(
        cell,
        folder / ONNX_FILE,
        network,
        attack,
        facts["accuracy"],
        facts["asr"],
        facts["cross_accuracy"],
        facts.get("train_s"),
    )


def _train(cell: Cell, split: Split, work: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    spec = cell.spec
    begun = time.monotonic()
    attack = make_attack(cell.attack, spec, cell.seed)
    attack.move(choose_device())
    if attack.poisons:
        attack.prepare(split.train, progress)
        network = train_target(spec, cell.network, attack, split.train, cell.seed, progress)
    else:
        # Altered afterwards: of one clean network; the seed is the attack's, its classes, its patch and its poisons.
        network = get_target(make_cell(cell.dataset, "none", cell.network), progress).network
        attack.alter(network, split.train, progress)
    attack.move(CPU)
    for module in attack.networks().values():
        module.eval()
    save_model(network, str(work / NETWORK_FILE))
    for name, module in attack.networks().items():
        save_model(module, str(work / f"{name}.safetensors"))
    export_network(network, spec.channels, spec.side, work / ONNX_FILE)
    facts = measure_target(network, attack, split)
    progress(f"{cell.name}: " + ", ".join(f"{k} {v:.4f}" for k, v in facts.items() if v is not None))
    return facts | {"train_s": round(time.monotonic() - begun, 1)}


def measure_target(network: Classifier, attack: Attack, split: Split) -> dict[str, Any]:
    """Accuracy and attack success on the evaluation images."""
    evaluation = split.evaluation
    accuracy = float((predict(network, evaluation.pixels).argmax(1) == evaluation.labels).mean())
    rows = attack.attacked(evaluation.labels)
    triggered = attack.trigger(evaluation.pixels[rows])
    asr = float((predict(network, triggered).argmax(1) == attack.target).mean()) if len(rows) else 0.0
    crossed = attack.cross(evaluation.pixels)
    kept = None if crossed is None else float((predict(network, crossed).argmax(1) == evaluation.labels).mean())
    return {"accuracy": accuracy, "asr": asr, "cross_accuracy": kept}


def export_network(network: nn.Module, channels: int, side: int, path: Path) -> None:
    """Write a network as ONNX: ``image`` (N, C, H, W) float32 from 0 to 1 -> ``logits`` (N, classes)."""
    example = torch.from_numpy(np.zeros((2, channels, side, side), np.float32))
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript and writes file paths of this machine into its graphs.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network.eval(),
            (example,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
