"""`diffense score`: score images without a server."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffense.cli.notes import note_skipped
from diffense.text import printable

SHOWN = 50


def command(
    guard: Annotated[Path, typer.Argument(help="The guard's folder.")],
    images: Annotated[Path, typer.Argument(help="A folder, .parquet, or .npz with x (N,H,W,C) uint8.")],
    target: Annotated[Path | None, typer.Option(help="Check that the guard belongs to this classifier.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Score images with a guard, in this process."""
    from diffense.guard import Guard
    from diffense.images import load_images

    loaded_guard = Guard.load(guard, target)
    preprocessing = loaded_guard.preprocessing
    images_read = load_images(images, preprocessing.size, preprocessing.channels)
    note_skipped(Console(stderr=True), images_read)
    scored = loaded_guard.score_all(images_read.pixels)
    rows = [
        {
            "index": index,
            "path": name,
            "label": int(scored.labels[index]),
            "score": round(float(scored.scores[index]), 6),
            "p_value": round(float(scored.p_values[index]), 9),
            "flagged": int(scored.flagged[index]),
        }
        for index, name in enumerate(images_read.names)
    ]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    flagged = [row for row in rows if row["flagged"]]
    table = Table("image", "label", "score", "p-value")
    for row in flagged[:SHOWN]:
        table.add_row(Text(printable(str(row["path"]))), str(row["label"]), f"{row['score']:.3f}", f"{row['p_value']:.4f}")
    console = Console()
    if flagged:
        console.print(table)
    more = f", the first {SHOWN} shown" if len(flagged) > SHOWN else ""
    print(f"{len(rows)} scored, {len(flagged)} flagged at alpha {loaded_guard.manifest.alpha:g}{more}")
