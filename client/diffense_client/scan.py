"""Judge a whole collection of images and write down what was found."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np

from diffense import names
from diffense.errors import OptionError
from diffense.images import Images
from diffense_client._client import GuardClient

FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class ScanRow:
    """One scanned image.

    Attributes:
        index: its place among the readable images.
        path: its name in the source.
        label: the class that the target predicts; -1 where a gateway withheld its outputs.
        score: higher = more suspicious; -1 where not scored.
        p_value: lower = more suspicious; -1 where not scored.
        flagged: 0 passed, 1 flagged, 2 not scored.
    """

    index: int
    path: str
    label: int
    score: float
    p_value: float
    flagged: int


def scan_images(client: GuardClient, images: Images, batch_size: int | None = None) -> Iterator[list[ScanRow]]:
    """Yield the rows of one request after the other, in the order of the images.

    Args:
        client: a client of the guarded model.
        images: what :func:`diffense.images.load_images` read.
        batch_size: images of one request; None for the most that the server takes.

    Raises:
        ClientError: its leaves, as for :meth:`GuardClient.infer`.
    """
    served = client.describe()
    size = batch_size or served.max_batch_size
    for start in range(0, len(images.pixels), size):
        prediction = client.infer(images.pixels[start : start + size], [served.logits])
        logits = prediction.outputs[served.logits].reshape(len(prediction.flagged), -1)  # some classifiers give (N, C, 1, 1)
        withheld = (prediction.flagged == names.FLAGGED_YES) & (logits == logits[:, :1]).all(axis=1)
        labels = np.where(withheld, -1, logits.argmax(axis=1))
        verdicts = zip(labels, prediction.score, prediction.p_value, prediction.flagged, strict=True)
        yield [
            ScanRow(index, images.names[index], int(label), _widen(score), _widen(p_value), int(flagged))
            for index, (label, score, p_value, flagged) in enumerate(verdicts, start)
        ]


def check_writable(file: Path) -> None:
    """Refuse a place where no file can be written, before anything is sent.

    Raises:
        OptionError: its folder is not there or takes no files.
    """
    if not os.access(file.parent, os.W_OK | os.X_OK) or file.is_dir():
        raise OptionError(f"cannot write {file}; give a file in a folder that is there and can be written to")


def write_csv(rows: Sequence[ScanRow], file: Path) -> None:
    """Write the rows as CSV (UTF-8); a path that a spreadsheet would run as a formula gets a leading apostrophe.

    Raises:
        OptionError: the file cannot be written.
    """
    with _replaced(file) as partial, partial.open("x", encoding="utf-8", errors="backslashreplace", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(field.name for field in fields(ScanRow))
        for row in rows:
            path = f"'{row.path}" if row.path.startswith(FORMULA_STARTS) else row.path
            writer.writerow((row.index, path, row.label, row.score, row.p_value, row.flagged))


def write_parquet(rows: Sequence[ScanRow], file: Path) -> None:
    """Write the rows as Parquet: index and label int64, path string, score and p_value float32, flagged uint8.

    Raises:
        OptionError: the file cannot be written, or pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise OptionError("writing Parquet needs pyarrow: pip install 'diffense[parquet]'") from error
    schema = pa.schema(
        {
            "index": pa.int64(),
            "path": pa.string(),
            "label": pa.int64(),
            "score": pa.float32(),
            "p_value": pa.float32(),
            "flagged": pa.uint8(),
        }
    )
    records = [asdict(row) | {"path": _encodable(row.path)} for row in rows]
    with _replaced(file) as partial:
        parquet.write_table(pa.Table.from_pylist(records, schema=schema), partial)


def _widen(value: np.float32) -> float:
    """The shortest decimal that means the same float32: 0.01, not 0.009999999776."""
    return float(str(value))


def _encodable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _replaced(file: Path) -> Iterator[Path]:
    """Give a temporary name beside ``file``, renamed to it at the end."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        raise OptionError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
