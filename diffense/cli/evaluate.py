"""`diffense evaluate`: one cell of the bench. Needs a checkout: the bench is no part of the installed package."""

import json
from typing import Annotated

import typer
from rich.console import Console

from diffense.errors import OptionError


def command(
    dataset: Annotated[str, typer.Option(help="Image set; an unknown name lists the known ones.")],
    attack: Annotated[str, typer.Option(help="Attack; an unknown name lists the known ones.")],
    network: Annotated[str | None, typer.Option(help="The target's architecture; the set's usual one by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the target and its attack.")] = 0,
    guard_seed: Annotated[int, typer.Option(help="Of the guard.")] = 0,
    clean_per_class: Annotated[int | None, typer.Option(min=1, help="Most clean images a class for the defender.")] = None,
    peers: Annotated[str, typer.Option(help="none, cheap, all, or names separated by commas.")] = "none",
    record: Annotated[bool, typer.Option(help="Write the row into benchmarks/results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row as JSON.")] = False,
) -> None:
    """Train or fetch a backdoored target, fit a guard on clean images, and measure guard and peers."""
    try:
        from benchmarks.evaluation import evaluate_cell
        from benchmarks.matrix import choose_peers
        from benchmarks.records import write_detection
        from benchmarks.targets import make_cell
    except ImportError as error:
        raise OptionError(
            f"evaluate needs the bench ({error}): run it in a checkout of the repository, after pip install -e '.[dev]'"
        ) from error
    console = Console(stderr=True)
    row = evaluate_cell(
        make_cell(dataset, attack, network, seed),
        clean_per_class=clean_per_class,
        guard_seed=guard_seed,
        peers=choose_peers(peers),
        progress=lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True),
    )
    if record:
        write_detection(row)
    if as_json:
        print(json.dumps(row))
        return
    names = ("clean_accuracy", "asr_before", "auroc", "tpr_at_fpr1", "fpr_at_1", "asr_after_fpr1", "asr_after_fpr5")
    print(", ".join(f"{name} {row[name]:.4f}" for name in names if row[name] is not None))
    for name, peer in row["peers"].items():
        shown = ", ".join(f"{figure} {peer[figure]:.4f}" for figure in ("auroc", "tpr_at_fpr5") if peer[figure] is not None)
        print(f"  {name}: {shown or 'no triggered image reaches the label'}")
