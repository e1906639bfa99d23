"""The manifest of a guard bundle: one JSON file that says what the other files are and how to use them."""

import hashlib
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffense.errors import SchemaError, TamperedError
from diffense.images import Preprocessing
from diffense.names import ARRAYS_FILE, DENOISER_FILE, MANIFEST_FILE, TAPPED_FILE

SCHEMA: Final = 6
MOST_BATCH: Final = 65_536
MOST_MANIFEST_BYTES: Final = 64 * 2**20  # a manifest of ten thousand classes is below 1 MB


class Part(BaseModel):
    """Base of all parts: nothing unknown, nothing changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(Part):
    """A tensor of the target; None in the shape is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class TapEntry(Part):
    """A tap: its tensor, kind, measured shape without the batch, depth in 0..1, and how many latent directions it has."""

    name: str
    kind: Literal["map", "map_nhwc", "tokens", "vector"]
    shape: tuple[int, ...]
    depth: float
    width: int


class Sampling(Part):
    """Settings of `sampling.sample`; sigmas is levels x taps."""

    sigmas: tuple[tuple[float, ...], ...]
    steps: int = Field(ge=1)
    draws: int = Field(ge=2, multiple_of=2)
    label_guidance: float
    data_guidance: float = Field(ge=0)
    seed: int


class DenoiserEntry(Part):
    """Sizes of the denoiser's tensors: M rows, K taps of width d, W = K d, G guide entries."""

    rows: int
    taps: int
    tap_width: int
    width: int
    guide: int


class NetworkReport(Part):
    """What the fit found about the learned part; losses are held-out, over the Gaussian's at the same noise.

    `left_out` counts the strangest images and copies, from which it may not learn; None where nothing was learned, and in
    guards of before (docs/decisions/0033).
    """

    used: bool
    reason: str
    loss: float | None = None
    gaussian_loss: float | None = None
    steps: int = 0
    left_out: int | None = None


class CleanReport(Part):
    """How the clean images were used; of how many groups those that calibrate are, where images belong together."""

    given: int
    fitted: int
    copies: int
    calibrated: int
    calibrated_groups: int | None = None
    per_class_fewest: int
    classes_never_predicted: tuple[int, ...]
    guide: Literal["label", "logits"]


class Manifest(Part):
    """Everything about a guard that is not an array or a graph."""

    schema_version: int
    diffense_version: str
    target_name: str
    target_sha256: str
    input: Tensor
    outputs: tuple[Tensor, ...]
    logits: str
    probabilities: bool
    classes: int = Field(ge=2)
    batch: int | None = Field(ge=1, le=MOST_BATCH)
    preprocessing: Preprocessing
    taps: tuple[TapEntry, ...]
    tap_width: int = Field(ge=1)
    latent_dim: int = Field(ge=1)
    chain_sigma: float
    sampling: Sampling
    denoiser: DenoiserEntry
    network: NetworkReport
    clean: CleanReport
    alpha: float = Field(gt=0, lt=1)
    calibration_size: int
    crossed: bool = False  # whether the images fitted on calibrate, by folds; manifests before this key do not tell
    false_alarm_interval: tuple[float, float]
    shared_exact: bool
    shared_max_difference: float
    shared_same_labels: bool
    seed: int
    files: dict[str, str]


def read_manifest(folder: Path) -> Manifest:
    """Read and check a bundle's manifest.

    Raises:
        TamperedError: there is no such folder or no manifest in it, or it is no regular file of sensible size.
        SchemaError: it is newer than this version, has unknown keys, or is malformed.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise TamperedError(f"{folder}: there is no such folder; give the folder of a guard")
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_MANIFEST_BYTES:
        raise TamperedError(f"{folder} is no guard bundle: it has no usable {MANIFEST_FILE}")
    text = path.read_bytes()
    try:
        head = _Head.model_validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"{path} is not a manifest of Diffense ({_first(error)}); fit the guard again") from error
    if head.schema_version < SCHEMA:
        raise SchemaError(f"{path} has schema version {head.schema_version}, of an older Diffense; fit the guard again")
    if head.schema_version > SCHEMA:
        raise SchemaError(
            f"{path} has schema version {head.schema_version}, this Diffense reads {SCHEMA}; install a newer Diffense"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"{path} is malformed ({_first(error)}); fit the guard again") from error


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest, keys in the model's order, so that the same guard gives the same bytes."""
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, manifest: Manifest, names: frozenset[str] | None = None) -> None:
    """Check the files that the manifest lists (or only those in `names`) against their hashes.

    Raises:
        TamperedError: one leads out of the folder, is missing, or has other bytes.
    """
    needed = {TAPPED_FILE, ARRAYS_FILE} | ({DENOISER_FILE} if manifest.network.used else set())
    if unlisted := sorted(needed - manifest.files.keys()):
        raise TamperedError(f"{folder}: the manifest does not list {unlisted[0]}; fit the guard again")
    for name, digest in manifest.files.items():
        path = folder / name
        if name in ("", "..") or Path(name).name != name or path.is_symlink():
            raise TamperedError(f"{folder}: the file {name!r} leads out of the bundle; do not use this bundle")
        if names is not None and name not in names:
            continue
        if not path.is_file():
            raise TamperedError(f"{folder}: {name} is missing; copy the whole bundle again")
        if hash_file(path) != digest:
            raise TamperedError(f"{folder}: {name} was changed after the guard was fitted; copy the bundle again or refit")


class _Head(BaseModel):
    """Just enough of any manifest to tell its version."""

    model_config = ConfigDict(extra="ignore")
    schema_version: int


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where}: {detail['msg']}" if where else str(detail["msg"])
