"""A stand-in for Triton's C++ onnxruntime backend, written for its Python backend; CPU only.

Lies in the backend folder as ``onnxruntime/model.py``, so every repository that the C++ backend loads from its config
loads here unchanged. Each instance is a process of its own: latencies are an upper bound for the C++ backend's.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

TYPES = {
    "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(double)": "TYPE_FP64",
    "tensor(int8)": "TYPE_INT8", "tensor(int16)": "TYPE_INT16", "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8", "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32", "tensor(uint64)": "TYPE_UINT64", "tensor(bool)": "TYPE_BOOL",
}  # fmt: skip
LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
DEFAULT_BATCH = 4  # what the C++ backend completes a config with
LONGEST_MESSAGE = 300
FILES = re.compile(r"\S*/\S+\.(?:cc|h|cpp|onnx|data|so)\b\S*")  # node names have slashes too, so the ending decides

Arrays = dict[str, np.ndarray[Any, Any]]


class TritonPythonModel:
    """One instance of one ONNX model."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Fill in inputs and outputs from the graph where the config gives none; the server asks for every model."""
        given = config.as_dict()
        if given["input"] and given["output"]:
            return config
        session = open_session(Path(pb_utils.get_model_dir()), given)
        tensors = [*session.get_inputs(), *session.get_outputs()]
        free = all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in tensors)
        batched = given["max_batch_size"] > 0
        if not batched and free:
            config.set_max_batch_size(DEFAULT_BATCH)
            config.set_dynamic_batching()
            batched = True
        for found, add in ((session.get_inputs(), config.add_input), (session.get_outputs(), config.add_output)):
            for tensor in found:
                add({"name": tensor.name, "data_type": TYPES[tensor.type], "dims": list_dims(tensor, batched)})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph and compare it with the config."""
        config = json.loads(args["model_config"])
        self.batched = config["max_batch_size"] > 0
        self.session = open_session(Path(args["model_repository"], args["model_version"]), config)
        compare(config["input"], self.session.get_inputs(), self.batched)
        compare(config["output"], self.session.get_outputs(), self.batched)
        fed = {entry["name"] for entry in config["input"]}
        if missing := [tensor.name for tensor in self.session.get_inputs() if tensor.name not in fed]:
            raise pb_utils.TritonModelException(f"the graph's input '{missing[0]}' is missing in the config")
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer all requests with one run of the graph; one by one where they cannot be stacked or the run fails."""
        fed = [self.read_inputs(request) for request in requests]
        wanted = [self.list_wanted(request) for request in requests]
        shapes = {tuple((name, array.shape[1:]) for name, array in arrays.items()) for arrays in fed}
        if self.batched and len(requests) > 1 and len(shapes) == 1:
            union = [name for name in self.outputs if any(name in names for names in wanted)]
            try:
                return self.run_stacked(fed, wanted, union)
            except Exception as error:
                # One bad request must not fail its neighbours, so each gets a run of its own.
                pb_utils.Logger.log_warn(f"a stacked run failed: {describe(error)}")
        return [self.run_alone(arrays, names) for arrays, names in zip(fed, wanted, strict=True)]

    def read_inputs(self, request: Any) -> Arrays:
        """Give the request's input arrays by name, in the config's order; optional inputs may be missing."""
        tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs)
        return {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}

    def list_wanted(self, request: Any) -> list[str]:
        """List the outputs that the request asks for, in the config's order."""
        asked = set(request.requested_output_names())
        return [name for name in self.outputs if name in asked]

    def run_stacked(self, fed: list[Arrays], wanted: list[list[str]], union: list[str]) -> list[Any]:
        """Run all requests as one batch and split what comes out."""
        rows = [len(next(iter(arrays.values()))) for arrays in fed]
        stacked = {name: np.concatenate([arrays[name] for arrays in fed]) for name in fed[0]}
        results = dict(zip(union, self.session.run(union, stacked), strict=True))
        if any(len(result) != sum(rows) for result in results.values()):
            raise ValueError("an output has another number of rows than the input")
        cuts = np.cumsum(rows)[:-1]
        parts = {name: np.split(result, cuts) for name, result in results.items()}
        return [respond({name: parts[name][i] for name in names}) for i, names in enumerate(wanted)]

    def run_alone(self, arrays: Arrays, names: list[str]) -> Any:
        """Run one request; what fails becomes an error object of its own."""
        try:
            return respond(dict(zip(names, self.session.run(names, arrays), strict=True)))
        except Exception as error:
            status = pb_utils.TritonError.INVALID_ARG if is_input_error(error) else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(describe(error), status))


def open_session(folder: Path, config: dict[str, Any]) -> ort.InferenceSession:
    """Open the model file with the config's parameters for the C++ backend that matter on a CPU."""
    texts = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(texts.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(texts.get("inter_op_thread_count", 0))
    # Every model is a process here: threads that spin while they wait would take the cores from the other models' graphs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    mode = texts.get("execution_mode", "0")
    if mode not in ("0", "1"):
        raise pb_utils.TritonModelException(f"execution_mode must be 0 or 1, not '{mode}'")
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if mode == "1" else ort.ExecutionMode.ORT_SEQUENTIAL
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS.get(level, LEVELS[0]))
    options.enable_cpu_mem_arena = is_on(texts.get("enable_mem_arena", "1"))
    options.enable_mem_pattern = is_on(texts.get("enable_mem_pattern", "1"))
    name = config.get("default_model_filename") or "model.onnx"
    if not (folder / name).is_file():
        raise pb_utils.TritonModelException(f"version {folder.name} has no file {name}")
    try:
        return ort.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise pb_utils.TritonModelException(f"{name} cannot be opened: {describe(error)}") from None


def compare(entries: list[dict[str, Any]], found: Sequence[Any], batched: bool) -> None:
    """Refuse at load time what the C++ backend refuses: other names, types or shapes than the graph's."""
    known = {tensor.name: tensor for tensor in found}
    for entry in entries:
        name = entry["name"]
        if name not in known:
            raise pb_utils.TritonModelException(f"unexpected tensor '{name}'; the graph has {sorted(known)}")
        tensor = known[name]
        if TYPES.get(tensor.type) != entry["data_type"]:
            raise pb_utils.TritonModelException(f"'{name}' is {tensor.type} in the graph, not {entry['data_type']}")
        if batched and tensor.shape and isinstance(tensor.shape[0], int):
            raise pb_utils.TritonModelException(
                f"'{name}' has a fixed first dimension ({tensor.shape[0]}) in the graph, so max_batch_size must be 0"
            )
        stated = entry["reshape"]["shape"] if "reshape" in entry else entry["dims"]
        wanted, have = [int(size) for size in stated], list_dims(tensor, batched)
        if len(have) != len(wanted) or any(h not in (-1, w) for h, w in zip(have, wanted, strict=True)):
            raise pb_utils.TritonModelException(f"'{name}' is {have} in the graph, not {wanted}")


def list_dims(tensor: Any, batched: bool) -> list[int]:
    """Shape of a tensor as a config states it: -1 where it is dynamic, without the batch."""
    return [size if isinstance(size, int) else -1 for size in tensor.shape][1 if batched else 0 :]


def respond(results: Arrays) -> Any:
    """Wrap the outputs of one request."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in results.items()])


def is_on(text: str) -> bool:
    """Read a switch as the C++ backend does."""
    return text.lower() in ("1", "true")


def is_input_error(error: Exception) -> bool:
    """Whether onnxruntime complains about what the client sent, not about the graph or the machine."""
    return "INVALID_ARGUMENT" in str(error) or "Got invalid dimensions" in str(error)


def describe(error: Exception) -> str:
    """Trim onnxruntime's text to the problem: one line, no status code, nothing about the server's files."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = line.rsplit("[ONNXRuntimeError] : ", 1)[-1]
    # "2 : INVALID_ARGUMENT : Got invalid dimensions ..." keeps what follows the code and its name.
    text = text.split(" : ", 2)[-1].rsplit("Status Message: ", 1)[-1]
    return f"onnx runtime: {' '.join(FILES.sub('', text).split())[:LONGEST_MESSAGE]}"
