"""`diffense plans`: TensorRT plans for an exported guard, built on the GPU that will serve."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffense.signals import interrupt_on_signals


class Precision(StrEnum):
    """Of the layers; whitening and scoring are float32 in both."""

    FP16 = "fp16"
    FP32 = "fp32"


def command(
    repository: Annotated[Path, typer.Argument(help="Triton model repository that `diffense export` wrote to.")],
    model: Annotated[str, typer.Argument(help="Name of the production model.")],
    precision: Annotated[
        Precision, typer.Option(help="Of the layers; normalisation, whitening and scoring are float32 in both.")
    ] = Precision.FP16,
    production: Annotated[
        bool, typer.Option("--production", help="Also build MODEL itself, which is left alone otherwise.")
    ] = False,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Largest batch, where the export states none.")] = 32,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Let Triton capture CUDA graphs of small batches.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of measured timings; REPOSITORY.timing beside the repository without it.")
    ] = None,
) -> None:
    """Build TensorRT plans for the graphs beside MODEL and serve them under the same names; needs the serving GPU."""
    from rich.console import Console

    from diffense_export.engine import open_engine
    from diffense_export.plans import build_plans
    from diffense_export.repository import read_export

    interrupt_on_signals()
    read_export(repository, model)
    home = repository.resolve()
    engine = open_engine(timing_cache or home.with_name(f"{home.name}.timing"), repository, model)
    with Console(stderr=True).status("building and comparing the plans"):
        manifest = build_plans(
            repository,
            model,
            engine,
            precision=precision.value,
            production=production,
            most=max_batch_size,
            cuda_graphs=cuda_graphs,
        )
    for plan in manifest.plans:
        worst = max(comparison.largest_difference for comparison in plan.parity)
        typer.echo(f"{plan.model}: {plan.bytes / 1e6:.1f} MB, {manifest.precision}, differs from onnxruntime by {worst:.1e}")
    typer.echo(f"TensorRT {manifest.tensorrt} on {manifest.gpu} ({manifest.compute_capability})")
