"""The production model that already stands in a repository and is to be guarded where it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from diffense.errors import ExportError, TargetError
from diffense.guard import Guard
from diffense.target import hash_target
from diffense_export.configs import CONFIG_FILE, parse_config

COMPLETED_BATCH: Final = 4  # what the onnxruntime backend completes a config with


def read_batch_limit(folder: Path, guard: Guard) -> int:
    """Check that a standing model serves the guard's target; give its ``max_batch_size``.

    Raises:
        ExportError: there is no such model, it is no ONNX model, it serves several versions, or the one is another file than
            the target.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} does not exist; export without --no-production to write it")
    config = parse_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    if config is not None and config.backend not in ("", "onnxruntime"):
        raise ExportError(f"{folder} runs on {config.backend}; only an ONNX model can be compared with the guard's target")
    versions = [int(version.name) for version in folder.iterdir() if version.is_dir() and version.name.isdecimal()]
    if not versions:
        raise ExportError(f"{folder} has no version folder")
    name = (config.default_model_filename if config is not None else "") or "model.onnx"
    chosen = _list_served(config, versions)
    if len(chosen) != 1:
        shown = ", ".join(map(str, chosen)) or "none"
        raise ExportError(
            f"{folder} serves several versions, or none ({shown}), by its version_policy, and a guard is of one; change the "
            "policy in its config.pbtxt, or leave --no-production out and give another --model"
        )
    served = folder / str(chosen[0]) / name
    try:
        same = hash_target(served) == guard.manifest.target_sha256
    except TargetError as error:
        raise ExportError(str(error)) from None
    if not same:
        raise ExportError(f"{served} is another classifier than {guard.manifest.target_name}, which the guard was fitted on")
    return _find_limit(config, guard)


def _list_served(config: Any, versions: Sequence[int]) -> list[int]:
    """The versions that a server loads; the newest alone unless the config says otherwise."""
    policy = config.version_policy if config is not None else None
    kind = policy.WhichOneof("policy_choice") if policy is not None else None
    if policy is not None and kind == "specific":
        return list(policy.specific.versions)
    if kind == "all":
        return sorted(versions)
    newest = policy.latest.num_versions if policy is not None and kind == "latest" else 1
    return sorted(versions)[-max(1, newest) :]


def _find_limit(config: Any, guard: Guard) -> int:
    if config is not None and (config.max_batch_size or (config.input and config.output)):
        return int(config.max_batch_size)
    tensors = (guard.manifest.input, *guard.manifest.outputs)
    return COMPLETED_BATCH if all(tensor.shape and tensor.shape[0] is None for tensor in tensors) else 0
