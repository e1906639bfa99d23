import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from benchmarks.peers import PEERS, Inspected, Model, make_peer
from benchmarks.peers.badexpert import judge, move, shuffle
from benchmarks.peers.base import standardise_by_class
from benchmarks.peers.beatrix import compute_grams, find_bands, find_stage_input
from benchmarks.peers.corruptions import CORRUPTIONS
from benchmarks.peers.ibdpsc import amplify, order_norms
from benchmarks.peers.lfba import weigh_layers
from benchmarks.peers.scaleup import measure_consistency, multiply
from benchmarks.peers.strip import entropy, superimpose
from diffense.errors import OptionError
from peer_world import LATENT_PEERS, Fixed, Tiny, fit, make_world, take
from shapes import KINDS, draw_shapes


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.mark.parametrize("name", PEERS)
def test_scores_are_finite_and_independent_of_order_split_and_fit(name, world):
    model, _, _, inspected = world
    weights = copy.deepcopy(model.network.state_dict())
    peer = fit(name, world)
    scores = peer.score(model, inspected)
    assert peer.name == name and peer.title and isinstance(peer.cheap, bool)
    assert scores.dtype == np.float64 and scores.shape == (24,) and np.isfinite(scores).all()
    assert np.ptp(scores) > 0
    order = np.random.default_rng(0).permutation(24)
    assert_allclose(peer.score(model, take(inspected, order)), scores[order], rtol=2e-3, atol=1e-4)
    parts = [peer.score(model, take(inspected, rows)) for rows in (np.arange(1), np.arange(1, 24))]
    assert_allclose(np.concatenate(parts), scores, rtol=2e-3, atol=1e-4)
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not model.network.training
    if name not in ("badexpert",):  # fine-tuning is reproducible too, but takes longest
        assert_array_equal(fit(name, world).score(model, inspected), scores)


@pytest.mark.parametrize("name", PEERS)
def test_a_class_with_one_clean_image_and_one_with_none(name, world):
    model, clean, labels, inspected = world
    few = np.concatenate([np.flatnonzero(clean.predicted == c)[:n] for c, n in ((0, 30), (1, 30), (2, 1))])
    peer = make_peer(name)
    peer.fit(model, take(clean, few), labels[few])
    assert np.isfinite(peer.score(model, inspected)).all()


def test_the_registry_names_what_it_knows():
    assert {"strip", "tedpp", "latent_all_doubt"} <= set(PEERS)
    with pytest.raises(OptionError, match=r"no peer 'stripe'; known are strip, scaleup"):
        make_peer("stripe")


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("strip", 64),
        ("scaleup", 5),
        ("scaleup_free", 5),
        ("ibdpsc", None),
        *((name, 1) for name in ("beatrix", "lfba", "ted", "tedpp", "vim")),
        ("badexpert", 2),
        ("msp", 0),
        *((name, 0) for name in LATENT_PEERS),
    ],
)
def test_forward_passes_are_counted(name, passes, world):
    model, _, _, inspected = world
    peer = fit(name, world)
    before = model.forwards
    peer.score(model, inspected)
    assert model.forwards - before == 24 * (len(peer.copies) if passes is None else passes)


def test_teco_stops_at_the_first_severity_that_changes_the_label(world):
    inspected = world[3]
    never = Model(Fixed(lambda x: torch.tensor([[1.0, 0, 0, 0]]).repeat(len(x), 1)), KINDS)
    logits = np.tile(np.float32([1, 0, 0, 0]), (24, 1))
    assert_array_equal(make_peer("teco").score(never, replace(inspected, logits=logits)), np.zeros(24))  # l = 6 everywhere
    assert never.forwards == 75 * 24
    never.forwards = 0
    assert_array_equal(make_peer("teco").score(never, replace(inspected, logits=logits[:, ::-1].copy())), np.zeros(24))  # l = 1
    assert never.forwards == 15 * 24


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_grow_with_severity_and_leave_the_batch_alone(name, channels):
    images = draw_shapes(8, seed=3)[0].repeat(2, axis=1).repeat(2, axis=2)[..., :channels]
    found = [CORRUPTIONS[name](images, severity) for severity in range(1, 6)]
    change = [np.abs(f.astype(float) - images).mean() for f in found]
    assert all(f.dtype == np.uint8 and f.shape == images.shape for f in found)
    assert change[0] > 0 and change[4] > change[0]
    assert_array_equal(CORRUPTIONS[name](images[5:6], 3), found[2][5:6])


def test_strip_measures_entropy_in_bits():
    assert_allclose(entropy(np.float32([[0, 0, 0, 0], [100, 0, 0, 0]])), [2.0, 0.0], atol=1e-12)
    p = np.array([0.5, 0.25, 0.25])
    assert_allclose(entropy(np.log(p)[None].astype(np.float32)), [1.5], rtol=1e-6)
    assert_array_equal(superimpose(np.uint8([[[[200]]]]), np.uint8([[[100]]])), [[[[255]]]])


def test_strip_of_a_classifier_that_never_wavers_is_minus_its_entropy(world):
    _, clean, labels, inspected = world
    model = Model(Fixed(lambda x: torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).repeat(len(x), 1)), KINDS)
    peer = make_peer("strip")
    peer.fit(model, clean, labels)
    assert_allclose(peer.score(model, inspected), -1.75, rtol=1e-6)


def test_scale_up_counts_the_factors_that_keep_the_label():
    # Bright (mean above 0.5) is class 1. Pixel 30 turns bright at 5 x; pixel 200 is bright throughout.
    model = Model(Fixed(lambda x: torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)), 2)
    images = np.stack([np.full((4, 4, 1), value, np.uint8) for value in (30, 200, 0)])
    inspected = Inspected(images, model.predict(images), np.zeros((3, 1, 1), np.float32))
    assert_array_equal(inspected.predicted, [0, 1, 0])
    assert_array_equal(make_peer("scaleup_free").score(model, inspected), measure_consistency(model, inspected))
    assert_allclose(measure_consistency(model, inspected), [0.2, 1.0, 1.0])
    assert_array_equal(multiply(np.uint8([30, 60]), 5), [150, 255])


def test_classes_with_few_rows_borrow_the_spread_of_all():
    clean, labels = np.array([0.0, 1, 2, 3, 4, 10]), np.array([0, 0, 0, 0, 0, 1])
    mean, deviation = standardise_by_class(clean, labels, 3)
    assert_allclose(mean, [2, 10, clean.mean()])
    assert_allclose(deviation, [np.sqrt(2), clean.std(), clean.std()])


def test_ibd_psc_amplifies_the_last_norms_of_a_copy(world):
    model, clean, _, _ = world
    names = order_norms(model, clean)
    assert names == [f"blocks.{i}.1" for i in range(4)]
    before = copy.deepcopy(model.network.state_dict())
    copied = amplify(model, names, 2).network.state_dict()
    for key, value in before.items():
        factor = 1.5 if key in ("blocks.2.1.weight", "blocks.2.1.bias", "blocks.3.1.weight", "blocks.3.1.bias") else 1
        assert torch.equal(copied[key], value * factor), key
        assert torch.equal(model.network.state_dict()[key], value), key


def test_ibd_psc_is_not_defined_without_batch_norm(world):
    _, clean, labels, _ = world
    with pytest.raises(OptionError, match="batch-norm"):
        make_peer("ibdpsc").fit(Model(Tiny(norm=False), KINDS), clean, labels)


def test_beatrix_finds_the_last_stage_and_its_gram_matrix(world):
    model, clean, _, _ = world
    maps, _ = model.activations(clean.images[:2])
    assert find_stage_input(maps) == 1  # blocks 2 and 3 are the last stage
    f = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    for power, grams in zip((1, 2, 3), compute_grams(model, f, range(1, 4)), strict=True):
        full = f[1].astype(float) ** power @ (f[1].astype(float) ** power).T
        want = (np.sign(full) * np.abs(full) ** (1 / power))[np.triu_indices(3)]
        assert_allclose(grams[1].numpy(), want, rtol=1e-3, atol=1e-5)


def test_beatrix_bands_are_ten_deviations_wide():
    grams = np.float32([[1], [2], [3], [4], [9], [50]])
    low, high = find_bands(grams, np.array([0, 0, 0, 0, 0, 1]), 3)
    assert_allclose((low[0, 0], high[0, 0]), (3 - 10, 3 + 10))
    spread = np.median(np.abs(grams - 3.5))
    assert_allclose((low[1, 0], high[2, 0]), (50 - 10 * spread, 3.5 + 10 * spread))


def test_lfba_weighs_the_layers_around_the_largest_rise():
    cosines = np.tile([0.1, 0.5, 0.55, 0.6, 0.9, 0.92], (4, 1))
    weights = weigh_layers(cosines, np.zeros(4, np.int64), 2)
    assert_allclose(weights, np.tile([0, 0, 0.05, 0.3, 0.02, 0], (2, 1)), atol=1e-12)  # the early rise of .4 does not count


def test_badexpert_flags_what_the_expert_knows_and_the_repaired_copy_does_not():
    x, y = np.array([0.9, 0.9, 0.01, 0.0]), np.array([0.05, 0.9, 0.9, 0.0])
    scores = judge(x, y)
    assert scores[0] == pytest.approx(-np.log(min(0.1 / 0.9, 0.1 / 0.45)))
    assert scores[0] > scores[1] > scores[2]
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("count", [2, 3, 64, 65, 200])
def test_training_batches_cover_all_rows_and_none_is_single(count):
    batches = list(shuffle(count, 64))
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert min(map(len, batches)) > 1 and max(map(len, batches)) <= 65
    assert move(torch.rand(2, 3, 16, 16)).shape == (2, 3, 16, 16)


def test_a_far_off_input_is_never_more_normal_than_the_clean_ones(world):
    """One intensity of shrinkage for each of RMD's two covariances made the second the smaller one, and scores fell."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, KINDS, 60)
    latents = np.zeros((60, 1, 30), np.float32)
    latents[:, 0, :4] = 20 * np.eye(4)[labels]
    latents += generator.standard_normal(latents.shape).astype(np.float32) * 0.9 ** np.arange(30)
    logits = (10 * np.eye(KINDS)[labels]).astype(np.float32)
    clean = replace(world[3], latents=latents, logits=logits)
    peer = make_peer("rmd")
    peer.fit(world[0], clean, labels)
    far = latents.copy()
    far[:30, 0] += 1e3 * np.eye(30, dtype=np.float32)
    scores = peer.score(world[0], replace(clean, latents=far))
    assert scores[:30].min() > scores[30:].max()


def test_ibdpsc_is_not_defined_where_amplifying_does_no_harm(world):
    steady = Tiny()
    torch.nn.init.zeros_(steady.head.weight)
    with torch.no_grad():
        steady.head.bias.copy_(torch.arange(KINDS, 0, -1))
    with pytest.raises(OptionError, match=r"with all 4 of this network 0% do"):
        make_peer("ibdpsc").fit(Model(steady.eval(), KINDS), world[1], np.zeros(240, np.int64))
