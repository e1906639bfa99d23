"""`diffense fit`: clean images and a classifier -> a guard."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffense.cli.notes import GROUPS_HELP, note_skipped
from diffense.errors import OptionError
from diffense.options import group_names, parse_floats, parse_names, parse_size


class Network(StrEnum):
    """Whether the learned part is used."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Guide(StrEnum):
    """What latents are guided by."""

    AUTO = "auto"
    LABEL = "label"
    LOGITS = "logits"


class Layout(StrEnum):
    """Layout of the graph's input."""

    NCHW = "NCHW"
    NHWC = "NHWC"


def command(
    target: Annotated[Path, typer.Argument(help="The classifier, an ONNX file; it is not changed.")],
    images: Annotated[Path, typer.Argument(help="Clean images you trust: a folder, .parquet, or .npz with x (N,H,W,C) uint8.")],
    out: Annotated[Path, typer.Option(help="Folder of the guard; an older guard there is replaced.")] = Path("guard"),
    alpha: Annotated[float, typer.Option(help="False-alarm rate you accept.")] = 0.01,
    network: Annotated[Network, typer.Option(help="Learned part: auto keeps it where held-out images gain.")] = Network.AUTO,
    guide: Annotated[
        Guide, typer.Option(help="Guide latents by label, or by logits where a class has few images.")
    ] = Guide.AUTO,
    taps: Annotated[str | None, typer.Option(help="Tensors to tap, comma-separated; found by itself otherwise.")] = None,
    logits: Annotated[str | None, typer.Option(help="Output with the class scores, where there are several.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, where the graph leaves it open.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the pixels; 1/255 by default.")] = None,
    mean: Annotated[str | None, typer.Option(help="Subtracted after scaling; one number or one a channel.")] = None,
    std: Annotated[str | None, typer.Option(help="Divided by after the mean; one number or one a channel.")] = None,
    layout: Annotated[Layout | None, typer.Option(help="Layout of the graph's input, where it is ambiguous.")] = None,
    groups: Annotated[str | None, typer.Option(help=GROUPS_HELP)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of split, noise bank and training.")] = 0,
    sigmas: Annotated[str | None, typer.Option(help="Noise levels, comma-separated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser calls in sequence.")] = 1,
    draws: Annotated[int, typer.Option(min=2, help="Noises a level, even.")] = 2,
    label_guidance: Annotated[float, typer.Option(help="1 is the label-conditional denoiser itself.")] = 1.0,
    data_guidance: Annotated[float, typer.Option(min=0.0, help="Pull of each step to the inspected input; 0 is none.")] = 0.0,
) -> None:
    """Fit a guard on clean images, in minutes and without the classifier's weights, training data or attacks."""
    from diffense.fit import default_preprocessing, fit_guard
    from diffense.images import load_images
    from diffense.settings import FitSettings
    from diffense.target import Target

    console = Console(stderr=True)
    settings = FitSettings(
        alpha=alpha,
        network=network.value,
        guide=guide.value,
        seed=seed,
        sigmas=parse_floats("--sigmas", sigmas) or FitSettings.sigmas,
        steps=steps,
        draws=draws,
        label_guidance=label_guidance,
        data_guidance=data_guidance,
    )
    opened = Target.open(
        target, logits=logits, size=parse_size(size) if size else None, layout=layout.value if layout else None
    )
    defaults = default_preprocessing(opened)
    given = {"scale": scale, "mean": parse_floats("--mean", mean), "std": parse_floats("--std", std)}
    if defaults.dtype == "uint8" and any(value is not None for value in given.values()):
        raise OptionError("--scale, --mean or --std: the classifier takes uint8 pixels as they are; leave them out")
    try:
        preprocessing = type(defaults).model_validate(
            {**defaults.model_dump(), **{key: value for key, value in given.items() if value is not None}}
        )
    except ValidationError as error:
        raise OptionError(f"--scale, --mean or --std: {error.errors()[0]['msg']}") from error
    loaded = load_images(images, preprocessing.size, preprocessing.channels)
    note_skipped(console, loaded)
    bar = Progress(TextColumn("fitting"), BarColumn(), TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("fitting", total=None, visible=False)
        guard = fit_guard(
            opened,
            loaded.pixels,
            out,
            preprocessing=preprocessing,
            taps=parse_names(taps),
            groups=None if groups is None else group_names(groups, loaded.names),
            settings=settings,
            notify=lambda message: console.print(message, markup=False, highlight=False),
            report=lambda step, total: bar.update(task, completed=step, total=total, visible=True),
        )
    print(f"{out}: guard {guard.guard_id} for {target.name}, {len(guard.manifest.taps)} taps, alpha {alpha:g}")
