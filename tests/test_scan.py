import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from client_codes import BROKEN, UNSCORED
from client_repository import CLASSES, MODEL, SHAPE, expect_logits, expect_scores, make_pixels, shared_repository, trigger
from diffense.errors import OptionError
from diffense.images import Images
from diffense.names import FLAGGED_YES, PASSED
from diffense.serve import Endpoints, TritonServer
from diffense.text import printable
from diffense_client.scan import ScanRow, scan_images, write_csv, write_parquet

Run = Callable[..., tuple[int, str, str]]
DARK, BRIGHT = 30, 200  # grey levels below and above the served model's threshold


@pytest.fixture(scope="module")
def endpoints(triton_for: Callable[..., TritonServer], tmp_path_factory: pytest.TempPathFactory) -> Endpoints:
    return triton_for(shared_repository(tmp_path_factory)).endpoints


@pytest.fixture
def run_cli(run_cli: Run) -> Run:
    """Run this command."""
    return partial(run_cli, "scan")


def grey(level: int) -> Any:
    return np.full(SHAPE, level, np.uint8)


def save(folder: Path, **images: Any) -> Path:
    for name, pixels in images.items():
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_json_has_one_object_for_each_image(endpoints: Endpoints, tmp_path: Path, run_cli: Run, protocol: str) -> None:
    pixels = make_pixels(20)
    np.savez(tmp_path / "x.npz", x=pixels)
    url = f"{protocol}://{getattr(endpoints, protocol)}"
    code, out, err = run_cli(tmp_path / "x.npz", "--url", url, "--model", MODEL, "--json", "--batch-size", 3)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [["index", "path", "label", "score", "p_value", "flagged"]] * 20
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["path"] for row in rows] == [f"x.npz#{index}" for index in range(20)]
    assert [row["label"] for row in rows] == expect_logits(pixels).argmax(axis=1).tolist()
    np.testing.assert_allclose([row["score"] for row in rows], expect_scores(pixels), atol=1e-6)
    np.testing.assert_allclose([row["p_value"] for row in rows], 1 - expect_scores(pixels), atol=1e-6)
    flagged = [row["flagged"] for row in rows]
    assert flagged == (expect_scores(pixels) > 0.5).astype(int).tolist()
    assert code == 1 and f"20 scanned, {sum(flagged)} flagged, 0 unscored, 0 skipped" in err


@pytest.mark.server
def test_exit_codes_tell_clean_flagged_unscored_and_error(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    at = ("--url", endpoints.http, "--protocol", "http", "--model", MODEL)
    clean = save(tmp_path / "clean", a=grey(DARK), b=grey(DARK))
    code, out, err = run_cli(clean, *at)
    assert (code, out) == (0, "2 scanned, 0 flagged, 0 unscored, 0 skipped\n")
    unscored = save(tmp_path / "unscored", a=trigger(UNSCORED)[0], b=grey(DARK))
    code, out, _ = run_cli(unscored, *at, "--batch-size", 1)
    assert code == 2 and "not scored" in out and "2 scanned, 0 flagged, 1 unscored" in out
    code, out, _ = run_cli(save(unscored, c=grey(BRIGHT)), *at, "--batch-size", 1)
    assert code == 1 and "3 scanned, 1 flagged, 1 unscored" in out
    code, out, err = run_cli(save(tmp_path / "broken", a=trigger(BROKEN)[0]), *at)
    assert code == 2 and out == "" and "the guard broke" in err and err.count("\n") == 1
    for arguments in (
        (tmp_path / "missing", *at),
        (clean, "--url", endpoints.http, "--model", "nothing", "--protocol", "http"),
        (clean, "--url", f"http://{endpoints.http}", "--model", MODEL, "--protocol", "grpc"),
        (clean, "--url", "nowhere", "--model", MODEL),
        (clean, *at, "--batch-size", 9),
        (clean, *at, "--csv", tmp_path / "no" / "such.csv"),
        (clean, *at, "--parquet", tmp_path / "clean"),
    ):
        code, _, err = run_cli(*arguments)
        assert code == 2 and err.startswith("diffense: ")


@pytest.mark.server
def test_unreadable_images_are_reported_and_skipped(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    folder = save(tmp_path / "mixed", **{"a": grey(DARK), "z": grey(BRIGHT), "[bold]c[/]d": grey(DARK)})
    (folder / "b.png").write_bytes(b"no image")
    (folder / "[bold]c[/]d.png").write_bytes((folder / "a.png").read_bytes()[:50])
    code, out, err = run_cli(folder, "--url", endpoints.grpc, "--model", MODEL)
    assert code == 1 and "2 scanned, 1 flagged, 0 unscored, 2 skipped" in out and "z.png" in out
    assert "skipped b.png: " in err and "skipped [bold]c[/]d.png: " in err


@pytest.mark.server
def test_hostile_names_are_shown_but_not_obeyed(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    names = ["=cmd|'x'!A1", "[red]x[/red]", "\x1b[2Jcleared", "a\nb", "+1", "plain"]
    folder = save(tmp_path / "hostile", **dict.fromkeys(names, grey(BRIGHT)))
    table = tmp_path / "rows.csv"
    code, out, _ = run_cli(folder, "--url", endpoints.grpc, "--model", MODEL, "--csv", table)
    assert code == 1 and "\x1b" not in out
    for shown in ("=cmd|'x'!A1.png", "[red]x[/red].png", "\\x1b[2Jcleared.png", "a\\nb.png"):
        assert shown in out
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert sorted(row["path"] for row in rows) == sorted(f"'{name}.png" if name[0] in "=+" else f"{name}.png" for name in names)


def test_a_place_where_no_file_can_be_written_is_told_before_anything_is_sent(tmp_path: Path, run_cli: Run) -> None:
    np.savez(tmp_path / "x.npz", x=make_pixels(1))
    for option in ("--csv", "--parquet"):
        place = tmp_path / "nowhere" / "rows"
        code, out, err = run_cli(tmp_path / "x.npz", "--url", "127.0.0.1:1", "--model", MODEL, option, place)
        assert (code, out) == (2, "") and f"cannot write {place}" in err.replace("\n", "")


def test_a_withheld_answer_has_no_label() -> None:
    class Gateway:
        def describe(self) -> Any:
            return SimpleNamespace(max_batch_size=8, logits="logits")

        def infer(self, pixels: Any, outputs: Any) -> Any:
            logits = np.array([[0, 0, 0], [1, 3, 2], [0, 0, 0]], np.float32)
            flagged = np.array([FLAGGED_YES, FLAGGED_YES, PASSED], np.uint8)
            ones = np.ones(3, np.float32)
            return SimpleNamespace(outputs={"logits": logits}, flagged=flagged, score=ones, p_value=ones)

    images = Images(make_pixels(3), ("a", "b", "c"), None, ())
    (rows,) = scan_images(Gateway(), images)  # type: ignore[arg-type]
    assert [row.label for row in rows] == [-1, 1, 0]


@pytest.mark.server
def test_files_hold_all_rows(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    pixels = make_pixels(11)
    np.savez(tmp_path / "x.npz", x=pixels)
    sinks = {name: tmp_path / f"rows.{name}" for name in ("csv", "parquet")}
    for sink in sinks.values():
        sink.write_text("old")
    at = ("--url", endpoints.grpc, "--model", MODEL, "--csv", sinks["csv"], "--parquet", sinks["parquet"])
    code, out, _ = run_cli(tmp_path / "x.npz", *at, "--json")
    printed = [json.loads(line) for line in out.splitlines()]
    table = parquet.read_table(sinks["parquet"])
    rows = table.to_pylist()
    assert [str(field.type) for field in table.schema] == ["int64", "string", "int64", "float", "float", "uint8"]
    for row, said in zip(rows, printed, strict=True):
        assert row["score"] == np.float32(said["score"]) and row["p_value"] == np.float32(said["p_value"])
        assert {key: row[key] for key in ("index", "path", "label", "flagged")} == {
            key: said[key] for key in ("index", "path", "label", "flagged")
        }
    with sinks["csv"].open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in printed]
    assert code == 1 and sorted(file.name for file in tmp_path.iterdir()) == ["rows.csv", "rows.parquet", "x.npz"]


def test_nobody_at_the_address_is_one_line_and_code_2(tmp_path: Path, run_cli: Run) -> None:
    code, out, err = run_cli(save(tmp_path / "a", a=grey(DARK)), "--url", "127.0.0.1:1", "--model", MODEL)
    assert (code, out) == (2, "")
    assert err.startswith("diffense: 127.0.0.1:1 (grpc) does not answer") and err.count("\n") == 1


@given(st.text(st.characters(exclude_categories=())))
def test_printable_names_keep_what_can_be_shown(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable()
    assert shown == name or not name.isprintable()


@given(st.text(st.characters(exclude_categories=()), min_size=1), st.integers(0, CLASSES))
def test_any_name_can_be_written(tmp_path_factory: pytest.TempPathFactory, name: str, label: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    row = ScanRow(0, name, label, -1.0, -1.0, 2)
    write_csv([row], folder / "any.csv")
    write_parquet([row], folder / "any.parquet")
    with (folder / "any.csv").open(encoding="utf-8", newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["path"][0] not in "=+-@\t\r"
    assert read["path"].removeprefix("'") == name.encode("utf-8", "backslashreplace").decode().removeprefix("'")
    (cell,) = parquet.read_table(folder / "any.parquet")["path"].to_pylist()
    assert cell == name.encode("utf-8", "backslashreplace").decode()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(OptionError, match=r"rows\.csv"):
        write_csv([], tmp_path / "rows.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
