"""`diffense demo`: from nothing to triggered images that a real Triton flags."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from diffense.errors import ServeError
from diffense.signals import ignore_signals, interrupt_on_signals

if TYPE_CHECKING:
    from diffense.demo.run import Demo
    from diffense.report import Figures


def command(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running and print commands to try.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for models, guards, repository, report and summary.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of split, attacks, training and guard.")] = 0,
    alpha: Annotated[float, typer.Option(help="False-alarm rate you accept.")] = 0.01,
    attacks: Annotated[str, typer.Option(help="badnets, wanet, or both.")] = "badnets,wanet",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train backdoored digit classifiers, guard them on a real Triton, attack them and report what happened."""
    from diffense.demo.run import REPORT_FILE, SUMMARY_FILE, DemoOptions, run_demo
    from diffense.demo.stages import Stages
    from diffense.options import parse_names

    interrupt_on_signals()
    stages = Stages(quiet)
    with run_demo(DemoOptions(out, seed, alpha, tuple(parse_names(attacks) or ())), stages) as demo:
        console = Console()
        console.print(make_table(demo.figures))
        for victim in demo.victims:
            console.print(f"{victim.attack.title}: {victim.attack.recipe}", markup=False, highlight=False)
        for file in (REPORT_FILE, SUMMARY_FILE):
            console.print(out / file, markup=False, highlight=False, soft_wrap=True)
        if keep:
            try:
                console.print(list_commands(demo, out), markup=False, highlight=False, soft_wrap=True)
                code = demo.server.wait()
            except KeyboardInterrupt:
                ignore_signals()
                stages.say("stopping the server")
            else:
                raise ServeError(f"the server ended by itself with code {code}: {demo.server.explain()}")


def make_table(rows: "tuple[Figures, ...]") -> Table:
    """Lay out the figures, one row an attack."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("attack")
    for heading in (
        "clean accuracy\nbefore -> after",
        "attack success\nbefore -> after",
        "alarms\n(alpha)",
        "AUROC",
        "median ms\nbare -> guarded",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.attack,
            f"{100 * row.clean_accuracy_before:.2f} -> {row.clean_accuracy_after:.2%}",
            f"{100 * row.asr_before:.2f} -> {row.asr_after:.2%}",
            f"{row.fpr:.2%} ({100 * row.alpha:g}%)",
            f"{row.auroc:.4f}",
            f"{row.p50_ms_unguarded:.1f} -> {row.p50_ms_guarded:.1f}",
        )
    return table


def list_commands(demo: "Demo", out: Path) -> str:
    """Write down, with the real paths and ports, what can be tried against the running server."""
    from diffense.demo.run import REQUEST_FILE
    from diffense.names import GUARDED_SUFFIX

    victim, endpoints = demo.victims[0], demo.endpoints
    guarded, folder = victim.model + GUARDED_SUFFIX, out.resolve()
    images = folder / "images"
    return f"""
The server runs. Try, in another terminal:

curl -s http://{endpoints.http}/v2/models/{guarded}/infer -d @{folder / REQUEST_FILE}
diffense scan '{images / "clean"}' --url {endpoints.grpc} --model {guarded}
diffense scan '{images / victim.attack.key}' --url {endpoints.grpc} --model {guarded}
python - <<'END'
from pathlib import Path
from diffense.images import load_images
from diffense_client import GuardClient

images = load_images(Path("{images / victim.attack.key}"), (28, 28), 1)
with GuardClient("{endpoints.grpc}", "{guarded}") as client:
    prediction = client.infer(images.pixels)
print(prediction.outputs["logits"].argmax(axis=1), prediction.flagged)
END

Ctrl-C stops the server."""
