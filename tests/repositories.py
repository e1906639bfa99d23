"""Small model repositories for tests that need a server but no guard."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffense_export.configs import CONFIG_FILE, parse_config

FEATURES, CLASSES = 5, 3

# A served Python model whose verdict is what its config's `flagged` parameter says.
VERDICT_MODEL = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.flagged = int(json.loads(args["model_config"])["parameters"]["flagged"]["string_value"])

    def execute(self, requests):
        rows = [len(pb_utils.get_input_tensor_by_name(r, "x").as_numpy()) for r in requests]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("diffense_flagged", np.full((n, 1), self.flagged, np.uint8))])
            for n in rows
        ]
"""


def make_weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)


def write_graph(path: Path, batch: int | None) -> None:
    """x (batch, 5) float32 -> logits (batch, 3), doubled (batch, 5)."""
    rows = batch or "rows"
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["logits"], name="/head/MatMul"),
        helper.make_node("Add", ["x", "x"], ["doubled"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, FEATURES])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [rows, CLASSES]),
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [rows, FEATURES]),
        ],
        [numpy_helper.from_array(make_weights(), "weights")],
    )
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def write_lookup_model(repository: Path, name: str) -> None:
    """index (rows, 1) int64 -> row (rows, 1, 3) float32; fails at run time for an index outside the table of 5."""
    nodes = [helper.make_node("Gather", ["weights", "index"], ["row"], name="/lookup/Gather")]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["rows", 1])],
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, ["rows", 1, CLASSES])],
        [numpy_helper.from_array(make_weights(), "weights")],
    )
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx")
    (folder.parent / "config.pbtxt").write_text(f"""
        name: "{name}"
        backend: "onnxruntime"
        max_batch_size: 64
        input [ {{ name: "index" data_type: TYPE_INT64 dims: [ 1 ] }} ]
        output [ {{ name: "row" data_type: TYPE_FP32 dims: [ 1, {CLASSES} ] }} ]
        dynamic_batching {{ max_queue_delay_microseconds: 100000 }}
        instance_group [ {{ count: 1 kind: KIND_CPU }} ]
    """)


def write_onnx_model(repository: Path, name: str, config: str | None, batch: int | None = None) -> None:
    write_graph(repository / name / "1" / "model.onnx", batch)
    if config is not None:
        (repository / name / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "onnxruntime"\n{config}')


def write_plain_model(repository: Path, name: str, classes: int = CLASSES) -> None:
    """The ordinary case: batches up to 8, stacked by the server."""
    write_onnx_model(
        repository,
        name,
        f"""
        max_batch_size: 8
        input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {FEATURES} ] }} ]
        output [
          {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] }},
          {{ name: "doubled" data_type: TYPE_FP32 dims: [ {FEATURES} ] }}
        ]
        dynamic_batching {{ max_queue_delay_microseconds: 100000 }}
        instance_group [ {{ count: 1 kind: KIND_CPU }} ]
        parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
        """,
    )


def write_verdict_model(repository: Path, name: str, flagged: int) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(VERDICT_MODEL)
    (folder.parent / "config.pbtxt").write_text(f"""
        name: "{name}"
        backend: "python"
        max_batch_size: 8
        input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {FEATURES} ] }} ]
        output [ {{ name: "diffense_flagged" data_type: TYPE_UINT8 dims: [ 1 ] }} ]
        parameters {{ key: "flagged" value {{ string_value: "{flagged}" }} }}
    """)


def hash_tree(folder: Path) -> dict[str, str]:
    """Path inside the folder -> SHA-256 of the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def list_models(repository: Path) -> list[str]:
    return sorted(folder.name for folder in repository.iterdir())


def read_configs_of(repository: Path, models: Sequence[str]) -> list[tuple[str, Any]]:
    return [(name, parse_config(repository / name / CONFIG_FILE)) for name in models]
