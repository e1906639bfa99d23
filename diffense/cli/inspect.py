"""`diffense inspect`: what a guard or a classifier holds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffense.cli.fit import Layout
from diffense.text import printable


def command(
    what: Annotated[Path, typer.Argument(help="A guard's folder, or a classifier's ONNX file.")],
    logits: Annotated[str | None, typer.Option(help="Output with the class scores, where there are several.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, where the graph leaves it open.")] = None,
    layout: Annotated[Layout | None, typer.Option(help="Layout of the graph's input, where it is ambiguous.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest, or the target's description, as JSON.")] = False,
) -> None:
    """Show a guard's manifest, or a classifier's input, outputs and taps."""
    from diffense.description import GuardDescription, TargetDescription, describe_guard, describe_target
    from diffense.options import parse_size

    if what.is_dir():
        description: GuardDescription | TargetDescription = describe_guard(what)
    else:
        description = describe_target(what, logits, parse_size(size) if size else None, layout.value if layout else None)
    if as_json:
        print(description.model_dump_json(indent=1))
        return
    console = Console()
    for name, value in description.facts().items():
        console.print(f"{name:<22} {printable(value)}", markup=False, highlight=False, soft_wrap=True)
    table = Table("tap", "kind", "shape", "depth", "used", title="taps, shallow to deep")
    for tap in description.taps:
        table.add_row(
            Text(printable(tap.name)),
            tap.kind,
            "x".join(map(str, tap.shape)),
            f"{tap.depth:.2f}",
            "yes" if tap.used else "no",
        )
    console.print(table)
