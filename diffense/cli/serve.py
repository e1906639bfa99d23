"""`diffense serve`: start Triton on a repository and keep it running."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffense.errors import ServeError
from diffense.serve import TritonServer
from diffense.signals import ignore_signals, interrupt_on_signals


class ModelControl(StrEnum):
    """Whether all models are loaded at the start, or each when a client asks for it."""

    none = "none"
    explicit = "explicit"


def command(
    repository: Annotated[Path, typer.Argument(help="Model repository that `diffense export` wrote.")],
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 for a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 for a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Metrics port; 0 for a free one.")] = 8002,
    host: Annotated[str, typer.Option(help="Address to bind to; the default is for this machine only.")] = "127.0.0.1",
    log: Annotated[Path | None, typer.Option(help="File for the server's log; - for standard error.")] = None,
    model_control: Annotated[ModelControl, typer.Option(help="explicit: load models on request.")] = ModelControl.none,
    grace: Annotated[int, typer.Option(min=1, help="Seconds that running requests get at the end.")] = 15,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until the first inference must work.")] = 120.0,
    cache: Annotated[int, typer.Option(min=0, help="MiB for the responses of models exported with --cache; 0 for none.")] = 0,
    server: Annotated[str, typer.Option(help="auto (tritonserver on PATH, else the wheel's), wheel, or a program.")] = "auto",
) -> None:
    """Start Triton on REPOSITORY, check it with a real inference, and run until Ctrl-C or SIGTERM."""
    console = Console(stderr=True)
    triton = TritonServer(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        log=log,
        model_control=model_control.value,
        server=server,
        grace_s=grace,
        cache_mib=cache,
    )
    interrupt_on_signals()
    try:
        with console.status(f"starting Triton on {repository}"):
            endpoints = triton.start(timeout)
        if triton.files is not None and triton.files.onnxruntime_backend == "stand-in":
            console.print(
                f"Triton {triton.files.version} of the nvidia-pytriton wheel; its ONNX backend is a stand-in written "
                "in Python, so latencies are an upper bound for the container's"
            )
        for kind, address in (("HTTP", endpoints.http), ("gRPC", endpoints.grpc), ("metrics", endpoints.metrics)):
            typer.echo(f"{kind:8}{address}{'/metrics' if kind == 'metrics' else ''}")
        typer.echo(f"{'log':8}{'standard error' if log == Path('-') else triton.log}")
        typer.echo("ready; Ctrl-C stops the server")
        code = triton.wait()
        raise ServeError(f"the server ended by itself with code {code}: {triton.explain()} (log: {triton.log})")
    except KeyboardInterrupt:
        console.print("stopping: running requests may finish")
    finally:
        ignore_signals()
        code = triton.stop()
    if code:
        raise ServeError(f"the server did not stop in order (code {code}); it was ended after {grace} s")
