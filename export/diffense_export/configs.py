"""Model configs of the Triton repository, built as Triton's own protobuf messages from what the graphs really take.

Only fields that Triton 2.51 already knows are used, and of the onnxruntime backend only what its C++ form reads.
The instance kind is left out: the server then chooses a GPU where there is one, and KIND_GPU fails to load without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from diffense.errors import ExportError
from diffense.serving.settings import AT_ONCE_PARAMETER
from diffense.target import TensorSpec

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb
except ModuleNotFoundError as error:
    raise ExportError(f'{error.name} is needed to write configs; pip install "diffense[client]"') from None

CONFIG_FILE: Final = "config.pbtxt"
FAMILY_PARAMETER: Final = "diffense_family"  # in every config that we write: the production model it belongs to
FRONT_INSTANCES: Final = 3
BATCH_UNSET: Final = "max_batch_size: 0\n"
USUAL_SHARE: Final = 4  # TensorRT tunes for a quarter of the largest batch

Accelerator = Literal["none", "cuda", "tensorrt"]

DATA_TYPES: Final = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "float64": "TYPE_FP64", "bool": "TYPE_BOOL", "string": "TYPE_STRING",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32", "uint64": "TYPE_UINT64",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of an ensemble: the model's tensor names -> the ensemble's tensor names."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class ConfigWriter:
    """Makes the configs of one family of models.

    Attributes:
        family: name of the production model.
        max_batch_size: 0 when the first dimension is no free batch dimension everywhere; shapes are then whole.
        instances: copies of each model that run at once.
        threads: threads of each graph's runtime, 0 for as many as it likes.
        queue: most requests that wait for a front, 0 for no limit.
        accelerator: how the onnxruntime backend runs graphs on a GPU; without a GPU it is not looked at.
    """

    family: str
    max_batch_size: int
    instances: int = 1
    threads: int = 0
    queue: int = 0
    accelerator: Accelerator = "none"

    def make_onnx(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        image: Sequence[int] = (),
        threads: int = 0,
    ) -> Any:
        """Config of an ONNX graph, run once before it is ready.

        Args:
            name: of the model.
            inputs: of the graph.
            outputs: of the graph.
            image: closes open dimensions of that one run.
            threads: of this graph's runtime where `ConfigWriter.threads` leaves it open.
        """
        config = self._start(name, inputs, outputs)
        config.backend = "onnxruntime"
        config.default_model_filename = "model.onnx"
        for spec, entry in zip(outputs, config.output, strict=True):
            if self._is_scalar(spec):
                # Triton wants at least one dimension beside the batch; the graph gives (N,).
                entry.reshape.SetInParent()
        if self.threads or threads:
            self.set_parameters(config, {"intra_op_thread_count": str(self.threads or threads)})
        warm_up = config.model_warmup.add(name="zeros", batch_size=1)
        for spec in inputs:
            warm = warm_up.inputs[spec.name]
            warm.data_type = _data_type(spec)
            warm.dims.extend(self._close(spec, image))
            warm.zero_data = True
        if self.accelerator != "none":
            # TF32 has ten bits, too few to whiten with; how the production model computes is not for the guard to say.
            exact = {} if name == self.family else {"use_tf32": "0"}
            parameters = self._list_tensorrt(inputs, image) if self.accelerator == "tensorrt" else exact
            accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
            accelerators.add(name=self.accelerator, parameters=parameters)
        return config

    def make_python(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        parameters: Mapping[str, str],
        decoupled: bool = False,
    ) -> Any:
        """Config of a model of the Python backend; a decoupled one may answer a request more than once."""
        config = self._start(name, inputs, outputs)
        config.backend = "python"
        config.default_model_filename = "model.py"
        if decoupled:
            config.model_transaction_policy.decoupled = True
        self.set_parameters(config, {"FORCE_CPU_ONLY_INPUT_TENSORS": "yes", **parameters})
        return config

    def make_ensemble(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        steps: Sequence[Step],
        parameters: Mapping[str, str],
    ) -> Any:
        """Config of an ensemble.

        Raises:
            ExportError: two tensors of the ensemble have the same name.
        """
        config = self._start(name, inputs, outputs)
        config.platform = "ensemble"
        config.ClearField("instance_group")
        config.ClearField("dynamic_batching")
        self.set_parameters(config, parameters)
        made = [spec.name for spec in inputs]
        for step in steps:
            entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
            entry.input_map.update(step.inputs)
            entry.output_map.update(step.outputs)
            made.extend(step.outputs.values())
        twice = sorted({tensor for tensor in made if made.count(tensor) > 1})
        if twice:
            raise ExportError(
                f"{name}: two tensors of the ensemble are called {', '.join(twice)}; rename that input or output of the target"
            )
        return config

    def keep_apart(self, config: Any) -> None:
        """Where onnxruntime's CUDA provider is asked for, have requests to a model that takes images answered one by one.

        It plans every convolution anew when the batch size is not the last one's, which takes longer than what stacking saves
        (docs/decisions/0030).
        """
        if self.accelerator == "cuda":
            config.ClearField("dynamic_batching")

    def limit_queue(self, config: Any) -> None:
        """Have a front refuse what comes while `queue` requests wait, at once and with UNAVAILABLE.

        Not for steps of an ensemble: where one refuses while another runs, Triton 2.51 gives its client no answer at all.
        Only a model that stacks requests has a limit, so a front that has one stacks them whatever runs its graphs.
        A model of few instances that has a limit leaves waiting requests alone for half a second now and then, so a front
        gets `FRONT_INSTANCES` at least, of which no more than `instances` work at once (docs/decisions/0014, 0031).
        """
        if self.queue:
            config.dynamic_batching.default_queue_policy.max_queue_size = self.queue
            config.instance_group[0].count = max(FRONT_INSTANCES, self.instances)
            if self.instances < FRONT_INSTANCES:
                self.set_parameters(config, {AT_ONCE_PARAMETER: str(self.instances)})

    @staticmethod
    def keep_responses(config: Any) -> None:
        """Have the server answer an input that it has seen from its response cache, where it was started with one.

        For a graph that gives production outputs and latents together, alone: what a guard says may be that something failed
        just now, and latents by themselves could be another image's (docs/decisions/0016).
        """
        config.response_cache.enable = True

    def set_parameters(self, config: Any, parameters: Mapping[str, str]) -> None:
        """Set ``parameters`` of a config."""
        for key, value in sorted(parameters.items()):
            config.parameters[key].string_value = value

    def _start(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Any:
        config = pb.ModelConfig(name=name, max_batch_size=self.max_batch_size)
        for specs, entries in ((inputs, config.input), (outputs, config.output)):
            for spec in specs:
                entries.add(name=spec.name, data_type=_data_type(spec), dims=self._dims(spec))
        config.instance_group.add(count=self.instances)
        if self.max_batch_size:
            config.dynamic_batching.SetInParent()  # no queue delay: a guard's loop would pay it at every step
        self.set_parameters(config, {FAMILY_PARAMETER: self.family})
        return config

    def _is_scalar(self, spec: TensorSpec) -> bool:
        return self.max_batch_size > 0 and len(spec.shape) == 1

    def _dims(self, spec: TensorSpec) -> list[int]:
        dims = [-1 if size is None else size for size in spec.shape]
        if not self.max_batch_size:
            return dims
        return [1] if self._is_scalar(spec) else dims[1:]

    def _list_tensorrt(self, inputs: Sequence[TensorSpec], image: Sequence[int]) -> dict[str, str]:
        """One engine for all batches that are served; without a profile the backend builds one anew for each batch it meets."""
        parameters = {"precision_mode": "FP32"}
        if self.max_batch_size and not any(mark in spec.name for spec in inputs for mark in ":,"):
            batches = {"min": 1, "opt": max(1, self.max_batch_size // USUAL_SHARE), "max": self.max_batch_size}
            for word, batch in batches.items():
                shapes = {spec.name: "x".join(map(str, (batch, *self._close(spec, image)))) for spec in inputs}
                parameters[f"trt_profile_{word}_shapes"] = ",".join(f"{name}:{shape}" for name, shape in shapes.items())
        return parameters

    def _close(self, spec: TensorSpec, image: Sequence[int]) -> list[int]:
        shape = list(spec.shape)
        if len(shape) == len(image) + 1:
            shape[1:] = [known if size is None else size for size, known in zip(shape[1:], image, strict=True)]
        closed = [1 if size is None else size for size in shape]
        return closed[1:] if self.max_batch_size else closed


def _data_type(spec: TensorSpec) -> int:
    try:
        return int(pb.DataType.Value(DATA_TYPES[spec.dtype]))
    except KeyError:
        raise ExportError(f"{spec.name} is {spec.dtype}, which cannot pass through Triton's Python backend") from None


def format_config(config: Any) -> str:
    """Give the text of a config, with ``max_batch_size: 0`` said aloud, which the text format itself drops."""
    text = str(text_format.MessageToString(config))
    return text if config.max_batch_size else BATCH_UNSET + text


def parse_config(path: Path) -> Any:
    """Read a config.

    Raises:
        ExportError: it is no config that Triton would read.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); export the guard again") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is no model config: {error}") from None


def read_family(folder: Path) -> str | None:
    """Production model to which a model folder of ours belongs; None for a folder that we did not write."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        parameters = parse_config(path).parameters
    except ExportError:
        return None
    return str(parameters[FAMILY_PARAMETER].string_value) if FAMILY_PARAMETER in parameters else None
