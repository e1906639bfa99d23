"""Measure serving: every target, placement and loop, guarded and unguarded in turns; what is measured already is kept.

usage: python -m benchmarks.serving [--targets resnet50_224] [--placements shared] [--loops bls] [--perf-analyzer PATH]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import SERVING, read_rows, write_row
from benchmarks.serving.breakdown import Breakdown
from benchmarks.serving.networks import NETWORKS, write_network
from benchmarks.settings import describe_machine, find_cache, find_commit
from diffense.bench.comparison import Measure, Scenario, choose_tool, compare_models, read_models
from diffense.bench.perf_analyzer import find_perf_analyzer
from diffense.errors import DiffenseError, OptionError
from diffense.fit import FitSettings, fit_guard
from diffense.guard import Guard
from diffense.names import GATEWAY_SUFFIX, GUARDED_SUFFIX
from diffense.serve import TritonServer
from diffense.target import Target
from diffense_export.parity import draw_smooth_noise
from diffense_export.repository import export_guard

IMAGES: Final = 320  # to fit on; random weights have nothing to learn, only the guard's cost counts
PLACEMENTS: Final = ("separate", "shared")
LOOPS: Final = ("bls", "fused")
SCENARIOS: Final = (
    Scenario("grpc", 1, 1, False),
    Scenario("grpc", 8, 1, False),
    Scenario("grpc", 1, 16, False),
    Scenario("grpc", 16, 1, False),
    Scenario("grpc", 32, 1, False),
    Scenario("grpc", 1, 4, False),
    Scenario("grpc", 8, 4, False),
    Scenario("grpc", 1, 1, True),
    Scenario("grpc", 8, 1, True),
    Scenario("http", 1, 1, False),
    Scenario("http", 8, 1, False),
)


@dataclass(frozen=True)
class Served:
    """One export: which target, how placed, which loop, and whether clients ask the gateway."""

    target: str
    placement: Literal["separate", "shared"]
    loop: Literal["bls", "fused"]
    gateway: bool


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(NETWORKS))
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--scenarios", type=int, default=len(SCENARIOS), help="only the first so many scenarios")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--perf-analyzer", type=Path)
    parser.add_argument("--gateway", action="store_true", help="ask the gateway instead of the ensemble")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    options = parser.parse_args(arguments)
    try:
        tool = choose_tool(find_perf_analyzer(options.perf_analyzer))
        for target in choose(options.targets, NETWORKS):
            for placement in choose(options.placements, PLACEMENTS):
                for loop in choose(options.loops, LOOPS):
                    served = Served(target, cast("Any", placement), cast("Any", loop), options.gateway)
                    missing = [s for s in SCENARIOS[: options.scenarios] if options.again or not is_done(served, s, tool[0])]
                    if missing:
                        measure(served, missing, tool, options.rounds, options.seconds)
    except DiffenseError as error:
        sys.exit(f"serving: {error}")
    except KeyboardInterrupt:
        sys.exit("serving: interrupted; what is finished is kept, run it again to go on")


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


def describe(served: Served, scenario: Scenario, tool: str) -> dict[str, Any]:
    """What tells rows apart."""
    return asdict(served) | asdict(scenario) | {"tool": tool, "machine": describe_machine()}


def is_done(served: Served, scenario: Scenario, tool: str) -> bool:
    """Whether this machine has measured it."""
    wanted = describe(served, scenario, tool)
    return any(all(row.get(name) == value for name, value in wanted.items()) for row in read_rows(SERVING))


def measure(served: Served, scenarios: Sequence[Scenario], tool: tuple[str, Measure], rounds: int, seconds: float) -> None:
    """Start a server on one export and measure scenario by scenario; each is written as soon as it is there."""
    side = NETWORKS[served.target][0]
    images = draw_smooth_noise(IMAGES, (side, side), 3)
    model = f"{served.target}_{served.placement}_{served.loop}"
    repository = prepare_repository(served, images, model)
    guarded = model + (GATEWAY_SUFFIX if served.gateway else GUARDED_SUFFIX)
    with TritonServer(repository) as server:
        for scenario in scenarios:
            url = server.endpoints.grpc if scenario.protocol == "grpc" else server.endpoints.http
            description = read_models(url, scenario.protocol, guarded, model)
            breakdown = Breakdown(server.endpoints.grpc, guarded, tool[1])
            found = compare_models(
                url,
                description,
                model,
                scenario,
                images[:32],
                tool=(tool[0], breakdown.measure),
                rounds=rounds,
                seconds=seconds,
            )
            row = (
                asdict(found) | describe(served, scenario, tool[0]) | {"time_ms": breakdown.average(), "commit": find_commit()}
            )
            write_row(row, SERVING)
            print(f"{guarded} {scenario}: p50 x{found.p50_ratio:.3f}, throughput x{found.throughput_ratio:.3f}", flush=True)


def prepare_repository(served: Served, images: NDArray[np.uint8], model: str) -> Path:
    """Export a guard of the target into a repository of its own."""
    folder = find_cache() / "serving" / served.target
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "target.onnx"
    if not target.exists():
        write_network(served.target, images, target)
    guard = fit_or_load(target, images, folder / "guard")
    repository = folder / f"{served.placement}-{served.loop}"
    export_guard(guard, target, repository, model, placement=served.placement, loop=served.loop)
    return repository


def fit_or_load(target: Path, images: NDArray[np.uint8], folder: Path) -> Guard:
    """The guard of these weights, its network on: the costlier of the two that a user may get."""
    try:
        return Guard.load(folder, target)
    except DiffenseError:  # none yet, of other weights, or of an older version
        return fit_guard(Target.open(target), images, folder, settings=FitSettings(network="on", training_steps=100))


if __name__ == "__main__":
    main(sys.argv[1:])
