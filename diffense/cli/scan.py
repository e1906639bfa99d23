"""`diffense scan`: send images to a guarded model and list what it flags."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from diffense.cli.notes import note_skipped
from diffense.errors import OptionError
from diffense.names import FLAGGED_YES, PASSED, UNSCORED
from diffense.text import printable

if TYPE_CHECKING:
    from diffense_client.scan import ScanRow

FLAGGED_EXIT: Final = 1
UNSCORED_EXIT: Final = 2
VERDICTS: Final = {FLAGGED_YES: "flagged", UNSCORED: "not scored"}


class Protocol(StrEnum):
    """How to talk to the server."""

    grpc = "grpc"
    http = "http"


def command(
    images: Annotated[Path, typer.Argument(help="Folder of images, .parquet table or .npz file.")],
    url: Annotated[str, typer.Option(help="Server: host:port, also with grpc:// or http:// in front.")],
    model: Annotated[str, typer.Option(help="Guarded model, usually <production model>_guarded.")],
    protocol: Annotated[
        Protocol | None, typer.Option(help="Default: what the URL says, else grpc.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image instead of a table.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write all rows to this CSV file.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Also write all rows to this Parquet file.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of one request; default: the most that the server takes.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Deadline of each request in seconds.")] = 10.0,
) -> None:
    """Judge IMAGES with a served guard; unreadable ones are reported and skipped.

    Exit code 0: all passed. 1: some were flagged. 2: an error, or none was flagged but some could not be scored.
    """
    try:
        from diffense_client import GuardClient
        from diffense_client._failures import choose_protocol
        from diffense_client.scan import check_writable, scan_images, write_csv, write_parquet
    except ModuleNotFoundError as error:
        raise OptionError(f"{error.name} is missing; pip install 'diffense[client]'") from error
    from diffense.images import load_images

    for file in (csv, parquet):
        if file is not None:
            check_writable(file)
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    chosen = choose_protocol(url, protocol.value if protocol else None)
    rows: list[ScanRow] = []
    with GuardClient(url, model, chosen, timeout_s=timeout, batch_size=batch_size) as client:
        wanted = client.describe().preprocessing
        loaded = load_images(images, wanted.size, wanted.channels)
        note_skipped(notes, loaded)
        with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
            task = progress.add_task("scanning", total=len(loaded.pixels))
            for batch in scan_images(client, loaded, batch_size):
                rows += batch
                progress.advance(task, len(batch))
                if as_json:
                    for row in batch:
                        typer.echo(json.dumps(asdict(row)))
    if csv is not None:
        write_csv(rows, csv)
    if parquet is not None:
        write_parquet(rows, parquet)
    flagged = sum(row.flagged == FLAGGED_YES for row in rows)
    unscored = sum(row.flagged == UNSCORED for row in rows)
    summary = f"{len(rows)} scanned, {flagged} flagged, {unscored} unscored, {len(loaded.skipped)} skipped"
    if as_json:
        notes.print(summary)
    else:
        _print_table(rows)
        typer.echo(summary)
    if flagged:
        raise typer.Exit(FLAGGED_EXIT)
    if unscored:
        raise typer.Exit(UNSCORED_EXIT)


def _print_table(rows: "list[ScanRow]") -> None:
    """Print what did not pass, most suspicious first; nothing when all passed."""
    found = sorted((row for row in rows if row.flagged != PASSED), key=lambda row: (row.flagged, row.p_value, row.index))
    if not found:
        return
    table = Table()
    table.add_column("index", justify="right")
    table.add_column("path", overflow="fold")
    for title in ("label", "score", "p_value"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for row in found:
        table.add_row(
            str(row.index),
            Text(printable(row.path)),
            str(row.label),
            f"{row.score:.4g}",
            f"{row.p_value:.4g}",
            VERDICTS[row.flagged],
        )
    Console().print(table)
