"""ONNX graphs on disk and in onnxruntime: read with checks, hashed, written reproducibly, run in batches."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from diffense.errors import TargetError
from diffense.manifest import hash_file

EXTERNAL_ABOVE: Final = 1_500_000_000  # bytes of weights; protobuf itself ends at 2 GiB
EXTERNAL_TENSOR_BYTES: Final = 1024  # smaller tensors stay in the graph, where shape inference can read them
SEPARATE_INPUTS_IR: Final = 4  # before this IR version every initialiser had to be listed as an input too
SAVED_IR: Final = 8  # what graphs of older IR versions are raised to; every onnxruntime since 1.10 reads it
ERRORS_ONLY: Final = 3


def load_model(path: Path) -> ir.Model:
    """Read an ONNX file; weights in external files are mapped when they are used, not before.

    Graphs of IR versions before 4 are raised to version 8 without the initialisers among their inputs, and model-local
    functions are inlined and nodes sorted: all keep what is computed, and let nodes be appended and tensors be named.

    Raises:
        TargetError: the file is missing, is no ONNX graph, or an external data file is missing, too short or outside
            the folder of the model.
    """
    model = read_model(path)
    if model.ir_version < SEPARATE_INPUTS_IR:
        passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = SAVED_IR
    if model.functions:
        passes.InlinePass()(model)
    try:
        model.graph.sort()  # onnxruntime takes nodes in any order, and float16 converters leave them so
    except ValueError as error:
        raise TargetError(f"{path}: the graph has a cycle; export it again") from error
    return model


def read_model(path: Path) -> ir.Model:
    """As `load_model`, with the graph as it stands in the file.

    Raises:
        TargetError: as `load_model`.
    """
    if path.is_dir():
        raise TargetError(f"{path}: this is a folder; give an ONNX file")
    if not path.is_file():
        raise TargetError(f"{path}: there is no such file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        model = ir.from_proto(proto) if proto.HasField("graph") else None
    except Exception as error:  # protobuf, onnx and onnx_ir share no base class for what a damaged file makes them raise
        raise TargetError(f"{path}: not an ONNX file, or a damaged one ({first_line(error)}); export it again") from error
    if model is None:
        raise TargetError(f"{path}: {'no graph in it' if path.stat().st_size else 'an empty file'}; export it again")
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check_external(path, model)
    return model


def hash_target(path: Path) -> str:
    """SHA-256, in hex, of everything that makes the target; read in a stream.

    Of the file alone when it holds its weights; with external data, of one line ``digest  name`` for the model and each
    data file in order of name (as ``sha256sum`` prints them), since the weights are what a guard is fitted to.

    Raises:
        TargetError: as `load_model`.
    """
    return hash_model(path, load_model(path))


def hash_model(path: Path, model: ir.Model) -> str:
    """As `hash_target`, for a model that is already loaded from that path."""
    locations = sorted({str(tensor.location) for tensor in _external_tensors(model)})
    if not locations:
        return hash_file(path)
    names = [(path, "model"), *((path.parent / location, location) for location in locations)]
    lines = "".join(f"{hash_file(file)}  {name}\n" for file, name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def save_graph(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a graph: the same bytes for the same graph, moved into place when complete; the model is left unchanged.

    Up to `external_above` bytes of weights the file is self-contained; above, they are in ``<path.name>.data`` beside.

    Raises:
        TargetError: external data of the model cannot be read any more.
    """
    copy = model.clone()
    data = f"{path.name}.data"
    external = _count_weight_bytes(model) > external_above
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder)
        try:
            if external:
                ir.external_data.unload_from_model(copy, partial, data, size_threshold_bytes=EXTERNAL_TENSOR_BYTES)
            else:
                ir.external_data.load_to_model(copy)
            (partial / path.name).write_bytes(ir.to_proto(copy).SerializeToString(deterministic=True))
        except (OSError, ValueError) as error:
            raise TargetError(f"{path}: the weights cannot be written ({first_line(error)})") from error
        if external:
            (partial / data).replace(path.with_name(data))
        (partial / path.name).replace(path)


def cut_graph(model: ir.Model, start: str, ends: Sequence[str]) -> ir.Model:
    """The part of a graph between one input and some tensors, its weights in order of name: the same cut, the same bytes."""
    graph = ir.convenience.extract(model.graph, [start], list(ends))
    weights = dict(sorted(graph.initializers.items()))  # `extract` keeps them in the order of a set
    graph.initializers.clear()
    graph.initializers.update(weights)
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def open_session(model: Path | bytes | ir.Model, threads: int = 0, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    """An onnxruntime session: on CUDA where the installed onnxruntime has it (without TF32), else on the CPU.

    A graph too large for one protobuf message goes through a temporary folder. No custom-op library is ever loaded.

    Args:
        model: a file, a serialised graph, or a graph in memory.
        threads: of one operator; 0 for one a core that this process may use.
        optimize: False skips all graph rewriting, which is quicker where the graph runs once.

    Raises:
        TargetError: onnxruntime refuses the graph, or the file's name.
    """
    if isinstance(model, ir.Model):
        return _open_graph(model, threads, optimize)
    if isinstance(model, Path):
        _check_name(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    # onnxruntime itself counts the cores of the whole machine, and the threads of those that it may not use spin all the same.
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers: list[Any] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))
    try:
        return onnxruntime.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        what = model if isinstance(model, Path) else "the graph"
        raise TargetError(f"{what}: onnxruntime cannot load it ({first_line(error)})") from error


def run_batched(
    session: onnxruntime.InferenceSession,
    array: NDArray[Any],
    outputs: Sequence[str] | None,
    batch: int | None,
    batch_size: int = 64,
    others: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    prepare: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> list[NDArray[Any]]:
    """Run a graph over any number of rows and join the results.

    Args:
        session: a graph with the batch first in every tensor.
        array: (N, ...) of the first input's dtype; N may be 0.
        outputs: names; None for all of them, in the graph's order.
        batch: the graph's fixed batch (the last one is filled up by repeating its last row), or None when dynamic.
        batch_size: rows of a call when the batch is dynamic.
        others: (N, ...) of the graph's other inputs, by name.
        prepare: makes of the rows of one call what the first input takes, so that no more is held at a time.

    Returns:
        One (N, ...) array for each output.

    Raises:
        TargetError: onnxruntime refuses the input, or an output has no batch axis.
    """
    names = list(outputs) if outputs is not None else [output.name for output in session.get_outputs()]
    step = batch or batch_size
    first = session.get_inputs()[0].name
    fed = {first: array, **others}
    if not len(array):  # one run tells the shapes of no rows
        fed = {name: np.zeros((1, *rows.shape[1:]), rows.dtype) for name, rows in fed.items()}
    parts = []
    for i in range(0, max(1, len(array)), step):
        part = {name: rows[i : i + step] for name, rows in fed.items()}
        if prepare is not None:
            part[first] = prepare(part[first])
        parts.append(_run_part(session, part, names, batch))
    return [np.concatenate(column)[: len(array)] for column in zip(*parts, strict=True)]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none; short enough for one line of text."""
    text = str(error).strip()
    return text.splitlines()[0].removeprefix("[ONNXRuntimeError] : ")[:300] if text else type(error).__name__


def _run_part(
    session: onnxruntime.InferenceSession, fed: Mapping[str, NDArray[Any]], names: list[str], batch: int | None
) -> list[NDArray[Any]]:
    count = len(next(iter(fed.values())))
    if batch is not None and count < batch:
        fed = {name: np.concatenate([given, np.repeat(given[-1:], batch - count, axis=0)]) for name, given in fed.items()}
    rows = next(iter(fed.values()))
    try:
        results = session.run(names, dict(fed))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TargetError(
            f"the graph fails on an input of shape {rows.shape} and type {rows.dtype} ({first_line(error)})"
        ) from error
    for name, result in zip(names, results, strict=True):
        if np.ndim(result) == 0 or len(result) != len(rows):
            raise TargetError(f"output {name!r} has shape {np.shape(result)} for a batch of {len(rows)}: no batch axis")
    return [result[:count] for result in results]


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise TargetError(f"{path}: onnxruntime opens no path that is not UTF-8; rename the file or its folder") from error


def _open_graph(model: ir.Model, threads: int, optimize: bool) -> onnxruntime.InferenceSession:
    with tempfile.TemporaryDirectory(prefix="diffense-") as folder:
        path = Path(folder) / "graph.onnx"
        save_graph(model, path)
        data: Path | bytes = path if path.with_name("graph.onnx.data").exists() else path.read_bytes()
        return open_session(data, threads, optimize=optimize)


def _count_weight_bytes(model: ir.Model) -> int:
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    initializers = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    for tensor in (*initializers, *_list_constants(model)):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def _list_constants(model: ir.Model) -> Iterator[object]:
    """The tensors that nodes hold as attributes, in functions and in inner graphs too."""
    functions = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *functions):
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value
            elif isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def _check_external(path: Path, model: ir.Model) -> None:
    folder = path.parent.resolve()
    for tensor in _external_tensors(model):
        file = folder / tensor.location
        where = f"{path}: the data of tensor {tensor.name!r} is in {str(tensor.location)!r}"
        if Path(tensor.location).is_absolute() or not file.resolve().is_relative_to(folder):
            if (path.parent / tensor.location).is_symlink():
                raise TargetError(f"{where}, a link that leads out of the folder of the model; copy the folder with cp -rL")
            raise TargetError(f"{where}, outside the folder of the model; only files inside it are read")
        if not file.is_file():
            raise TargetError(f"{where}, which is missing; put that file into {path.parent}")
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if file.stat().st_size < needed:
            raise TargetError(f"{where}, which has {file.stat().st_size} bytes and needs {needed}; copy it again")
