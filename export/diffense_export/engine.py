"""TensorRT on the GPU of this machine: graph -> plan, and plan -> outputs. Nothing is imported until it is needed.

The same code drives TensorRT 10 and 11: networks are strongly typed, so precision stands in the graph and no precision flag is
set; TF32 is switched off, or float32 would mean ten bits where latents are whitened.
"""

import importlib
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffense.errors import ExportError

SMI_TIMEOUT_S: Final = 20
LOG: Final = "WARNING"
WHERE: Final = (
    "run it where the models will be served: DIFFENSE_REPOSITORY={repository} docker compose -f docker/compose.yaml "
    "-f docker/compose.gpu.yaml run --rm plans {model}"
)


class Shapes(NamedTuple):
    """Least, usual and most of an input's shape."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its compute capability, such as ``8.6``."""

    name: str
    capability: str


def find_device() -> Device | None:
    """The first GPU that the driver shows, or None."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
        name, capability = answer.stdout.splitlines()[0].rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    return Device(name.strip(), capability.strip())


class Engine:
    """Builds plans and runs them.

    Args:
        trt: the module ``tensorrt``, or ``tensorrt_rtx``, which builds ahead of time without a GPU.
        device: what the plans are for.
        cache: file of measured timings, used again and written again; None for none.
        configure: told each builder config before it is used.
    """

    def __init__(
        self, trt: ModuleType, device: Device, cache: Path | None, configure: Callable[[Any], None] = lambda config: None
    ) -> None:
        self.trt, self.device, self.cache, self.configure = trt, device, cache, configure
        self.logger = trt.Logger(getattr(trt.Logger, LOG))

    @property
    def version(self) -> str:
        """Of TensorRT; a plan runs on no other."""
        return str(self.trt.__version__)

    def build(self, graph: Path, shapes: Mapping[str, Shapes]) -> tuple[bytes, dict[str, str]]:
        """Build a plan.

        Args:
            graph: ONNX file.
            shapes: of every input.

        Returns:
            The plan, and the type that each input and output has in it, in TensorRT's words (``FLOAT``, ``INT64``).

        Raises:
            ExportError: TensorRT refuses the graph.
        """
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(graph)):
            raise ExportError(f"{graph}: TensorRT {self.version} cannot read it ({parser.get_error(0).desc()})")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_flag(trt.BuilderFlag.STRICT_NANS)  # the guard knows a broken image by the NaN that comes out
        self.configure(config)
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, *shape)
        config.add_optimization_profile(profile)
        known = self.cache.read_bytes() if self.cache and self.cache.is_file() else b""
        if self.cache and not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)  # of another GPU or version
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ExportError(f"{graph}: TensorRT {self.version} cannot build it; its log says why")
        if self.cache:
            partial = self.cache.with_name(f".{self.cache.name}.partial")
            partial.write_bytes(bytes(config.get_timing_cache().serialize()))
            partial.replace(self.cache)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        return bytes(plan), {tensor.name: tensor.dtype.name for tensor in tensors}

    @contextmanager
    def open(self, plan: bytes) -> Iterator[Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]]:
        """Load a plan on the GPU and give a function from arrays by name to arrays by name, in the CPU's memory."""
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        with TrtRunner(EngineFromBytes(plan)) as runner:

            def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
                found = runner.infer({name: np.ascontiguousarray(array) for name, array in inputs.items()})
                return {name: np.array(array) for name, array in found.items()}  # the runner uses its own again

            yield run

    def run(self, plan: bytes, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run a plan once."""
        with self.open(plan) as run:
            return run(inputs)


def open_engine(cache: Path | None, repository: Path, model: str) -> Engine:
    """TensorRT on this machine's GPU.

    Raises:
        ExportError: there is no GPU, or TensorRT or polygraphy is not installed; says what to run where.
    """
    device = find_device()
    where = WHERE.format(repository=repository.resolve(), model=model)
    if device is None:
        raise ExportError(f"plans are built on the GPU that will run them, and this machine shows none; {where}")
    try:
        trt = importlib.import_module("tensorrt")
        importlib.import_module("polygraphy")
    except ImportError as error:
        raise ExportError(f"{error.name} is missing, and plans run on no other TensorRT than the server's; {where}") from None
    return Engine(trt, device, cache)
