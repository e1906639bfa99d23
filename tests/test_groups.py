"""Clean images that belong together: no frame of a scene is judged by what was fitted on another of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import shapes
from diffense.bundle import recalibrate
from diffense.clean import FEW_GROUPS
from diffense.errors import OptionError, TooFewImagesError
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.options import group_names
from diffense.settings import FitSettings
from diffense.target import Target

SCENES, FRAMES = 60, 10


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """(600, 16, 16, 3): ten frames each of sixty scenes, which differ by little noise."""
    scenes = np.repeat(shapes.draw_shapes(SCENES, seed=3)[0], FRAMES, axis=0).astype(np.int64)
    return np.clip(scenes + np.random.default_rng(0).integers(-6, 7, scenes.shape), 0, 255).astype(np.uint8)


def fit(target: Path, images: NDArray[np.uint8], out: Path, groups: NDArray[Any] | None, **changes: Any) -> Guard:
    settings = FitSettings(network="off", **{"alpha": 0.05, **changes})
    return fit_guard(Target.open(target), images, out, groups=groups, settings=settings)


def measure_false_alarms(guard: Guard) -> float:
    return float(guard.score(shapes.draw_shapes(3000, seed=9)[0]).flagged.mean())


def test_new_scenes_are_flagged_as_often_as_asked_for_where_the_guard_knows_which_frames_are_of_one(
    small_target: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    groups = np.repeat(np.arange(SCENES), FRAMES)
    alone = fit(small_target, frames, tmp_path / "alone", None)
    known = fit(small_target, frames, tmp_path / "known", groups)
    clean = known.manifest.clean
    assert clean.calibrated_groups == clean.calibrated / FRAMES == SCENES and alone.manifest.clean.calibrated_groups is None
    assert known.manifest.crossed and clean.fitted == len(frames) and not alone.manifest.crossed
    low, high = known.manifest.false_alarm_interval
    assert low <= measure_false_alarms(known) <= high
    assert measure_false_alarms(alone) > max(alone.manifest.false_alarm_interval[1], 2 * measure_false_alarms(known))


def test_few_images_calibrate_by_folds_that_split_no_scene(
    small_target: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    groups = np.repeat(np.arange(SCENES), FRAMES)
    few = np.flatnonzero(np.arange(len(frames)) % FRAMES < 4)
    alone = fit(small_target, frames[few], tmp_path / "alone", None)
    known = fit(small_target, frames[few], tmp_path / "known", groups[few])
    assert known.manifest.calibration_size == len(known.scorer.calibration)
    assert known.manifest.crossed and known.manifest.clean.calibrated_groups == SCENES
    assert measure_false_alarms(known) < 0.5 * measure_false_alarms(alone)
    assert np.median(known.scorer.calibration) > np.median(alone.scorer.calibration)


def test_many_scenes_are_split_whole_unless_alpha_needs_more(small_target: Path, tmp_path: Path) -> None:
    scenes = np.repeat(shapes.draw_shapes(FEW_GROUPS, seed=3)[0], 2, axis=0)
    scenes[1::2, 0, 0, 0] ^= 1  # no repeat, which would be left out
    groups = np.repeat(np.arange(FEW_GROUPS), 2)
    guard = fit(small_target, scenes, tmp_path / "g", groups)
    clean = guard.manifest.clean
    assert not guard.manifest.crossed and clean.fitted + clean.calibrated == 2 * FEW_GROUPS
    assert clean.calibrated_groups == clean.calibrated / 2 == 0.4 * FEW_GROUPS
    guard = fit(small_target, scenes, tmp_path / "g", groups, alpha=0.005)  # 199 groups; two fifths are 160
    assert guard.manifest.crossed and guard.manifest.clean.calibrated_groups == FEW_GROUPS


def test_groups_of_single_images_change_nothing_but_what_is_told(
    small_target: Path, clean_images: NDArray[np.uint8], tmp_path: Path
) -> None:
    plain = fit(small_target, clean_images, tmp_path / "plain", None)
    single = fit(small_target, clean_images, tmp_path / "single", np.arange(len(clean_images)))
    assert np.array_equal(single.scorer.calibration, plain.scorer.calibration)
    assert single.manifest.false_alarm_interval == plain.manifest.false_alarm_interval
    assert single.manifest.clean.calibrated_groups == plain.manifest.clean.calibrated


def test_a_new_calibration_and_another_alpha_know_the_groups(
    small_target: Path, frames: NDArray[np.uint8], clean_images: NDArray[np.uint8], tmp_path: Path
) -> None:
    guard = fit(small_target, clean_images, tmp_path / "g", None)
    groups = np.repeat(np.arange(SCENES), FRAMES)
    known = recalibrate(guard, frames, 0.05, tmp_path / "known", groups=groups)
    alone = recalibrate(guard, frames, 0.05, tmp_path / "alone")
    assert np.array_equal(known.scorer.calibration, alone.scorer.calibration), "of scenes of one length each counts the same"
    assert known.manifest.clean.calibrated_groups == SCENES and alone.manifest.clean.calibrated_groups is None
    widths = [np.diff(made.manifest.false_alarm_interval)[0] for made in (known, alone)]
    assert widths[0] > 2 * widths[1]
    again = recalibrate(known, None, 0.1, tmp_path / "again")
    assert np.diff(again.manifest.false_alarm_interval)[0] > widths[0]
    with pytest.raises(TooFewImagesError, match="needs 99 calibration groups, there are 60"):
        recalibrate(known, None, 0.01, tmp_path / "again")
    with pytest.raises(OptionError, match="one integer for each of 600 images"):
        recalibrate(guard, frames, 0.05, tmp_path / "known", groups=groups[1:])


def test_too_few_scenes_are_refused_before_anything_is_fitted(
    small_target: Path, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    with pytest.raises(TooFewImagesError, match="of 19 groups"):
        fit(small_target, frames, tmp_path / "g", np.arange(len(frames)) % 19)
    with pytest.raises(TooFewImagesError, match=r"alpha 0\.02 needs 49 calibration groups, there are 40"):
        fit(small_target, frames[:400], tmp_path / "g", np.arange(400) // FRAMES, alpha=0.02)
    assert not (tmp_path / "g").exists()


def test_groups_are_read_from_names() -> None:
    names = ["a/1_0.png", "a/1_1.png", "b/1_0.png", "b/22_0.png"]
    assert group_names(r"^(.*)_", names).tolist() == [0, 0, 1, 2]
    assert group_names(r"\d+_", names).tolist() == [0, 0, 0, 1]
    with pytest.raises(OptionError, match=r"--groups 'a/\(.*is not found in 'b/1_0\.png'"):
        group_names(r"a/(.)", names)
    with pytest.raises(OptionError, match="no regular expression"):
        group_names("(", names)
    with pytest.raises(OptionError, match="no regular expression"):
        group_names("a{99999999999999999999}", names)
    with pytest.raises(OptionError, match=r"'b/1_0\.png'"):
        group_names("(a)|b", names)


def test_the_commands_take_groups_from_file_names(
    small_target: Path, frames: NDArray[np.uint8], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "clean").mkdir()
    for row, image in enumerate(frames):
        Image.fromarray(image).save(tmp_path / "clean" / f"{row // FRAMES:03d}_{row % FRAMES}.png")
    options = "--alpha", "0.05", "--groups", r"^(\d+)_"
    code, _, told = run_cli("fit", small_target, tmp_path / "clean", "--out", tmp_path / "g", "--network", "off", *options)
    assert code == 0 and "calibrated on 600 images of 60 groups, each scored by a fit without it: " in told
    code, said, _ = run_cli("inspect", tmp_path / "g")
    assert code == 0 and "600 calibrate of 60 groups, the same ones by folds" in " ".join(said.split())
    code, _, told = run_cli("calibrate", tmp_path / "g", tmp_path / "clean", *options)
    assert code == 0 and Guard.load(tmp_path / "g").manifest.clean.calibrated_groups == SCENES
    code, _, told = run_cli("calibrate", tmp_path / "g", *options)
    assert code == 2 and "none are given" in told
    code, _, told = run_cli("fit", small_target, tmp_path / "clean", "--out", tmp_path / "h", "--groups", "x")
    assert (code, told.count("\n")) == (2, 1) and "--groups 'x' is not found in '000_0.png'" in told
