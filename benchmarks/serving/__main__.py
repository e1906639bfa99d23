"""Measure serving: every target, placement and loop, guarded and unguarded in turns; what is measured already is kept.

usage: python -m benchmarks.serving [--targets resnet50_224] [--placements shared] [--loops bls] [--perf-analyzer PATH]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

from benchmarks.records import SERVING, find_key, read_rows, write_row
from benchmarks.serving.breakdown import Breakdown
from benchmarks.serving.exports import IMAGES, LOOPS, PLACEMENTS, Served, choose, prepare_repository
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import describe_run
from diffense.bench.comparison import Measure, Scenario, choose_tool, compare_models, read_models
from diffense.bench.perf_analyzer import find_perf_analyzer
from diffense.errors import DiffenseError
from diffense.names import GATEWAY_SUFFIX, GUARDED_SUFFIX
from diffense.serve import TritonServer

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


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(NETWORKS))
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--accelerator", default="none", choices=("none", "cuda", "tensorrt"), help="as of `diffense export`")
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
                    served = Served(target, cast("Any", placement), cast("Any", loop), options.gateway, options.accelerator)
                    missing = [s for s in SCENARIOS[: options.scenarios] if options.again or not is_done(served, s, tool[0])]
                    if missing:
                        measure(served, missing, tool, options.rounds, options.seconds)
    except DiffenseError as error:
        sys.exit(f"serving: {error}")
    except KeyboardInterrupt:
        sys.exit("serving: interrupted; what is finished is kept, run it again to go on")


def describe(served: Served, scenario: Scenario, tool: str) -> dict[str, Any]:
    """What tells rows apart, and the commit."""
    return asdict(served) | asdict(scenario) | {"tool": tool} | describe_run()


def is_done(served: Served, scenario: Scenario, tool: str) -> bool:
    """Whether this machine has measured it."""
    wanted = find_key(describe(served, scenario, tool))
    return any(find_key(row) == wanted for row in read_rows(SERVING))


def measure(served: Served, scenarios: Sequence[Scenario], tool: tuple[str, Measure], rounds: int, seconds: float) -> None:
    """Start a server on one export and measure scenario by scenario; each is written as soon as it is there."""
    images = draw_images(served.target, IMAGES)
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
            row = asdict(found) | describe(served, scenario, tool[0]) | {"time_ms": breakdown.average()}
            write_row(row, SERVING)
            print(f"{guarded} {scenario}: p50 x{found.p50_ratio:.3f}, throughput x{found.throughput_ratio:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
