"""`diffense export`: write a guard and its target into a Triton model repository."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffense.cli.notes import note_skipped
from diffense.signals import interrupt_on_signals


class Placement(StrEnum):
    """Where the latents are computed."""

    SEPARATE = "separate"
    SHARED = "shared"


class Loop(StrEnum):
    """Who runs the guided steps."""

    BLS = "bls"
    FUSED = "fused"
    WHOLE = "whole"
    DIRECT = "direct"


class Accelerator(StrEnum):
    """How the onnxruntime backend runs the graphs on a GPU."""

    NONE = "none"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class Policy(StrEnum):
    """What the gateway does with a flagged image."""

    ANNOTATE = "annotate"
    ABSTAIN = "abstain"
    REJECT = "reject"


def command(
    guard: Annotated[Path, typer.Argument(help="Guard bundle that `diffense fit` wrote.")],
    target: Annotated[Path, typer.Option(help="The classifier's ONNX file.")],
    repository: Annotated[Path, typer.Option(help="Triton model repository to write to; made when missing.")],
    model: Annotated[str, typer.Option(help="Name of the production model; the others are called after it.")],
    placement: Annotated[
        Placement, typer.Option(help="Latents from a graph of their own, or from one graph with the outputs.")
    ] = Placement.SEPARATE,
    loop: Annotated[
        Loop,
        typer.Option(
            help="The guard calls the denoiser step by step, or one graph of all steps, or they are in the latents' graph, "
            "or the verdict too (MODEL_guarded then counts no verdicts)."
        ),
    ] = Loop.BLS,
    gateway: Annotated[bool, typer.Option(help="Also write MODEL_gateway, which answers whatever happens.")] = True,
    stream: Annotated[
        bool, typer.Option(help="Also write MODEL_stream, which answers before the verdict is there (gRPC streams).")
    ] = False,
    no_production: Annotated[
        bool, typer.Option("--no-production", help="MODEL stands in the repository already: leave it alone.")
    ] = False,
    policy: Annotated[
        Policy, typer.Option(help="Gateway: add the verdict, withhold a flagged image's outputs, or refuse its request.")
    ] = Policy.ANNOTATE,
    budget_ms: Annotated[int, typer.Option(min=1, help="Gateway: time for the verdict, after production.")] = 500,
    closed: Annotated[bool, typer.Option("--closed", help="Gateway: no verdict is an error.")] = False,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 32,
    instances: Annotated[int, typer.Option(min=1, help="Copies of each model.")] = 1,
    threads: Annotated[
        int,
        typer.Option(min=0, help="Threads of each graph, where the server gives each its own; 0: the runtime chooses."),
    ] = 0,
    queue: Annotated[
        int, typer.Option(min=0, help="Most requests that wait for gateway and stream; more are refused. 0: no limit.")
    ] = 0,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="Let the server keep what the shared graph gave for an image (serve --cache)."),
    ] = False,
    accelerator: Annotated[
        Accelerator,
        typer.Option(help="What Triton's onnxruntime backend runs the graphs with on a GPU; cuda: images are not stacked."),
    ] = Accelerator.NONE,
    clean: Annotated[Path | None, typer.Option(help="Clean images for the parity gate; smooth noise without them.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build and compare everything, install nothing.")] = False,
) -> None:
    """Write the models that serve TARGET with its guard; every exported graph is compared with its source first."""
    from rich.console import Console

    from diffense.guard import Guard
    from diffense.images import load_images
    from diffense.serving.settings import GatewayOptions
    from diffense_export.repository import export_guard

    interrupt_on_signals()
    progress = Console(stderr=True)
    loaded = Guard.load(guard, target)
    preprocessing = loaded.preprocessing
    images = load_images(clean, preprocessing.size, preprocessing.channels) if clean else None
    if images is not None:
        note_skipped(progress, images)
    with progress.status("building and comparing the graphs"):
        report = export_guard(
            loaded,
            target,
            repository,
            model,
            placement=placement.value,
            loop=loop.value,
            gateway=gateway,
            stream=stream,
            gateway_options=GatewayOptions(policy.value, budget_ms, closed),
            production=not no_production,
            max_batch_size=max_batch_size,
            instances=instances,
            threads=threads,
            queue=queue,
            cache=cache,
            accelerator=accelerator.value,
            clean=images.pixels if images else None,
            dry_run=dry_run,
        )
    verb = "would write" if dry_run else "wrote"
    for name in report.models:
        typer.echo(f"{verb} {report.repository / name}")
    for name in report.removed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {report.repository / name} (of an earlier export)")
    parity = report.manifest.parity
    for comparison in parity.comparisons:
        difference = "identical" if comparison.identical else f"differs by {comparison.largest_difference:.1e}"
        progress.print(
            f"{comparison.tensor} ({comparison.graph}, {comparison.source}): {difference}, allowed {comparison.tolerance:.0e}",
            markup=False,
        )
    progress.print(
        f"on {parity.images} {parity.origin}: rank correlation {parity.neutrality.rank_correlation:.6f}, "
        f"{parity.neutrality.verdict_flips} verdicts changed",
        markup=False,
    )
