"""The ablation: its default is the guard, each variant changes one part."""

from dataclasses import fields, replace

import numpy as np
import pytest

from benchmarks import records
from benchmarks.ablation import __main__ as command
from benchmarks.ablation import table
from benchmarks.ablation.fits import CHAIN_SIGMA, Fits, take_rows
from benchmarks.ablation.trial import UNCHANGED, Trial
from benchmarks.ablation.variants import CLOSED, DEFAULT, VARIANTS, Variant
from benchmarks.evaluation import prepare_cell
from benchmarks.inspection import inspect_images
from benchmarks.latents import CellLatents, Seen, get_latents
from benchmarks.targets import make_cell
from diffense import scorer_fit
from diffense.crossfit import cross_fit
from diffense.fit import fit_guard
from diffense.sampling import lay_ladder
from diffense.scorer_fit import STRANGEST, choose_typical
from diffense.scoring import Formula, lay_bands
from diffense.settings import FitSettings
from diffense.target import Target
from latent_sets import draw_rows, make_set


@pytest.fixture
def cell(bench):
    return make_cell("mnist", "badnets", "small_cnn")


WIDTH = 24  # more directions than the mismatch takes as leading


def make_latents(generator: np.random.Generator) -> CellLatents:
    """Two taps of 24 entries, three classes, no target behind them."""

    def draw(rows: int, shift: float) -> Seen:
        labels = generator.integers(0, 3, rows)
        logits = 4.0 * np.eye(3)[labels] + generator.standard_normal((rows, 3))
        centre = np.eye(3)[logits.argmax(1)] @ np.random.default_rng(1).standard_normal((3, 2 * WIDTH))
        return Seen(logits, centre + generator.standard_normal((rows, 2 * WIDTH)) * 0.5 + shift)

    return CellLatents(draw(300, 0.0), generator.integers(0, 5, 300), 300, draw(100, 0.0), draw(80, 0.0), draw(20, 1.5), WIDTH)


@pytest.fixture(scope="module")
def fits():
    """Shared, as the command shares it; the networks stay as they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.ablation.fits.TRAINING_STEPS", 2)
        yield Fits(make_latents(np.random.default_rng(0)), 0)


def test_the_default_without_network_scores_as_the_guard_does(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer_fit, "FEWEST_ROWS", 0)  # the ablation's cells have more images: folds that share a whitening
    found = prepare_cell(cell, None, print)
    guard = fit_guard(
        Target.open(found.target.path), found.clean.pixels, tmp_path / "guard", settings=FitSettings(network="off")
    )
    trial = Trial(Fits(get_latents(cell, 0, print), 0), CLOSED)
    view = inspect_images(guard, found.evaluation.pixels)
    expected = guard.scorer.score(view.logits, view.latents.reshape(len(view.logits), -1), None).scores
    assert np.allclose(trial.score(trial.fits.cell.evaluation), expected, rtol=2e-3, atol=2e-3)


def test_latents_of_another_grid_are_others_and_are_kept_apart(cell):
    usual, vectors, again = (get_latents(cell, 0, print, grid).evaluation for grid in (2, 1, 2))
    assert np.array_equal(usual.logits, vectors.logits) and np.array_equal(usual.latents, again.latents)
    assert usual.latents.shape != vectors.latents.shape or not np.allclose(usual.latents, vectors.latents)


def test_an_untrained_network_is_the_closed_form(fits):
    on, off = Trial(fits, DEFAULT), Trial(fits, CLOSED)
    rows = fits.cell.evaluation
    whole = on.whole
    variance = float(on.sigmas[0, 0]) ** 2
    kept = variance / (1.0 + variance)  # the Gaussian gives the rest back, so this is the distance
    difference = on.measure_strangeness(whole, rows) - off.measure_strangeness(whole, rows)
    assert np.allclose(difference, 2 * np.log(kept), atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_variant_changes_a_part_and_catches_what_is_far_off(variant, fits):
    figures = command.measure_variant(fits, variant)
    assert figures["auroc"] > 0.9
    changed = [f.name for f in fields(Variant) if getattr(variant, f.name) != getattr(DEFAULT, f.name)]
    assert variant is DEFAULT or set(changed) - {"name", "group"}


def test_the_mismatch_of_whole_taps_is_the_first_of_each_taps_three_parts(fits):
    whole = next(variant for variant in VARIANTS if not variant.parts)
    every, alone = (Trial(fits, replace(variant, network=False)) for variant in (DEFAULT, whole))
    found = every.measure_mismatch(every.whole, fits.cell.evaluation)
    assert found.shape[1] == 6
    assert np.array_equal(alone.measure_mismatch(alone.whole, fits.cell.evaluation), found[:, [0, 3]])


def test_the_ablation_leaves_out_what_the_guard_does():
    latents, logits = draw_rows(500, 3, 2, WIDTH, seed=0)
    clean = replace(make_set(latents, logits, WIDTH), chain_sigma=CHAIN_SIGMA)
    whole = clean.fit_linear(np.ones(500, bool))
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    noise, ladder = np.zeros((2, 2 * WIDTH)), lay_ladder(np.full((1, 2), 0.7), 1)
    bands = lay_bands(clean.used, WIDTH)[0]
    formula = Formula(whole[0], whole[1].transform, bands, noise, ladder, 2, WIDTH, 0.0, False)
    typical = choose_typical(clean, crossed, formula)
    seen = Seen(logits, latents)
    several = replace(CLOSED, strangest=STRANGEST, sigmas=(0.5, 1.0, 2.0))
    trial = Trial(Fits(CellLatents(seen, crossed.folds, 500, seen, seen, seen, WIDTH), 0), replace(several, sigmas=(0.7,)))
    assert trial.find_strangest() == tuple(np.flatnonzero(~typical))
    assert len(trial.find_strangest()) == 5
    trial.variant = several
    assert trial.find_strangest() == tuple(np.flatnonzero(~typical))


def test_rows_that_are_left_out_change_the_network(monkeypatch):
    taught = []
    monkeypatch.setattr("benchmarks.ablation.fits.train_denoiser", lambda rows, *others: taught.append(len(rows.innovation)))
    fits = Fits(make_latents(np.random.default_rng(0)), 0)
    levels = DEFAULT.lay_levels(2)
    held_out = int((fits.cell.folds == 0).sum())
    others = tuple(np.flatnonzero(fits.cell.folds != 0)[:7].tolist())
    for strangest in ((), others):
        fits.learn(UNCHANGED, 8, levels, strangest)
    assert taught == [300 - held_out, 300 - held_out - 7]


def test_variant_names_are_their_own():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_scores_of_one_row_do_not_depend_on_the_others(fits):
    trial = Trial(fits, DEFAULT)
    rows = trial.fits.cell.triggered
    assert np.allclose(trial.score(rows)[7:8], trial.score(take_rows(rows, np.array([7]))), rtol=1e-5)


def test_measured_variants_are_kept_and_the_rest_goes_on(cell, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ABLATION", tmp_path / "ablation.json")
    monkeypatch.setattr(command, "VARIANTS", (CLOSED,))
    command.run_ablation([cell], [0], [])
    (row,) = records.read_rows(tmp_path / "ablation.json")
    assert row["variant"] == CLOSED.name and row["losses"] is None
    assert command.list_missing([cell], [0], []) == []
    monkeypatch.setattr(command, "VARIANTS", (CLOSED, DEFAULT))
    ((_, seed, lacking),) = command.list_missing([cell], [0], [])
    assert seed == 0 and lacking == [DEFAULT]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--cells", "mnist"], "dataset-attack"), (["--cells", "mnist-no"], "wanet"), (["--groups", "no"], "levels")],
)
def test_unknown_names_are_told(arguments, named):
    with pytest.raises(SystemExit, match=named):
        command.main(arguments)


def test_another_target_seed_can_be_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "run_ablation", lambda cells, seeds, groups: asked.extend(cells))
    command.main(["--cells", "gtsrb-wanet,cifar10-wanet", "--target-seed", "3"])
    assert [(cell.dataset, cell.seed) for cell in asked] == [("gtsrb", 3), ("cifar10", 3)]


def test_the_table_has_a_line_a_variant_and_means_over_seeds():
    rows = [
        {"dataset": d, "attack": "wanet", "target": "staged_resnet", "seed": 0, "guard_seed": seed, "variant": name,
         "auroc": auroc, "tpr_at_fpr1": 0.5, "commit": "c", "machine": "m"}
        for d, name, seed, auroc in (
            ("gtsrb", "default", 0, 0.98), ("gtsrb", "default", 1, 0.99), ("mnist", "default", 0, 1.0),
            ("mnist", "level 2", 0, 0.5),
        )
    ]  # fmt: skip
    lines = table.render_table(rows, "auroc", table.show_spread)
    assert "| default | default | 0.9850 ± 0.0050 | 1.0000 | 0.9925 |" in lines
    assert "| levels | level 2 | – | 0.5000 | – |" in lines
    assert "guard seed 0, 1" in table.render_page(rows)
    third = rows[0] | {"variant": "level 2", "auroc": 0.985, "tpr_at_fpr1": 0.4}
    (line,) = table.render_differences([*rows, third])[2:]
    assert line == "| levels | level 2 | 2 | -0.24750 | -0.50000 | +0.00500 | -0.05000 | -0.10000 | +0.00000 |"
