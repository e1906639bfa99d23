"""TensorRT plans of an exported family: built from its ONNX graphs, compared with them, and served under the same names."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from tritonclient.utils import triton_to_np_dtype

import diffense
from diffense import names
from diffense.errors import ExportError, ParityError
from diffense.graphs import load_model, open_session, save_graph
from diffense.images import Preprocessing
from diffense_export.configs import CONFIG_FILE, USUAL_SHARE, format_config, parse_config
from diffense_export.engine import Engine, Shapes
from diffense_export.family import MODEL_FILE, VERSION
from diffense_export.half import convert_half
from diffense_export.installation import check_free, install_models, open_stage
from diffense_export.parity import draw_smooth_noise
from diffense_export.repository import read_export

Precision = Literal["fp32", "fp16"]

PLAN_FILE: Final = "model.plan"
PLANS_FILE: Final = "plans.json"
SIGMA: Final = 0.7  # noise of the denoiser's comparison; a logarithm is taken of it
TOLERANCES: Final[dict[Precision, float]] = {"fp32": 1e-3, "fp16": 0.1}  # of latents of unit variance; relative to 1 + |value|
# What Triton's tensorrt backend knows, in both sides' words.
TYPES: Final = {
    "TYPE_FP32": "FLOAT", "TYPE_FP16": "HALF", "TYPE_INT8": "INT8", "TYPE_UINT8": "UINT8", "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64", "TYPE_BOOL": "BOOL",
}  # fmt: skip


class PlanComparison(BaseModel):
    """An output of a plan against onnxruntime: largest difference relative to ``1 + |value|``, of whole numbers the share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tensor: str
    largest_difference: float
    tolerance: float


class PlanRecord(BaseModel):
    """One plan; shapes are least, usual and most of each input."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    bytes: int
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    parity: tuple[PlanComparison, ...]


class PlansManifest(BaseModel):
    """On what and how the plans of a family were built; lies in the guarded model's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    diffense_version: str
    guard_id: str
    gpu: str
    compute_capability: str
    tensorrt: str
    precision: Precision
    plans: tuple[PlanRecord, ...]


def build_plans(
    repository: Path,
    model: str,
    engine: Engine,
    *,
    precision: Precision = "fp16",
    production: bool = False,
    most: int = 32,
    cuda_graphs: bool = False,
) -> PlansManifest:
    """Build plans for the graphs of an exported family and serve them in place of the graphs; all of them, or none.

    The ONNX files stay beside the plans, so plans can be built again, on another GPU for instance.

    Args:
        repository: that `export_guard` wrote to.
        model: name of the production model.
        engine: TensorRT on the GPU that will serve.
        precision: ``fp16`` keeps normalisation, whitening and scoring in float32.
        production: also build the production model, which is left as it is otherwise.
        most: largest batch where the exported family states none.
        cuda_graphs: let the server capture CUDA graphs of the small batches.

    Raises:
        ExportError: there is no such export, `production` is asked for of one that left it alone, or a graph or one of
            its types is not for TensorRT.
        ParityError: a plan differs too much from its graph.
    """
    export = read_export(repository, model)
    guarded = model + names.GUARDED_SUFFIX
    configs = {name: parse_config(repository / name / CONFIG_FILE) for name in export.models}
    if production and model not in configs:
        raise ExportError(f"{model} was exported with --no-production and is left alone; leave --production out")
    chosen = [name for name, config in configs.items() if config.backend in ("onnxruntime", "tensorrt")]
    is_plan = model in configs and configs[model].backend == "tensorrt"  # of an earlier build, which this one replaces
    chosen = [name for name in chosen if name != model or production or is_plan]
    first = configs[guarded].input[0].dims[0]
    limit = export.max_batch_size or (first if first > 0 else most)
    stated = configs[guarded].parameters[names.PREPROCESSING_PARAMETER].string_value
    preprocessing = Preprocessing.model_validate_json(stated)
    with open_stage(repository) as stage:
        records = []
        for name in chosen:
            shutil.copytree(repository / name, stage / name)
            graph = find_graph(stage / name, configs[name])
            shapes = choose_shapes(configs[name], graph, limit)
            plan = _build(engine, graph, configs[name], shapes, precision, stage)
            inputs = _draw_inputs(configs[name], shapes, preprocessing)
            parity = _compare(name, open_session(graph), engine.run(plan, inputs), inputs, TOLERANCES[precision])
            _check_broken(name, engine, plan, inputs)
            graph.with_name(PLAN_FILE).write_bytes(plan)
            config = make_config(configs[name], cuda_graphs)
            (stage / name / CONFIG_FILE).write_text(format_config(config), encoding="utf-8")
            records.append(PlanRecord(model=name, bytes=len(plan), shapes=dict(shapes), parity=parity))
        manifest = PlansManifest(
            diffense_version=diffense.__version__,
            guard_id=export.guard_id,
            gpu=engine.device.name,
            compute_capability=engine.device.capability,
            tensorrt=engine.version,
            precision=precision,
            plans=tuple(records),
        )
        shutil.copytree(repository / guarded, stage / guarded)
        (stage / guarded / PLANS_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        check_free(repository, model, [*chosen, guarded])  # now, since building takes its time
        install_models(stage, repository, [*chosen, guarded], [])
    return manifest


def find_graph(folder: Path, config: Any) -> Path:
    """The ONNX file of a model folder, also where a plan is served.

    Raises:
        ExportError: it is not there.
    """
    graph = folder / VERSION / MODEL_FILE
    if not graph.is_file():
        raise ExportError(f"{config.name} has no {VERSION}/{MODEL_FILE} to build a plan from; export the guard again")
    return graph


def choose_shapes(config: Any, graph: Path, limit: int) -> dict[str, Shapes]:
    """Shapes of each input: batches from 1 to the limit where the batch is free, the warm-up's sizes everywhere else.

    Raises:
        ExportError: the config's warm-up does not tell the size of an image.
    """
    found = {}
    warm = config.model_warmup[0].inputs if config.model_warmup else {}
    for value in load_model(graph).graph.inputs:
        if value.shape is None or str(value.name) not in warm:
            raise ExportError(f"the config of {config.name} has no warm-up of {value.name}; export the guard again")
        sizes = list(warm[str(value.name)].dims)
        sizes = sizes if config.max_batch_size else sizes[1:]
        batch = value.shape[0]
        least, usual, most = (batch,) * 3 if isinstance(batch, int) else (1, max(1, limit // USUAL_SHARE), limit)
        found[str(value.name)] = Shapes((least, *sizes), (usual, *sizes), (most, *sizes))
    return found


def make_config(config: Any, cuda_graphs: bool) -> Any:
    """The config of the same model, its inputs and outputs, as a plan."""
    made = type(config)()
    made.CopyFrom(config)
    made.platform, made.backend, made.default_model_filename = "tensorrt_plan", "tensorrt", PLAN_FILE
    made.ClearField("optimization")
    if cuda_graphs:
        made.optimization.cuda.graphs = True
    if made.max_batch_size:
        made.dynamic_batching.SetInParent()  # a profile serves all sizes; configs for onnxruntime on a GPU may stack nothing
    for name in [name for name in made.parameters if name.endswith("_thread_count")]:
        del made.parameters[name]
    return made


def _build(engine: Engine, graph: Path, config: Any, shapes: Mapping[str, Shapes], precision: Precision, stage: Path) -> bytes:
    source = graph
    if precision == "fp16":
        source = stage / f"{config.name}.onnx"
        save_graph(convert_half(load_model(graph)), source)
    for tensor in (*config.input, *config.output):
        kind = _name_type(tensor)
        if kind not in TYPES:
            raise ExportError(f"{tensor.name} of {config.name} is {kind}, which TensorRT lacks; serve this model as ONNX")
    plan, types = engine.build(source, shapes)
    for tensor in (*config.input, *config.output):
        if types.get(tensor.name) != TYPES[_name_type(tensor)]:
            raise ExportError(
                f"{tensor.name} of {config.name} is {_name_type(tensor)}, but {types.get(tensor.name, 'missing')} in the plan; "
                "serve this model as ONNX"
            )
    return plan


def _draw_inputs(config: Any, shapes: Mapping[str, Shapes], preprocessing: Preprocessing) -> dict[str, NDArray[Any]]:
    """Inputs of one run at the largest batch: smooth noise for images, normal numbers for the guard's own tensors."""
    drawn: dict[str, NDArray[Any]] = {}
    generator = np.random.default_rng(0)
    for tensor in config.input:
        shape = shapes[tensor.name].most
        if tensor.name == names.SIGMA:
            drawn[tensor.name] = np.full(shape, SIGMA, np.float32)
        elif tensor.name in (names.NOISED, names.GUIDE, names.LATENTS, names.LOGITS):
            drawn[tensor.name] = generator.standard_normal(shape).astype(np.float32)
        elif tensor.name == names.RAW_LOGITS:
            dtype = triton_to_np_dtype(_name_type(tensor).removeprefix("TYPE_"))
            drawn[tensor.name] = generator.standard_normal(shape).astype(dtype)
        else:
            pixels = draw_smooth_noise(shape[0], preprocessing.size, preprocessing.channels)
            drawn[tensor.name] = preprocessing.apply(pixels)
    return drawn


def _compare(
    model: str, session: Any, outputs: Mapping[str, NDArray[Any]], inputs: Mapping[str, NDArray[Any]], tolerance: float
) -> tuple[PlanComparison, ...]:
    wanted = [output.name for output in session.get_outputs()]
    comparisons = []
    for name, reference in zip(wanted, session.run(wanted, dict(inputs)), strict=True):
        if name in (names.P_VALUE, names.FLAGGED):
            continue  # steps of the score, which the least difference may pass
        ours = outputs[name].reshape(reference.shape)
        if reference.dtype.kind == "f":
            wide = reference.astype(np.float64)
            difference = float((np.abs(ours - wide) / (1 + np.abs(wide))).max())
        else:
            difference = float((ours != reference).mean())
        if not difference <= tolerance:
            raise ParityError(
                f"{name} of the plan of {model} differs from onnxruntime by {difference:.2g}, more than {tolerance:g}; "
                "the repository is as it was"
            )
        comparisons.append(PlanComparison(tensor=name, largest_difference=difference, tolerance=tolerance))
    return tuple(comparisons)


def _check_broken(model: str, engine: Engine, plan: bytes, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Make sure that a broken image still breaks its own latents, score or verdict and nobody else's; so do broken logits."""
    given = {name: array for name, array in inputs.items() if name != names.RAW_LOGITS}
    (name, image), *others = given.items()
    if others or image.dtype.kind != "f":
        return
    broken = image.copy()
    broken[0].flat[0] = np.nan
    outputs = engine.run(plan, {**inputs, name: broken})
    for tensor, array in outputs.items():
        if tensor in (names.LATENTS, names.RAW_SCORE) and (np.isfinite(array[0]).any() or not np.isfinite(array[1:]).all()):
            raise ParityError(f"{tensor} of the plan of {model} hides an image that is no number; the repository is as it was")
    if names.FLAGGED not in outputs:
        return
    verdicts = [outputs[names.FLAGGED]]
    if names.RAW_LOGITS in inputs:
        logits = inputs[names.RAW_LOGITS].copy()
        logits[0].flat[0] = np.nan
        verdicts.append(engine.run(plan, {**inputs, names.RAW_LOGITS: logits})[names.FLAGGED])
    for flagged in verdicts:
        if (flagged[0] != names.UNSCORED).any() or (flagged[1:] == names.UNSCORED).any():
            raise ParityError(f"the plan of {model} judges what is no number; the repository is as it was")


def _name_type(tensor: Any) -> str:
    return str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)
