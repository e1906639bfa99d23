"""`diffense bench`: what the guard costs on a running server."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from diffense.cli.notes import note_skipped
from diffense.cli.scan import Protocol
from diffense.errors import OptionError
from diffense.options import parse_counts

if TYPE_CHECKING:
    from diffense.bench.comparison import Comparison


class Tool(StrEnum):
    """What measures."""

    auto = "auto"
    perf_analyzer = "perf_analyzer"
    builtin = "builtin"


class SharedMemory(StrEnum):
    """Whether inputs lie in system shared memory."""

    off = "off"
    on = "on"
    both = "both"


def command(
    url: Annotated[str, typer.Option(help="Server: host:port, also with grpc:// or http:// in front.")],
    model: Annotated[str, typer.Option(help="Guarded model, usually <production model>_guarded.")],
    beside: Annotated[str | None, typer.Option(help="Production model to compare with; read off MODEL by default.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to send: folder, .parquet or .npz; smooth noise without them.")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="Default: what the URL says, else grpc.", show_default=False)
    ] = None,
    batch: Annotated[str, typer.Option(help="Images a request; several separated by commas.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Requests under way; several separated by commas.")] = "1",
    shared_memory: Annotated[SharedMemory, typer.Option(help="Inputs in system shared memory.")] = SharedMemory.off,
    tool: Annotated[Tool, typer.Option(help="auto: perf_analyzer where one is on PATH, else built in.")] = Tool.auto,
    perf_analyzer: Annotated[Path | None, typer.Option(help="The perf_analyzer to use.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of unguarded and guarded.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each measurement.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Write each finished scenario to this JSON file at once.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scenarios as JSON.")] = False,
) -> None:
    """Measure a guarded model beside its production model, in turns on one running server."""
    try:
        from diffense.bench.comparison import choose_tool, compare_models, list_scenarios, name_production, read_models
        from diffense.bench.perf_analyzer import INSTALL, find_perf_analyzer
        from diffense_client._failures import choose_protocol, split_url
    except ModuleNotFoundError as error:
        raise OptionError(f"{error.name} is missing; pip install 'diffense[client]'") from error
    from diffense.bench.results import write_comparisons

    chosen = choose_protocol(url, protocol.value if protocol else None)
    _, host, port = split_url(url)
    address, production = f"{host}:{port}", beside or name_production(model)
    if tool is Tool.builtin and perf_analyzer is not None:
        raise OptionError("--tool builtin and --perf-analyzer name two tools; leave one out")
    program = None if tool is Tool.builtin else find_perf_analyzer(perf_analyzer)
    if tool is Tool.perf_analyzer and program is None:
        raise OptionError(f"no perf_analyzer on PATH; {INSTALL}, or give --perf-analyzer")
    shared = {"off": [False], "on": [True], "both": [False, True]}[shared_memory.value]
    scenarios = list(
        list_scenarios(
            chosen,
            parse_counts("--batch", batch),
            parse_counts("--concurrency", concurrency),
            shared,
        )
    )
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    served = read_models(address, scenarios[0].protocol, model, production)
    pixels = load_pixels(images, served.preprocessing.size, served.preprocessing.channels, notes)
    found: list[Comparison] = []
    for scenario in scenarios:
        with notes.status(f"batch {scenario.batch}, {scenario.concurrency} under way, {len(found)}/{len(scenarios)} done"):
            found.append(
                compare_models(
                    address, served, production, scenario, pixels, tool=choose_tool(program), rounds=rounds, seconds=seconds
                )
            )
        if out is not None:
            write_comparisons(found, out)
    if as_json:
        typer.echo(json.dumps([asdict(comparison) for comparison in found]))
    else:
        _print_table(found)


def load_pixels(path: Path | None, size: tuple[int, int], channels: int, notes: Console) -> Any:
    """(N, H, W, C) uint8: the given images, or smooth noise."""
    if path is None:
        from diffense_export.parity import draw_smooth_noise

        return draw_smooth_noise(32, size, channels)
    from diffense.images import load_images

    loaded = load_images(path, size, channels)
    note_skipped(notes, loaded)
    return loaded.pixels


def _print_table(found: "list[Comparison]") -> None:
    typer.echo(f"{found[0].guarded_model} beside {found[0].model}, {found[0].protocol}, measured by {found[0].tool}")
    table = Table()
    for title in ("batch", "under way", "shm", "p50 ms", "guarded", "p99 ms", "guarded", "images/s", "guarded"):
        table.add_column(title, justify="right")
    for title in ("p50 ratio", "throughput ratio"):
        table.add_column(title, justify="right", style="bold")
    for row in found:
        pairs = [(getattr(row.unguarded, name), getattr(row.guarded, name)) for name in ("p50_ms", "p99_ms", "throughput")]
        shown = [f"{value:.4g}" for pair in pairs for value in pair]
        ratios = (f"{row.p50_ratio:.2f}", f"{row.throughput_ratio:.2f}")
        table.add_row(str(row.batch), str(row.concurrency), "on" if row.shared_memory else "off", *shown, *ratios)
    Console().print(table)
