"""What the server tells about a guarded model: its config, read once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pydantic
from tritonclient.utils import triton_to_np_dtype

from diffense import names
from diffense.errors import ModelNotReadyError
from diffense.images import Preprocessing

OPEN_BATCH: Final = 32  # rows of a request where the model names no limit


@dataclass(frozen=True)
class ServedModel:
    """A guarded model as its server describes it."""

    name: str
    input_name: str
    datatype: str  # Triton's word: "FP32", "UINT8", ...
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # one image of the graph's input; -1 where any size goes
    max_batch_size: int  # most images of one request
    fixed_batch: bool  # every request must hold exactly max_batch_size images
    outputs: tuple[str, ...]  # the production model's own outputs
    logits: str  # which of them holds the logits
    guard_id: str
    preprocessing: Preprocessing
    alpha: float | None  # false-alarm rate that the guard was calibrated for
    streams: bool = False  # whether it answers in two parts, prediction and verdict


def read_config(model: str, config: Mapping[str, Any]) -> ServedModel:
    """Read Triton's model configuration (JSON form, of either protocol).

    Raises:
        ModelNotReadyError: the model is not guarded, or its guard was exported by another version.
    """
    outputs = [output["name"] for output in config.get("output", [])]
    if missing := [name for name in names.VERDICT_TENSORS if name not in outputs]:
        raise ModelNotReadyError(
            f"model {model!r} is not guarded (it has no output {missing[0]}); the guarded model of a production model "
            f"is called <model>{names.GUARDED_SUFFIX} or <model>{names.GATEWAY_SUFFIX}"
        )
    inputs = [entry for entry in config.get("input", []) if not entry.get("optional")]
    if len(inputs) != 1:
        raise ModelNotReadyError(f"model {model!r} takes {len(inputs)} inputs; a guarded classifier takes one image")
    datatype = str(inputs[0]["data_type"]).removeprefix("TYPE_")
    dtype = triton_to_np_dtype(datatype)
    if dtype is None or np.dtype(dtype).kind not in "fiu":
        raise ModelNotReadyError(f"model {model!r} takes {datatype}, which holds no pixels")
    dims = tuple(int(size) for size in inputs[0]["dims"])
    limit = int(config.get("max_batch_size", 0))
    fixed = limit == 0 and dims[0] > 0
    if limit == 0:  # the first dimension of the tensor is the batch then
        limit, dims = (dims[0] if fixed else OPEN_BATCH), dims[1:]
    return ServedModel(
        name=model,
        input_name=inputs[0]["name"],
        datatype=datatype,
        dtype=np.dtype(dtype),
        shape=dims,
        max_batch_size=limit,
        fixed_batch=fixed,
        outputs=tuple(name for name in outputs if name not in names.VERDICT_TENSORS),
        streams=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
        **_read_parameters(model, config.get("parameters", {})),
    )


def _read_parameters(model: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: str(value.get("string_value", "")) for key, value in parameters.items()}
    try:
        return {
            "guard_id": texts[names.GUARD_ID_PARAMETER],
            "logits": texts[names.LOGITS_PARAMETER],
            "preprocessing": Preprocessing.model_validate_json(texts[names.PREPROCESSING_PARAMETER]),
            "alpha": float(texts[names.ALPHA_PARAMETER]) if names.ALPHA_PARAMETER in texts else None,
        }
    except KeyError as error:
        raise ModelNotReadyError(
            f"the config of {model!r} lacks the parameter {error}; write the repository again with `diffense export`"
        ) from None
    except (pydantic.ValidationError, ValueError) as error:
        raise ModelNotReadyError(
            f"a parameter in the config of {model!r} cannot be read ({str(error).splitlines()[0]}); "
            "use the same version of Diffense for export and client"
        ) from error
