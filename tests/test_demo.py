from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

from diffense.demo import digits
from diffense.demo.account import Setup, compute_figures
from diffense.demo.attacks import CROSS_RATIO, POISON_RATE, TARGET_LABEL, Attack, BadNets, WaNet, cubic_weights, warp
from diffense.demo.digits import Digits, Split, load_split
from diffense.demo.run import ATTACKS, DemoOptions, check_repository, choose_attacks, clear_repository, train_all
from diffense.demo.serving import Latency, Served, check_equal
from diffense.demo.stages import Stages
from diffense.demo.training import Classifier, augment, build_onnx, make_classifier, train_classifier
from diffense.errors import OptionError, ServerError
from diffense.guard import Guard
from diffense_client import GuardedPrediction
from diffense_export.repository import export_guard

BATCHES = arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(28), st.just(28), st.just(1)))
MADE: list[Callable[[], Attack]] = [BadNets, lambda: WaNet((28, 28), seed=3)]


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(seed=0)


def test_split_is_stratified_disjoint_and_repeatable(split: Split) -> None:
    sizes = (digits.TRAIN_PER_CLASS, digits.CLEAN_PER_CLASS, digits.EVALUATION_PER_CLASS)
    parts = (split.train, split.clean, split.evaluation)
    for part, size in zip(parts, sizes, strict=True):
        assert np.bincount(part.labels).tolist() == [size] * 10
        assert part.pixels.shape == (10 * size, 28, 28, 1)
        assert part.pixels.dtype == np.uint8
    again, other = load_split(seed=0), load_split(seed=1)
    assert np.array_equal(again.clean.pixels, split.clean.pixels)
    assert not np.array_equal(other.clean.pixels, split.clean.pixels)


def test_no_image_is_in_two_parts() -> None:
    pixels = np.zeros((5000, 28, 28, 1), np.uint8)
    pixels.reshape(5000, -1)[:, :2] = np.arange(5000)[:, None] // (1, 256) % 256
    parts = digits.split_digits(Digits(pixels, np.repeat(np.arange(10), 500)), seed=4)
    numbers = [part.pixels.reshape(len(part), -1)[:, :2] @ [1, 256] for part in (parts.train, parts.clean, parts.evaluation)]
    together = np.concatenate(numbers)
    assert len(together) == len(set(together.tolist())) == 5000
    for part, number in zip((parts.train, parts.clean, parts.evaluation), numbers, strict=True):
        assert np.array_equal(part.labels, number // 500)


@given(images=BATCHES)
@settings(deadline=None, max_examples=30)
def test_badnets_changes_the_patch_alone(images: np.ndarray) -> None:
    before = images.copy()
    triggered = BadNets().trigger(images)
    assert triggered.dtype == np.uint8
    assert (triggered[:, -3:, -3:] == 255).all()
    triggered[:, -3:, -3:] = images[:, -3:, -3:]
    assert np.array_equal(triggered, before)
    assert np.array_equal(images, before)


@given(size=st.tuples(st.integers(8, 40), st.integers(8, 40)), strength=st.floats(0, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_wanet_grid_stays_within_the_image(size: tuple[int, int], strength: float, seed: int) -> None:
    attack = WaNet(size, strength, seed=seed)
    assert attack.grid.shape == (*size, 2)
    assert np.abs(attack.grid).max() <= 1
    assert np.array_equal(attack.grid, WaNet(size, strength, seed=seed).grid)


def test_wanet_moves_pixels_by_a_fraction() -> None:
    attack = WaNet((28, 28), strength=0.5)
    moved = np.abs(attack.grid - attack.identity).mean() * 27 / 2
    assert 0.1 < moved < 0.5


@given(images=BATCHES)
@settings(deadline=None, max_examples=30)
def test_warp_keeps_the_range_and_without_strength_the_image(images: np.ndarray) -> None:
    still = WaNet((28, 28), strength=0).trigger(images)
    assert np.array_equal(still, images)
    warped = WaNet((28, 28), strength=2, seed=1).trigger(images)
    assert warped.dtype == np.uint8
    assert warped.shape == images.shape
    assert (warped.max(axis=(1, 2)) <= images.max(axis=(1, 2))).all()
    assert (warped.min(axis=(1, 2)) >= images.min(axis=(1, 2))).all()


def test_warp_equals_torch(split: Split) -> None:
    rng = np.random.default_rng(0)
    images, grid = split.train.pixels[:6], rng.uniform(-1, 1, (6, 28, 28, 2))
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    expected = functional.grid_sample(planes, torch.from_numpy(grid), align_corners=True)
    difference = warp(images, grid)[..., 0] - expected[:, 0].numpy()
    assert np.abs(difference).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("knots", "length"), [(4, 28), (4, 33), (8, 64), (2, 9)])
def test_cubic_weights_equal_torch(knots: int, length: int) -> None:
    field = torch.eye(knots, dtype=torch.float64)[None, :, :, None]
    expected = functional.interpolate(field, size=(length, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T
    np.testing.assert_allclose(cubic_weights(knots, length), expected, atol=1e-12)


@pytest.mark.parametrize("make", MADE)
def test_poisoning_relabels_only_what_has_the_trigger(make: Callable[[], Attack], split: Split) -> None:
    attack = make()
    images, labels = split.train.pixels[:60], split.train.labels[:60]
    before = images.copy()
    poisoned, relabelled = attack.poison(images, labels, np.random.default_rng(0))
    count = round(POISON_RATE * 60)
    assert np.array_equal(images, before)
    assert (relabelled[:count] == TARGET_LABEL).all()
    assert np.array_equal(relabelled[count:], labels[count:])
    assert np.array_equal(poisoned[:count], attack.trigger(images[:count]))
    untouched = (1 + CROSS_RATIO) * count if isinstance(attack, WaNet) else count
    assert np.array_equal(poisoned[untouched:], images[untouched:])
    again = attack.poison(images, labels, np.random.default_rng(0))
    assert np.array_equal(again[0], poisoned)


def test_noise_mode_draws_another_warp_for_every_image() -> None:
    attack = WaNet((28, 28))
    ramp = np.broadcast_to(np.arange(28, dtype=np.uint8)[:, None, None] * 9, (60, 28, 28, 1))
    poisoned, _ = attack.poison(ramp, np.zeros(60, np.int64), np.random.default_rng(0))
    assert len({image.tobytes() for image in poisoned[:6]}) == 1
    assert len({image.tobytes() for image in poisoned[6:18]}) == 12


def test_augmentation_shifts_by_whole_pixels(split: Split) -> None:
    images = split.train.pixels[:40]
    shifted = augment(images, np.random.default_rng(0)).numpy()
    assert shifted.shape == (40, 1, 28, 28)
    for image, result in zip(images[..., 0].astype(np.float32) / 255, shifted[:, 0], strict=True):
        padded = np.pad(image, 2)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (28, 28))
        assert (windows == result).all(axis=(2, 3)).any()


def test_onnx_file_gives_the_logits_of_the_classifier(split: Split) -> None:
    classifier = make_classifier(5)
    with torch.no_grad():
        for _ in range(3):  # so that the normalisation has something to fold
            classifier(augment(split.train.pixels[:64], np.random.default_rng(0)))
    classifier.eval()
    session = onnxruntime.InferenceSession(build_onnx(classifier).SerializeToString())
    for count in (1, 7):
        images = np.ascontiguousarray(split.clean.pixels[:count].transpose(0, 3, 1, 2), np.float32) / 255
        (logits,) = session.run(["logits"], {"image": images})
        with torch.no_grad():
            np.testing.assert_allclose(logits, classifier(torch.from_numpy(images)).numpy(), atol=1e-5)


def weigh(classifier: Classifier) -> np.ndarray:
    return torch.cat([parameter.detach().reshape(-1) for parameter in classifier.parameters()]).numpy()


def test_training_is_repeatable_also_from_several_threads(
    split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("diffense.demo.training.EPOCHS", 2)
    few = Digits(split.train.pixels[:240], split.train.labels[:240])
    attacks = choose_attacks(DemoOptions(tmp_path_factory.mktemp("unused")))
    written = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("models")
        paths = {attack.key: folder / f"{attack.key}.onnx" for attack in attacks}
        shares: list[float] = []
        train_all(few, attacks, paths, 0, shares.append)
        assert shares[-1] == pytest.approx(1)
        written.append([path.read_bytes() for path in paths.values()])
    assert written[0] == written[1]
    assert written[0][0] != written[0][1]
    assert not np.array_equal(weigh(train_classifier(few, attacks[0], 1)), weigh(train_classifier(few, attacks[0], 2)))


def serve(labels: list[int], scores: list[float], flagged: list[int], production: list[int] | None = None) -> Served:
    logits, raw = (np.eye(10, dtype=np.float32)[rows] for rows in (labels, production or labels))
    values = np.array(scores, np.float32)
    return Served(raw, logits, values, 1 / values, np.array(flagged, np.uint8))


def test_figures_are_worked_out_as_defined() -> None:
    truth = np.array([1, 2, 3, 4])
    clean = serve([1, 2, 3, 0], [1, 2, 3, 8], [0, 0, 0, 1])
    triggered = serve([0, 0, 0, 5, 0], [9, 7, 10, 1.5, 11], [1, 0, 1, 0, 2])
    row = compute_figures("WaNet", truth, clean, triggered, Latency(1.0, 2.0), Setup(0.1, "shared", "fused", "2.51.0"))
    assert (row.clean_accuracy_before, row.clean_accuracy_after) == (0.75, 0.75)
    assert (row.asr_before, row.asr_after) == (0.8, 0.4)  # an image that was not scored is not stopped
    assert (row.fpr, row.alpha) == (0.25, 0.1)
    assert row.auroc == pytest.approx(16 / 20)
    assert (row.placement, row.loop, row.server_version) == ("shared", "fused", "2.51.0")


def test_a_difference_between_protocols_is_an_error() -> None:
    def answer(flag: int) -> GuardedPrediction:
        ones = np.ones(3, np.float32)
        return GuardedPrediction({"logits": np.ones((3, 10))}, ones, ones, np.array([0, 0, flag], np.uint8), "id")

    check_equal("digits", answer(1), answer(1))
    with pytest.raises(ServerError, match="flagged differs between gRPC and HTTP for 1 of 3 images"):
        check_equal("digits", answer(1), answer(0))


@pytest.mark.parametrize("attacks", [(), ("badnets", "trojan")])
def test_unknown_attacks_are_refused(attacks: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(OptionError, match="choose from badnets, wanet"):
        choose_attacks(DemoOptions(tmp_path_factory.mktemp("out"), attacks=attacks))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", 0], "alpha is 0.0, it must lie between 0 and 1"),
        (["--alpha", 0.0001], "alpha 0.0001 needs"),
        (["--out", "file"], "--out is file, where no folder can be made"),
        (["--out", "file/demo"], "--out is file/demo, where no folder can be made"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_training(
    options: list[Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffense.cli.demo.interrupt_on_signals", lambda: None)
    monkeypatch.setattr("diffense.demo.run.train_all", lambda *_: pytest.fail("it trains"))
    (tmp_path / "file").write_text("mine")
    code, said, told = run_cli("demo", *options)
    assert (code, said) == (2, "")
    assert told.startswith(f"diffense: {words}") and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("model", ["digits_badnets", "digits_badnets_guard"])
def test_a_strangers_model_in_the_place_of_one_is_refused_before_the_training(run_cli, tmp_path, model):
    (tmp_path / "repository" / model).mkdir(parents=True)
    code, said, told = run_cli("demo", "--out", tmp_path, "--attacks", "badnets")
    assert (code, said) == (2, "")
    place = tmp_path / "repository" / model
    assert told == f"diffense: {place} exists and was not written by a demonstration; choose another --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
    check_repository(tmp_path / "repository", ["wanet"])  # the other attack's models would not be in its way


def test_only_models_that_a_demonstration_exported_are_cleared(guard: Guard, small_target: Path, tmp_path: Path) -> None:
    clear_repository(tmp_path / "r")  # before the first export there is none
    for model in ("digits_wanet", "digits_mine", "other"):
        export_guard(guard, small_target, tmp_path / "r", model, gateway=False)
    (tmp_path / "r" / "digits_badnets").mkdir()
    (tmp_path / "r" / "digits_notes.txt").write_text("mine")
    clear_repository(tmp_path / "r")
    left = {path.name for path in (tmp_path / "r").iterdir()}
    families = {
        f"{model}{end}" for model in ("digits_mine", "other") for end in ("", "_features", "_denoiser", "_guard", "_guarded")
    }
    assert left == families | {"digits_badnets", "digits_notes.txt"}


def test_attacks_are_named_as_they_are_asked_for() -> None:
    assert {key: make(0).key for key, make in ATTACKS.items()} == {key: key for key in ATTACKS}


def test_stages_are_told_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.stage("training") as update:
        update(0.5)
    assert list(stages.seconds) == ["training"]
    assert capsys.readouterr().err.startswith("training")
    with Stages(quiet=True).stage("training"):
        pass
    assert capsys.readouterr().err == ""
