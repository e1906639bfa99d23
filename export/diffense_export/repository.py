"""Writes a guard and its target as the models of one family into a Triton repository."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

import diffense
from diffense import names
from diffense.errors import ExportError, OptionError, WrongTargetError
from diffense.guard import Guard
from diffense.serving.settings import GatewayOptions, Loop
from diffense.target import hash_target
from diffense_export.configs import Accelerator
from diffense_export.family import FamilyBuilder, FamilyOptions
from diffense_export.installation import check_free, install_models, list_family, open_stage
from diffense_export.parity import ParityReport, check_parity
from diffense_export.production import read_batch_limit

EXPORT_FILE: Final = "diffense_export.json"
LONGEST_NAME: Final = 200
NAME: Final = re.compile(r"\w[\w.-]*", re.ASCII)


class ExportManifest(BaseModel):
    """What was exported, from what, and how near it is to its source; lies in the guarded model's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    diffense_version: str
    guard_id: str
    target_sha256: str
    placement: Literal["separate", "shared"]
    loop: Loop
    max_batch_size: int
    models: tuple[str, ...]
    parity: ParityReport


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        repository: where to.
        models: model folders that were written, or with ``dry_run`` would have been.
        removed: model folders of an earlier export that have no place in this one.
        manifest: what the guarded model's folder says.
        dry_run: whether nothing was installed.
    """

    repository: Path
    models: tuple[str, ...]
    removed: tuple[str, ...]
    manifest: ExportManifest
    dry_run: bool


def export_guard(
    guard: Guard,
    target: Path,
    repository: Path,
    model: str,
    *,
    placement: Literal["separate", "shared"] = "separate",
    loop: Loop = "bls",
    gateway: bool = True,
    gateway_options: GatewayOptions | None = None,
    stream: bool = False,
    production: bool = True,
    max_batch_size: int = 32,
    instances: int = 1,
    threads: int = 0,
    queue: int = 0,
    cache: bool = False,
    accelerator: Accelerator = "none",
    clean: NDArray[np.uint8] | None = None,
    dry_run: bool = False,
) -> ExportReport:
    """Write the models of one guarded classifier; all of them, or none.

    Every graph has to pass the parity gate first. An earlier export for the same model is replaced.

    Args:
        guard: the fitted guard.
        target: the classifier's ONNX file.
        repository: Triton's model repository; made when missing.
        model: name of the production model; the others are called after it.
        placement: ``separate`` computes the latents in a graph of their own, ``shared`` in one with the outputs.
        loop: ``bls`` calls the denoiser step by step, ``fused`` one graph that holds all steps; ``whole`` puts these into the
            graph that makes the latents, ``direct`` the verdict too: there is no guard's model then, and the server's
            metrics count the verdicts of gateway and stream alone.
        gateway: also write the gateway.
        gateway_options: its policy and budget; neither ensemble nor stream applies them.
        stream: also write the stream, which gives the production outputs before the verdict is there.
        production: False leaves the model that stands in the repository alone; it must be the guard's target.
        max_batch_size: most images of a request, and of a stack of requests. Classifiers of one fixed batch keep that.
        instances: copies of each model.
        threads: threads of each graph; 0 leaves it to the runtime, but for denoiser and scorer, which get one.
        queue: most requests that wait for the gateway, and for the stream; what comes on top is refused at once (UNAVAILABLE),
            and each of the two runs as three processes then, of which `instances` work at once. 0: no limit. The ensemble has
            none.
        cache: whether the server may keep what the shared graph gave for an input (started with `diffense serve --cache`).
        accelerator: how the onnxruntime backend runs the graphs where there is a GPU: ``cuda`` and ``tensorrt`` keep to
            float32 where they can, and with ``cuda`` models that take images stack no requests, unless `queue` asks for it;
            ``none`` leaves it to the backend.
        clean: (N, height, width, channels) uint8 clean images for the parity gate; None for smooth noise.
        dry_run: do everything except the installation.

    Raises:
        WrongTargetError: the guard belongs to another classifier.
        ParityError: an exported graph differs from its source.
        ExportError: a name, a tensor or a folder stands in the way.
        OptionError: options of a gateway, or of fronts, that are not written.
    """
    _check_name(model)
    front = gateway_options or GatewayOptions()
    if not gateway and front != GatewayOptions():
        raise OptionError("--policy, --budget-ms and --closed are for the gateway alone; leave them or --no-gateway out")
    if queue and not gateway and not stream:
        raise OptionError("--queue limits gateway and stream, of which none is written; leave it or --no-gateway out")
    if max_batch_size < 1:
        raise ExportError(f"max_batch_size is {max_batch_size}; it must be at least 1")
    if hash_target(target) != guard.manifest.target_sha256:
        raise WrongTargetError(f"{target} is not {guard.manifest.target_name}, which the guard was fitted on")
    limit = None if production else read_batch_limit(repository / model, guard)
    options = FamilyOptions(
        placement,
        loop,
        gateway,
        front,
        stream,
        production,
        max_batch_size,
        instances,
        threads,
        queue,
        cache,
        accelerator,
    )
    with open_stage(repository) as stage:
        builder = FamilyBuilder(guard, target, stage, model, options, limit)
        check_free(repository, model, builder.models)
        exported = builder.build()
        manifest = ExportManifest(
            diffense_version=diffense.__version__,
            guard_id=guard.guard_id,
            target_sha256=guard.manifest.target_sha256,
            placement=placement,
            loop=loop,
            max_batch_size=builder.max_batch_size,
            models=builder.models,
            parity=check_parity(guard, exported, clean),
        )
        text = manifest.model_dump_json(indent=1) + "\n"
        (stage / (model + names.GUARDED_SUFFIX) / EXPORT_FILE).write_text(text, encoding="utf-8")
        stale = _list_stale(list_family(repository, model), builder.models, kept=() if production else (model,))
        if not dry_run:
            check_free(repository, model, builder.models)  # again: building and comparing take their time
            install_models(stage, repository, builder.models, stale)
    return ExportReport(repository, builder.models, stale, manifest, dry_run)


def read_export(repository: Path, model: str) -> ExportManifest:
    """Read what an export wrote about itself.

    Raises:
        ExportError: there is no such repository, no export for this model in it, or one by another version.
    """
    if not repository.is_dir():
        raise ExportError(f"{repository} is no folder; give the model repository that `diffense export` wrote to")
    path = repository / (model + names.GUARDED_SUFFIX) / EXPORT_FILE
    if not path.is_file():
        found = sorted(file.parent.name.removesuffix(names.GUARDED_SUFFIX) for file in repository.glob(f"*/{EXPORT_FILE}"))
        hint = f"choose from {', '.join(found)}" if found else "`diffense export` writes one"
        raise ExportError(f"{repository} holds no export for a model {model!r}; {hint}")
    try:
        return ExportManifest.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise ExportError(f"{path} is no export manifest of this version; export the guard again") from None


def _list_stale(found: Sequence[str], written: Sequence[str], kept: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in found if name not in written and name not in kept)


def _check_name(model: str) -> None:
    # Triton's Python backend hands the name to a shell, unquoted, and its stub decodes it as ASCII.
    if not NAME.fullmatch(model) or len(model) > LONGEST_NAME:
        raise ExportError(
            f"{model!r} cannot be the name of a guarded model, since Triton's Python backend starts its processes through a "
            f"shell: use ASCII letters, digits, '_', '-' and '.' (not '-' or '.' first), at most {LONGEST_NAME} characters"
        )
