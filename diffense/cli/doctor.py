"""`diffense doctor`: what this machine has, and the fix for what is missing."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this machine; exit code 0 when serving is possible, 1 when it is not."""
    from diffense.doctor import can_serve, examine

    findings = examine()
    possible = can_serve(findings)
    if as_json:
        typer.echo(json.dumps({"can_serve": possible, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("", "what", "found", "to do"):
            table.add_column(heading, overflow="fold")
        for finding in findings:
            mark = "[red]x[/]" if finding.blocks else "[yellow]-[/]" if finding.fix else "[green]ok[/]"
            cells = (finding.name, finding.value or "missing", finding.fix or "")
            table.add_row(mark, *map(Text, cells))  # whose brackets are no markup
        console = Console()
        console.print(table)
        console.print("serving is possible" if possible else "[red]serving is not possible: see the lines with x[/]")
    if not possible:
        raise typer.Exit(1)
