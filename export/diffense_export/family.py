"""Builds all model folders of one guarded classifier: graphs, served code and configs."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import onnx_ir as ir

from diffense import names
from diffense.errors import ExportError
from diffense.graphs import load_model
from diffense.guard import Guard
from diffense.manifest import Tensor
from diffense.serving.settings import GatewayOptions, Loop, Wiring
from diffense.signature import describe_tensor
from diffense.target import TensorSpec, open_session, save_graph
from diffense.templates import find_templates
from diffense_export.configs import CONFIG_FILE, Accelerator, ConfigWriter, Step, format_config
from diffense_export.parity import Exported
from diffense_export.scorer import build_scorer
from diffense_export.whole import build_features, build_whole

VERSION: Final = "1"
MODEL_FILE: Final = "model.onnx"


@dataclass(frozen=True)
class FamilyOptions:
    """Options of `diffense_export.repository.export_guard`."""

    placement: Literal["separate", "shared"]
    loop: Loop
    gateway: bool
    gateway_options: GatewayOptions
    stream: bool
    production: bool
    max_batch_size: int
    instances: int
    threads: int
    queue: int
    cache: bool
    accelerator: Accelerator


class FamilyBuilder:
    """Builds into a stage folder.

    Args:
        guard: the fitted guard.
        target: the classifier's ONNX file.
        stage: empty folder.
        model: name of the production model.
        options: what to build.
        limit: ``max_batch_size`` of a production model that stands in the repository already.
    """

    def __init__(self, guard: Guard, target: Path, stage: Path, model: str, options: FamilyOptions, limit: int | None) -> None:
        self.guard, self.target, self.stage, self.model, self.options = guard, target, stage, model, options
        self.shared = options.placement == "shared"
        if options.cache and not self.shared:
            raise ExportError(
                "a response cache needs the shared placement: Triton tells inputs apart by 64 bits that are easy to meet, and "
                "with separate graphs an image made to meet a clean one's would get that one's verdict on outputs of its own"
            )
        if options.cache and options.loop == "direct":
            raise ExportError(
                "a response cache cannot stand before the verdict: Triton does not tell requests apart by the outputs they "
                f"want, and who asks {model}{names.TAPPED_SUFFIX} for others would take it from later answers; use loop whole"
            )
        self.max_batch_size = self._choose_batch(limit)
        self.writer = ConfigWriter(
            model, self.max_batch_size, options.instances, options.threads, options.queue, options.accelerator
        )
        manifest = guard.manifest
        self.input = self._pin(manifest.input)
        self.outputs = [self._pin(output) for output in manifest.outputs]
        self.verdicts = [
            self._pin(TensorSpec(name, dtype, (None, 1)))
            for name, dtype in zip(names.VERDICT_TENSORS, ("float32", "float32", "uint8"), strict=True)
        ]

    @cached_property
    def wiring(self) -> Wiring:
        """The models and the tensors between them."""
        suffix = self._choose_callee()
        return Wiring(
            model=self.model,
            outputs=tuple(output.name for output in self.outputs),
            logits=self.guard.manifest.logits,
            loop=self.options.loop,
            callee=self.model + suffix if suffix else "",
            latents_model=self.model + (names.TAPPED_SUFFIX if self.shared else names.FEATURES_SUFFIX),
            shared=self.shared,
            input=self.input.name,
            raw_logits="" if self.shared else names.RAW_LOGITS,
            probabilities=self.guard.manifest.probabilities,
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model folders, those that others depend on first."""
        made = [self.model] if self.options.production else []
        made += [name for name in (self.wiring.latents_model, self.wiring.callee) if name]
        made += [] if self.wiring.direct else [self.model + names.GUARD_SUFFIX]
        made += [self.model + names.GATEWAY_SUFFIX] if self.options.gateway else []
        made += [self.model + names.STREAM_SUFFIX] if self.options.stream else []
        return (*made, self.model + names.GUARDED_SUFFIX)

    def build(self) -> Exported:
        """Write every model folder into the stage.

        Raises:
            ExportError: tensors whose names collide, or of a type that Triton's Python backend lacks.
        """
        guarded = self._make_ensemble()
        if self.options.production:
            copy_graph(self.target, self._make_version(self.model))
            production = self.writer.make_onnx(self.model, [self.input], self.outputs, self._image)
            self.writer.keep_apart(production)
            self._write(production)
        latents = self._make_version(self.wiring.latents_model) / MODEL_FILE
        scored, judged = self.wiring.scored, self.wiring.direct
        if not self.shared:
            save_graph(build_features(self.guard, self.raw_logits, scored=scored, judged=judged), latents)
        elif scored:
            save_graph(build_whole(self.guard, judged=judged), latents)
        else:
            copy_graph(self.guard.tapped_path, latents.parent)
        inputs = [self.input] if self.shared else [self.input, self.raw_logits]
        outputs = [*(self.outputs if self.shared else ()), *(self.verdicts if judged else [self.judged])]
        if judged and not self.shared:
            outputs.append(replace(self.raw_logits, name=names.PASSED_LOGITS))
        config = self.writer.make_onnx(self.wiring.latents_model, inputs, outputs, self._image)
        self.writer.keep_apart(config)
        if self.options.cache:
            self.writer.keep_responses(config)
        self._write(config)
        callee = self._build_callee() if self.wiring.callee else None
        if not self.wiring.direct:
            self._build_guard()
        if self.options.gateway:
            self._build_front(names.GATEWAY_SUFFIX, "gateway", self.options.gateway_options.to_parameters())
        if self.options.stream:
            self._build_front(names.STREAM_SUFFIX, "stream", {}, decoupled=True)
        self._make_version(guarded.name)
        self._write(guarded)
        (self.stage / guarded.name / VERSION / ".gitkeep").touch()  # git and object stores keep no empty folders
        fused = self.options.loop == "fused"
        target = self.stage / self.model / VERSION / MODEL_FILE if self.options.production else self.target
        return Exported(target, latents, self.shared, None if fused else callee, callee if fused else None, scored, judged)

    @property
    def raw_logits(self) -> TensorSpec:
        """The logits as a features graph is given them."""
        logits = next(output for output in self.outputs if output.name == self.guard.manifest.logits)
        batch, _, *ones = logits.shape
        return TensorSpec(names.RAW_LOGITS, logits.dtype, (batch, self.guard.manifest.classes, *(1 for _ in ones)))

    @property
    def judged(self) -> TensorSpec:
        """What goes to the guard, latents or scores, as every model of the family states it."""
        width = 1 if self.wiring.scored else self.guard.manifest.latent_dim
        return self._pin(TensorSpec(self.wiring.judged, "float32", (None, width)))

    @property
    def _image(self) -> tuple[int, ...]:
        preprocessing = self.guard.preprocessing
        size, channels = preprocessing.size, preprocessing.channels
        return (channels, *size) if preprocessing.layout == "NCHW" else (*size, channels)

    @property
    def _raw(self) -> list[TensorSpec]:
        by_name = {output.name: output for output in self.outputs}
        return [TensorSpec(raw, by_name[name].dtype, by_name[name].shape) for raw, name in self.wiring.raw.items()]

    def _choose_callee(self) -> str | None:
        if self.options.loop in ("whole", "direct"):
            return None
        if self.options.loop == "fused":
            return names.SCORER_SUFFIX
        return names.DENOISER_SUFFIX if self.guard.scorer.needs_denoiser else None

    def _choose_batch(self, limit: int | None) -> int:
        manifest = self.guard.manifest
        tensors = (manifest.input, *manifest.outputs)
        if not all(tensor.shape and tensor.shape[0] is None for tensor in tensors):
            if limit:
                raise ExportError(f"{self.model} has max_batch_size {limit}, but its graph has tensors of fixed first size")
            return 0
        if limit is not None:
            return min(limit, self.options.max_batch_size)
        # A graph may declare a free batch and hold a fixed one inside.
        return min(manifest.batch or self.options.max_batch_size, self.options.max_batch_size)

    def _pin(self, tensor: Tensor | TensorSpec) -> TensorSpec:
        shape, batch = tensor.shape, self.guard.manifest.batch
        if not self.max_batch_size and shape and shape[0] is None and batch is not None:
            shape = (batch, *shape[1:])
        return TensorSpec(tensor.name, tensor.dtype, shape)

    def _make_version(self, model: str) -> Path:
        version = self.stage / model / VERSION
        version.mkdir(parents=True)
        return version

    def _write(self, config: Any) -> None:
        (self.stage / config.name / CONFIG_FILE).write_text(format_config(config), encoding="utf-8")

    def _build_callee(self) -> Path:
        path = self._make_version(self.wiring.callee) / MODEL_FILE
        if self.options.loop == "fused":
            save_graph(build_scorer(self.guard), path)
        elif self.guard.denoiser_path is not None:
            copy_graph(self.guard.denoiser_path, path.parent)
        session = open_session(path, optimize=False)
        inputs = [_free_batch(describe_tensor(node)) for node in session.get_inputs()]
        outputs = [_free_batch(describe_tensor(node)) for node in session.get_outputs()]
        self._write(self.writer.make_onnx(self.wiring.callee, inputs, outputs, threads=1))  # docs/decisions/0009
        return path

    def _build_guard(self) -> None:
        name = self.model + names.GUARD_SUFFIX
        version = self._make_version(name)
        shutil.copyfile(find_templates() / "guard" / "model.py", version / "model.py")
        for file in (names.MANIFEST_FILE, names.ARRAYS_FILE):
            shutil.copyfile(self.guard.directory / file, version / file)
        inputs, outputs = [*self._raw, self.judged], [*self.outputs, *self.verdicts]
        self._write(self.writer.make_python(name, inputs, outputs, self.wiring.to_parameters()))

    def _build_front(self, suffix: str, template: str, options: Mapping[str, str], decoupled: bool = False) -> None:
        name = self.model + suffix
        shutil.copyfile(find_templates() / template / "model.py", self._make_version(name) / "model.py")
        parameters = {**self._client_parameters, **self.wiring.to_parameters(), **options}
        outputs = [*self.outputs, *self.verdicts]
        config = self.writer.make_python(name, [self.input], outputs, parameters, decoupled)
        self.writer.keep_apart(config)
        self.writer.limit_queue(config)
        self._write(config)

    def _make_ensemble(self) -> Any:
        steps = self._list_direct_steps() if self.wiring.direct else self._list_steps()
        shown = [*self.outputs, *self.verdicts]
        name = self.model + names.GUARDED_SUFFIX
        return self.writer.make_ensemble(name, [self.input], shown, steps, self._client_parameters)

    def _list_direct_steps(self) -> list[Step]:
        image = {self.input.name: self.input.name}
        verdicts = {spec.name: spec.name for spec in self.verdicts}
        shown = {output.name: output.name for output in self.outputs}
        if self.shared:
            return [Step(self.wiring.latents_model, image, {**shown, **verdicts})]
        logits = self.guard.manifest.logits
        behind = {**image, names.RAW_LOGITS: names.RAW_LOGITS}
        last = Step(self.wiring.latents_model, behind, {names.PASSED_LOGITS: logits, **verdicts})
        return [Step(self.model, image, {**shown, logits: names.RAW_LOGITS}), last]

    def _list_steps(self) -> list[Step]:
        raw = {output: name for name, output in self.wiring.raw.items()}
        image = {self.input.name: self.input.name}
        latents = {self.wiring.judged: self.wiring.judged}
        if self.shared:
            front = [Step(self.wiring.latents_model, image, {**raw, **latents})]
        else:
            behind = {**image, names.RAW_LOGITS: raw[self.guard.manifest.logits]}
            front = [Step(self.model, image, raw), Step(self.wiring.latents_model, behind, latents)]
        # The guard hands the production outputs through: a tensor that is an output of the ensemble and an input of a
        # later step makes every request for a part of the outputs fail (Triton issue 7482).
        shown = [spec.name for spec in (*self.outputs, *self.verdicts)]
        inputs = {name: name for name in (*self.wiring.raw, self.wiring.judged)}
        return [*front, Step(self.wiring.guard_model, inputs, {name: name for name in shown})]

    @property
    def _client_parameters(self) -> dict[str, str]:
        manifest = self.guard.manifest
        return {
            names.GUARD_ID_PARAMETER: self.guard.guard_id,
            names.PREPROCESSING_PARAMETER: self.guard.preprocessing.model_dump_json(),
            names.LOGITS_PARAMETER: manifest.logits,
            names.ALPHA_PARAMETER: json.dumps(manifest.alpha),
        }


def copy_graph(source: Path, version: Path) -> None:
    """Copy an ONNX file as `MODEL_FILE`, byte for byte, with its external data files under their own names."""
    # Copies, not links: training scripts write over their ONNX file in place, and a server may have it mapped.
    shutil.copyfile(source, version / MODEL_FILE)
    for location in _list_external(load_model(source)):
        if Path(location).name == MODEL_FILE:
            raise ExportError(f"{source} keeps weights in {location}, the name of the served file; rename that file")
        (version / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / location, version / location)


def _list_external(model: ir.Model) -> Sequence[str]:
    values = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sorted({str(value.location) for value in values if isinstance(value, ir.ExternalTensor)})


def _free_batch(spec: TensorSpec) -> TensorSpec:
    """The guard calls with as many rows as it can score, whatever batch the target has."""
    return replace(spec, shape=(None, *spec.shape[1:]))
