import numpy as np
import pytest

import onnx_models
from diffense.calibration import needed_images
from diffense.errors import BundleError, ImageError, OptionError, TargetError, TooFewImagesError
from diffense.fit import default_preprocessing, fit_guard
from diffense.preparation import prepare_clean
from diffense.settings import FitSettings
from diffense.target import Target
from shapes import draw_shapes


def fit(target, images, out, **settings):
    said = []
    guard = fit_guard(Target.open(target), images, out, settings=FitSettings(**settings), notify=said.append)
    return guard, " | ".join(said)


def test_twenty_images_a_class_make_a_guard_that_says_how_sure_it_is(small_target, tmp_path):
    images = draw_shapes(80, seed=2)[0]
    guard, said = fit(small_target, images, tmp_path / "g", alpha=0.05)
    low, high = guard.manifest.false_alarm_interval
    assert low == 0.0 < 0.05 < high < 0.2, "calibrated by folds the rate has no lower bound"
    assert f"{low:.2%} and {high:.2%}" in said
    assert not guard.manifest.network.used and "needs" in guard.manifest.network.reason
    fresh = guard.score(draw_shapes(1000, seed=3)[0])
    assert fresh.flagged.mean() < 2 * high


def test_an_alpha_out_of_reach_names_the_number_of_images(small_target, tmp_path):
    images = draw_shapes(80, seed=2)[0]
    with pytest.raises(TooFewImagesError, match="needs 99 calibration images, there are 80"):
        fit(small_target, images, tmp_path / "g", alpha=0.01)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_an_alpha_that_is_no_rate_is_refused(small_target, tmp_path, alpha):
    with pytest.raises(OptionError, match="between 0 and 1"):
        fit(small_target, draw_shapes(80, seed=2)[0], tmp_path / "g", alpha=alpha)


def test_too_few_images_to_fit_on_are_refused(small_target, tmp_path):
    with pytest.raises(TooFewImagesError, match=r"24 clean images are too few .* at least 34"):
        fit(small_target, draw_shapes(24, seed=2)[0], tmp_path / "g", alpha=0.5)


def test_a_class_that_is_never_predicted_is_named(small_target, tmp_path):
    images, kinds = draw_shapes(800, seed=2)
    target = Target.open(small_target)
    whole, _ = fit(small_target, images, tmp_path / "whole", alpha=0.1, network="off")
    labels = whole.score_all(images).labels
    _, said = fit(small_target, images[labels != 2], tmp_path / "g", alpha=0.1, network="off")
    assert "never predicted" in said and "class 2: 0" in said
    with pytest.raises(TooFewImagesError, match="class 2: 0"):
        fit_guard(target, images[labels != 2], tmp_path / "h", settings=FitSettings(alpha=0.1, guide="label"))
    del kinds


def test_a_thousand_classes_are_guided_by_logits(tmp_path):
    b = onnx_models.Builder(5)
    x = b.node("Relu", b.conv("image", 3, 16, stride=2), name="first")
    x = b.node("Relu", b.conv(x, 16, 32, stride=2), name="second")
    b.head(b.pool(x), 32, classes=1000)
    path = onnx_models.save(b.model(("N", 3, 16, 16), {"logits": ("N", 1000)}), tmp_path / "thousand.onnx")
    images = np.concatenate(
        [draw_shapes(2500, seed=4)[0], np.random.default_rng(0).integers(0, 256, (2500, 16, 16, 3), np.uint8)]
    )
    guard, said = fit(path, images, tmp_path / "g", network="off")
    assert guard.manifest.clean.guide == "logits" and guard.manifest.classes == 1000
    assert "guided by logits" in said or "never predicted" in said
    fresh = draw_shapes(1000, seed=5)[0]
    assert guard.score(fresh).flagged.mean() < 0.03
    strange = np.clip(fresh.astype(int) * 3, 0, 255).astype(np.uint8)
    assert guard.score(strange).scores.mean() > guard.score(fresh).scores.mean() + 1


def test_two_classes_and_one_channel_are_enough(tmp_path):
    b = onnx_models.Builder(3)
    x = b.node("Relu", b.conv("image", 1, 8), name="first")
    x = b.node("Relu", b.conv(x, 8, 12, stride=2), name="second")
    b.head(b.pool(x), 12, classes=2)
    path = onnx_models.save(b.model((1, 1, 12, 12), {"logits": (1, 2)}), tmp_path / "two.onnx")
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (200, 1, 1, 1)) * np.ones((1, 12, 12, 1)) * rng.random((200, 12, 12, 1))).astype(np.uint8)
    guard, _ = fit(path, images, tmp_path / "g", alpha=0.05, network="off")
    assert guard.manifest.batch == 1
    assert len(guard.score(images[:7]).scores) == 7


@pytest.mark.parametrize(
    "style", ["vit", "vit_sequence_first", "convnext", "preact_resnet", "densenet", "uint8_input", "nhwc_input"]
)
def test_every_style_of_network_can_be_guarded(style, tmp_path):
    model = getattr(onnx_models, style)()
    path = onnx_models.save(model, tmp_path / "target.onnx")
    target = Target.open(path)
    images = draw_shapes(300, seed=6)[0]
    assert target.size == (16, 16) and target.channels == 3
    guard, _ = fit(path, images, tmp_path / "g", alpha=0.05, network="off", guide="logits")
    assert guard.manifest.shared_max_difference <= 1e-5
    noise = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), np.uint8)
    assert guard.score(noise).scores.mean() > guard.score(draw_shapes(100, seed=8)[0]).scores.mean()


def test_a_target_that_overflows_is_told_with_the_image(small_target, clean_images, tmp_path):
    target = Target.open(small_target)
    preprocessing = default_preprocessing(target).model_copy(update={"scale": 1e36})
    with pytest.raises(ImageError, match="no numbers on any clean image; check its file, and --scale"):
        fit_guard(target, clean_images, tmp_path / "g", preprocessing=preprocessing)
    assert not (tmp_path / "g").exists()
    dark = np.zeros_like(clean_images[:40])
    dark[7] = 255
    with pytest.raises(ImageError, match="image 7 makes the target's features overflow; check --scale"):
        prepare_clean(target, dark, target.choose_taps(None), preprocessing, 0.1, "auto", 0, lambda message: None)


def test_the_learned_part_is_off_where_it_gains_nothing(small_target, tmp_path, clean_images):
    guard, said = fit(small_target, clean_images[:660], tmp_path / "g", alpha=0.05, training_steps=50)
    report = guard.manifest.network
    assert report.used == (report.loss is not None and report.loss <= 0.99 * report.gaussian_loss)
    assert f"network {'on' if report.used else 'off'}" in said
    small, _ = fit(small_target, clean_images[:100], tmp_path / "s", alpha=0.05)
    assert not small.manifest.network.used and small.manifest.network.loss is None


@pytest.mark.parametrize(
    "sampling", [{"steps": 3}, {"sigmas": (0.3, 1.0)}, {"label_guidance": 2.0}, {"data_guidance": 0.5, "steps": 2}]
)
def test_every_way_of_sampling_gives_a_calibrated_guard(small_target, clean_images, tmp_path, sampling):
    guard, _ = fit(small_target, clean_images, tmp_path / "g", alpha=0.05, network="on", training_steps=50, **sampling)
    assert guard.score(draw_shapes(600, seed=9)[0]).flagged.mean() < 0.11
    assert guard.manifest.denoiser.rows == FitSettings().draws * len(sampling.get("sigmas", (0.3,)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", "never"),
        ("guide", "nobody"),
        ("seed", -1),
        ("chain_sigma", 0.0),
        ("chain_sigma", float("nan")),
        ("steps", 0),
        ("draws", 0),
        ("draws", 3),
        ("label_guidance", float("nan")),
        ("label_guidance", float("inf")),
        ("data_guidance", -1.0),
        ("data_guidance", float("nan")),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_before_any_work(name, value):
    with pytest.raises(OptionError, match=f"^{name} is {value}, it must be "):
        FitSettings(**{name: value})


@pytest.mark.parametrize("place", ["file", "file/guard", "precious"])
def test_a_place_that_cannot_be_written_is_refused_before_the_fit(small_target, clean_images, tmp_path, place):
    (tmp_path / "file").write_text("thesis")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=f"{place} .*choose another place"):  # too few images: a fit would say so
        fit(small_target, clean_images[:3], tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sigmas", [(), (0.0,), (-1.0,), ((0.3, 0.3),), (float("nan"),), (float("inf"),)])
def test_noise_levels_that_make_no_sense_are_refused(small_target, clean_images, tmp_path, sigmas):
    with pytest.raises(OptionError, match="sigmas"):
        fit(small_target, clean_images, tmp_path / "g", sigmas=sigmas, alpha=0.05)


def test_named_taps_are_used_and_unknown_ones_refused(small_target, clean_images, tmp_path):
    target = Target.open(small_target)
    names = [tap.name for tap in target.list_taps()][-3:-1]
    guard = fit_guard(target, clean_images, tmp_path / "g", taps=names, settings=FitSettings(alpha=0.05, network="off"))
    assert [tap.name for tap in guard.manifest.taps] == names
    with pytest.raises(TargetError, match="nothing_here"):
        fit_guard(target, clean_images, tmp_path / "h", taps=["nothing_here"], settings=FitSettings(alpha=0.05))


def test_pixels_are_divided_by_255_unless_told_otherwise(small_target):
    assert default_preprocessing(Target.open(small_target)).scale == pytest.approx(1 / 255)
    assert needed_images(0.01) == 99
