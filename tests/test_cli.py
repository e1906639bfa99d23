"""The commands that need no server, run in this process."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import onnx_models
from diffense.description import describe_guard
from diffense.guard import Guard
from diffense.settings import FitSettings
from diffense.target import Target
from shapes import draw_shapes

Run = Callable[..., tuple[int, str, str]]
HOSTILE = "\x1b]0;owned\x07[bold]"


def save_npz(path: Path, images: Any) -> Path:
    np.savez(path, x=images)
    return path


def test_calibrate_changes_the_threshold_and_nothing_else(guard: Guard, tmp_path: Path, run_cli: Run) -> None:
    clean = save_npz(tmp_path / "clean.npz", draw_shapes(120, seed=21)[0])
    code, said, _ = run_cli("calibrate", guard.directory, clean, "--alpha", "0.05", "--out", tmp_path / "renewed")
    renewed = Guard.load(tmp_path / "renewed")
    assert code == 0
    assert f"guard {renewed.guard_id}, 120 calibration images, alpha 0.05" in said
    assert (renewed.manifest.alpha, renewed.manifest.calibration_size) == (0.05, 120)
    fresh = draw_shapes(40, seed=22)[0]
    assert np.array_equal(renewed.score(fresh).scores, guard.score(fresh).scores)
    code, said, told = run_cli("calibrate", guard.directory, clean, "--alpha", "0.005", "--out", tmp_path / "other")
    assert (code, said, (tmp_path / "other").exists()) == (2, "", False)
    assert "199" in told and "120" in told


def test_calibrate_keeps_the_guards_own_alpha_and_changes_it_alone_where_no_images_are_given(
    guard: Guard, tmp_path: Path, run_cli: Run
) -> None:
    clean = save_npz(tmp_path / "clean.npz", np.concatenate([draw_shapes(120, seed=21)[0]] * 2))
    own = f"alpha {guard.manifest.alpha:g}"
    code, said, told = run_cli("calibrate", guard.directory, clean, "--out", tmp_path / "a")
    assert code == 0 and f"120 calibration images, {own};" in said and "120 of 240 clean images repeat" in told
    code, said, _ = run_cli("calibrate", guard.directory, "--alpha", "0.1", "--out", tmp_path / "b")
    assert code == 0 and f"{guard.manifest.calibration_size} calibration images, alpha 0.1;" in said
    code, _, told = run_cli("calibrate", guard.directory, "--out", tmp_path / "c")
    assert code == 2 and "nothing to change" in told


def test_score_tells_what_the_guard_says(guard: Guard, tmp_path: Path, run_cli: Run) -> None:
    pixels = np.concatenate([draw_shapes(6, seed=23)[0], np.random.default_rng(3).integers(0, 256, (4, 16, 16, 3), np.uint8)])
    images = save_npz(tmp_path / "suspects.npz", pixels)
    code, said, _ = run_cli("score", guard.directory, images, "--json")
    truth = guard.score_all(pixels)
    rows = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert [row["index"] for row in rows] == list(range(10))
    assert [row["path"] for row in rows] == [f"suspects.npz#{i}" for i in range(10)]
    assert [row["label"] for row in rows] == truth.labels.tolist()
    assert [row["flagged"] for row in rows] == truth.flagged.tolist()
    assert np.allclose([row["score"] for row in rows], truth.scores, atol=1e-6)
    assert np.allclose([row["p_value"] for row in rows], truth.p_values, atol=1e-9)
    code, said, _ = run_cli("score", guard.directory, images)
    assert f"10 scored, {truth.flagged.sum()} flagged at alpha 0.02" in said


def test_no_file_name_commands_the_terminal(guard: Guard, tmp_path: Path, run_cli: Run) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8))
    image.save(tmp_path / f"{HOSTILE}.png")
    shutil.copyfile(tmp_path / f"{HOSTILE}.png", os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / f"junk{HOSTILE}.png").write_bytes(b"no image")
    for options in ((), ("--json",)):
        code, said, told = run_cli("score", guard.directory, tmp_path, *options)
        assert code == 0
        assert "skipped junk\\x1b]0;owned\\x07[bold].png: no PNG" in told
        assert (said + told).replace("\n", "").isprintable()
    assert {json.loads(line)["path"] for line in said.splitlines()} == {f"{HOSTILE}.png", "\udcff.png"}
    code, _, told = run_cli("score", guard.directory, tmp_path / f"gone{HOSTILE}")
    assert code == 2
    assert told.strip().isprintable() and "gone\\x1b" in told


def test_inspect_shows_a_guard(guard: Guard, run_cli: Run) -> None:
    code, said, _ = run_cli("inspect", guard.directory)
    assert code == 0
    assert guard.guard_id in said and guard.manifest.network.reason in said
    assert all(tap.name in said for tap in guard.manifest.taps)
    code, said, _ = run_cli("inspect", guard.directory, "--json")
    shown = json.loads(said)
    assert shown["manifest"]["target_sha256"] == guard.manifest.target_sha256
    assert [tap["name"] for tap in shown["taps"]] == [tap.name for tap in guard.manifest.taps]


def test_inspect_tells_a_network_that_left_something_out_from_one_of_before(guard: Guard) -> None:
    now = describe_guard(guard.directory)
    found = now.manifest.network
    assert found.left_out is not None and 0 < found.left_out < now.manifest.clean.fitted
    told = f"on: {found.reason}; {found.left_out} images and copies not learned from"
    assert now.facts()["network"] == told
    report = found.model_copy(update={"left_out": None})
    before = now.model_copy(update={"manifest": now.manifest.model_copy(update={"network": report})})
    assert before.facts()["network"] == f"on: {found.reason}"


def test_inspect_shows_a_classifier_whatever_its_tensors_are_called(tmp_path: Path, run_cli: Run) -> None:
    model = onnx_models.plain_cnn()
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{HOSTILE}{name}" if name.startswith("stage") else name for name in names]
    path = onnx_models.save(model, tmp_path / "classifier.onnx")
    code, said, _ = run_cli("inspect", path)
    assert code == 0
    assert said.replace("\n", "").isprintable()
    assert "\\x1b]0;owned\\x07[bold]stage0_0" in said
    code, said, _ = run_cli("inspect", path, "--json")
    shown = json.loads(said)
    assert shown["sha256"] == Target.open(path).sha256
    assert {key: shown[key] for key in ("classes", "layout", "size", "opset", "logits")} == {
        "classes": 7, "layout": "NCHW", "size": [16, 16], "opset": 17, "logits": "logits",
    }  # fmt: skip
    assert sum(tap["used"] for tap in shown["taps"]) == 7


def test_inspect_and_fit_take_the_layout_that_the_message_asks_for(tmp_path: Path, run_cli: Run) -> None:
    b = onnx_models.Builder(8)
    x = b.node("Flatten", "image")
    for width in (24, 12):
        x = b.node("Relu", b.node("Gemm", x, b.random(36 if width == 24 else 24, width)))
    b.head(x, 12)
    path = onnx_models.save(b.model(("N", 3, 4, 3), {"logits": ("N", 7)}), tmp_path / "flat.onnx")
    images = save_npz(tmp_path / "clean.npz", np.random.default_rng(0).integers(0, 256, (300, 3, 4, 3), np.uint8))
    for command in (("inspect", path), ("fit", path, images, "--out", tmp_path / "guard")):
        code, _, told = run_cli(*command)
        assert code == 2
        assert "give --layout NCHW or --layout NHWC" in told
    code, said, _ = run_cli("inspect", path, "--layout", "NHWC", "--json")
    assert code == 0
    assert json.loads(said)["size"] == [3, 4]
    options = (
        "--layout",
        "NHWC",
        "--network",
        "off",
        "--guide",
        "logits",
        "--alpha",
        "0.05",
        "--mean",
        "0.5",
        "--std",
        "0.25,0.5,1",
    )
    code, said, told = run_cli("fit", path, images, "--out", tmp_path / "guard", *options)
    assert code == 0, told
    fitted, defaults = Guard.load(tmp_path / "guard", path), FitSettings()
    sampling = fitted.manifest.sampling
    assert {level for row in sampling.sigmas for level in row} == set(defaults.sigmas)  # what was not given is the API's own
    assert (sampling.steps, sampling.draws) == (defaults.steps, defaults.draws)
    assert (sampling.label_guidance, sampling.data_guidance) == (defaults.label_guidance, defaults.data_guidance)
    preprocessing = fitted.preprocessing
    assert (preprocessing.layout, preprocessing.size, preprocessing.mean) == ("NHWC", (3, 4), (0.5,))
    assert preprocessing.std == (0.25, 0.5, 1.0)
    assert preprocessing.scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--std", "0"), "--std"),
        (("--mean", "0.1,0.2"), "--mean"),
        (("--sigmas", "0"), "sigmas"),
        (("--draws", "3"), "diffense: draws is 3, it must be 2 or more and even"),
        (("--label-guidance", "nan"), "label_guidance is nan"),
        (("--size", "100000x100000"), "more than 64000000 pixels"),
        (("--size", "224"), "does not take images of 224x224"),
        (("--logits", "nothing"), "there is no output 'nothing'; the outputs are 'logits' (5, 4)"),
        (("--taps", "nothing"), "'nothing' is no tensor"),
        (("--alpha", "0"), "between 0 and 1"),
        (("--alpha", "1e-320"), "1e-09 at least"),
        (("--alpha", "0.001"), "needs 999 calibration images, there are 200"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    small_target: Path, tmp_path: Path, run_cli: Run, options: tuple[str, ...], told: str
) -> None:
    images = save_npz(tmp_path / "clean.npz", draw_shapes(200, seed=24)[0])
    code, _, said = run_cli("fit", small_target, images, "--out", tmp_path / "guard", *options)
    assert code == 2
    assert told in said.splitlines()[-1]
    assert not (tmp_path / "guard").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["clean.npz"]


def test_scaling_of_a_classifier_that_takes_pixels_is_refused(tmp_path: Path, run_cli: Run) -> None:
    path = onnx_models.save(onnx_models.uint8_input(), tmp_path / "m.onnx")
    for option in ("--scale", "--mean", "--std"):
        code, _, told = run_cli("fit", path, tmp_path, option, "1", "--out", tmp_path / "guard")
        assert code == 2 and "takes uint8 pixels as they are" in told


def test_a_seed_below_zero_is_a_wrong_use(small_target: Path, tmp_path: Path, run_cli: Run) -> None:
    code, _, told = run_cli("fit", small_target, tmp_path, "--seed", "-1")
    assert code == 2
    assert "Invalid value for '--seed'" in told


def test_alpha_is_judged_before_the_number_of_images(small_target: Path, tmp_path: Path, run_cli: Run) -> None:
    images = save_npz(tmp_path / "clean.npz", draw_shapes(5, seed=24)[0])
    code, _, told = run_cli("fit", small_target, images, "--alpha", "0", "--out", tmp_path / "guard")
    assert (code, told.count("\n")) == (2, 1)
    assert "alpha is 0.0, it must lie between 0 and 1" in told


@pytest.mark.parametrize("command", ["score", "calibrate"])
def test_a_guard_that_is_not_there_is_told_so(command: str, tmp_path: Path, run_cli: Run) -> None:
    code, said, told = run_cli(command, tmp_path / "nope", tmp_path)
    assert (code, said) == (2, "")
    assert told == f"diffense: {tmp_path / 'nope'}: there is no such folder; give the folder of a guard\n"


def test_a_file_that_is_no_onnx_file_ends_in_one_line(tmp_path: Path, run_cli: Run) -> None:
    onnx.save(onnx_models.vit(), tmp_path / "classifier.onnx")
    data = (tmp_path / "classifier.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(data[: len(data) // 2])
    for name in ("half.onnx", "missing.onnx", "."):
        code, said, told = run_cli("inspect", tmp_path / name)
        assert (code, said, told.count("\n")) == (2, "", 1)
        assert str(tmp_path) in told and "unexpected" not in told
