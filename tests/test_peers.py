import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from benchmarks.peers import PEERS, Inspected, Model, known_peers, make_peer
from benchmarks.peers.badexpert import judge, move, shuffle
from benchmarks.peers.base import split, standardise_by_class
from benchmarks.peers.beatrix import compute_grams, find_bands, find_stage_input
from benchmarks.peers.corruptions import CORRUPTIONS
from benchmarks.peers.discriminant import Discriminants
from benchmarks.peers.ibdpsc import amplify, order_norms
from benchmarks.peers.knn import normalise
from benchmarks.peers.lfba import weigh_layers
from benchmarks.peers.ranks import Bank as LatentBank
from benchmarks.peers.ranks import rank
from benchmarks.peers.scaleup import measure_consistency, multiply
from benchmarks.peers.strip import entropy, superimpose
from benchmarks.peers.tedpp import TedPlusPlus
from benchmarks.peers.trajectories import Bank, PcaOutliers, choose_rows
from diffense.errors import OptionError
from latent_sets import draw_rows
from shapes import KINDS, SIDE, draw_shapes

TAPS, WIDTH = 3, 8
LATENT_PEERS = ("knn", "mahalanobis", "rmd", "probe", "meandist", "ratio", "lda", "ranks", "latent_all")


class Tiny(nn.Module):
    """Two stages of two convolutions with batch norm; the head is fitted in closed form."""

    def __init__(self, norm=True):
        super().__init__()
        shapes = ((3, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b) if norm else nn.Identity(), nn.ReLU())
            for a, b, s in shapes
        )
        self.head = nn.Linear(16, KINDS)

    def activations(self, x):
        ends = []
        for block in self.blocks:
            x = block(x)
            ends.append(x)
        ends.append(x.mean((2, 3)))
        return ends, self.head(ends[-1])

    def forward(self, x):
        return self.activations(x)[1]


class Fixed(nn.Module):
    """Logits straight from a function of the pixels."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.function(x)


def pool(model, images):
    ends, logits = model.activations(images)
    rows = [end.mean((2, 3)) if end.ndim == 4 else end for end in ends]
    latents = np.zeros((len(images), TAPS, WIDTH), np.float32)
    for tap, (row, kept) in enumerate(zip((rows[0], rows[2], rows[4]), (6, WIDTH, WIDTH), strict=True)):
        latents[:, tap, :kept] = row[:, :kept]
    return latents, logits


@pytest.fixture(scope="module")
def world():
    """Model, clean images with labels, other images to inspect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Tiny()
    images, kinds = draw_shapes(480, seed=1)
    images //= 3  # dark enough that SCALE-UP does not saturate them all
    model = Model(network, KINDS)
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(model.load(images[:160]))
    network.eval()
    features = np.concatenate([model.activations(images[part])[0][-1] for part in split(480)]).astype(np.float64)
    centre = features.mean(axis=0)
    design = features - centre
    weight = np.linalg.solve(design.T @ design + 1e-4 * np.eye(16), design.T @ (np.eye(KINDS)[kinds] - 0.25)).T * 8
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(weight).float())
        network.head.bias.copy_(torch.from_numpy(-weight @ centre).float())
    latents, logits = pool(model, images)
    scale = latents[:240].std(axis=0)
    latents = ((latents - latents[:240].mean(axis=0)) / np.where(scale > 0, scale, 1)).astype(np.float32)
    everything = Inspected(images, logits, latents)
    assert (everything.predicted == kinds).mean() > 0.6
    assert np.unique(everything.predicted[:240]).size == KINDS
    model.forwards = 0.0
    return model, take(everything, np.arange(240)), kinds[:240], take(everything, np.arange(240, 264))


def take(inspected, rows):
    return Inspected(inspected.images[rows], inspected.logits[rows], inspected.latents[rows])


def fit(name, world):
    model, clean, labels, _ = world
    peer = make_peer(name)
    peer.fit(model, clean, labels)
    return peer


@pytest.mark.parametrize("name", known_peers())
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


@pytest.mark.parametrize("name", known_peers())
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


def test_ranks_on_four_points():
    bank = LatentBank(np.array([0.0, 1, 3, 7])[:, None, None], np.array([0, 1, 0, 1]))
    got = rank(bank, np.array([0.9, 0.9, 6.0, 0.0])[:, None, None], np.array([1, 0, 0, 2]))
    assert_array_equal(got[:, 0], [0, 1, 1, 3])  # the last label has no row: the last rank
    assert_array_equal(rank(bank, bank.latents, bank.labels, itself=True)[:, 0], [1, 2, 1, 1])


def make_bank(positions, labels):
    """A TED bank of one layer and one dimension."""
    bank = object.__new__(Bank)
    rows = torch.tensor(positions)[:, None]
    bank.layers, bank.lengths, bank.labels = [rows], [torch.sum(rows**2, dim=1)], np.array(labels)
    bank.centres, bank.radii = [torch.zeros(1)], np.full((1, len(labels)), np.inf)
    return bank


def test_ted_ranks_and_the_tube_of_ted_plus_plus():
    bank = make_bank([0.0, 1.0, 3.0, 7.0], [0, 1, 0, 1])
    distance = bank.measure(0, torch.tensor([[0.9], [0.9], [6.0]]))
    assert_allclose(distance[2], [6, 5, 3, 1], rtol=1e-5)
    assert_array_equal(bank.rank(0, distance, np.array([1, 0, 0])), [0, 1, 1])
    assert_array_equal(bank.follow_itself()[:, 0], [1, 2, 1, 1])
    tube = make_bank([0.0, 1.0, 2.0, 3.0, 50.0], [0, 0, 0, 0, 1])
    TedPlusPlus().restrict(tube)
    assert_allclose(tube.radii[0], [2, 1, 1, 2, 1.5])  # second nearest of its class; one alone: the median
    inside = tube.rank(0, tube.measure(0, torch.tensor([[4.5], [5.5], [50.5], [60.0]])), np.array([0, 0, 1, 1]))
    assert_array_equal(inside, [0, 4, 0, 4])


def test_ted_banks_are_rightly_classified_and_bounded():
    predicted, labels = np.array([0] * 700 + [1] * 3), np.array([0] * 600 + [1] * 103)
    rows = choose_rows(predicted, labels, 2)
    assert_array_equal(rows, [*range(500), 700, 701, 702])


def test_pca_outliers_are_pyods():
    rng = np.random.default_rng(0)
    clean, rows = rng.normal(size=(200, 4)) * [1, 5, 2, 0.1] + 3, rng.normal(size=(6, 4)) * 4
    got = PcaOutliers(clean).score(rows)
    z = (clean - clean.mean(axis=0)) / clean.std(axis=0)
    pca = PCA(n_components=2).fit(z)
    x = (rows - clean.mean(axis=0)) / clean.std(axis=0)
    away = np.linalg.norm(x[:, None] - pca.components_, axis=2)  # scikit-learn turns signs alike
    assert_allclose(got, (away / pca.explained_variance_ratio_).sum(axis=1), rtol=1e-8)
    assert np.isfinite(PcaOutliers(np.zeros((5, 3))).score(np.ones((2, 3)))).all()


def test_mahalanobis_is_scikit_learns(world):
    model, *_ = world
    z, logits = draw_rows(200, KINDS, TAPS, WIDTH, seed=1)
    peer = make_peer("mahalanobis")
    latents = z.reshape(-1, TAPS, WIDTH).astype(np.float32)
    clean = Inspected(np.zeros((200, 1, 1, 3), np.uint8), logits.astype(np.float32), latents)
    peer.fit(model, clean, clean.predicted)
    z = latents.reshape(200, -1).astype(np.float64)
    means = np.array([z[clean.predicted == c].mean(axis=0) for c in range(KINDS)])
    residual = z - means[clean.predicted]
    inverse = np.linalg.inv(ledoit_wolf(residual, assume_centered=True)[0])
    assert_allclose(peer.score(model, clean), np.einsum("ni,ij,nj->n", residual, inverse, residual), rtol=1e-6)


def test_knn_is_brute_force(world):
    model, clean, _, inspected = world
    peer = fit("knn", world)
    assert peer.k == 240 // (2 * KINDS)
    bank, rows = (normalise(i.latents.reshape(len(i.latents), -1).astype(np.float64)) for i in (clean, inspected))
    want = NearestNeighbors(n_neighbors=peer.k, algorithm="brute").fit(bank).kneighbors(rows)[0][:, -1]
    assert_allclose(peer.score(model, inspected), want, rtol=1e-6)


def test_posteriors_are_scikit_learns():
    z, logits = draw_rows(20000, 5, 1, 4, seed=2)
    z = z * [1, 2, 4, 8]  # far from a ball, so that hardly anything is shrunk
    labels = logits.argmax(axis=1)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(z, labels)
    got = Discriminants(z, logits, 4).surprise(z[:50], labels[:50])
    want = -lda.predict_log_proba(z[:50])[np.arange(50), labels[:50]]
    assert_allclose(got[:, 0], want, rtol=0.02, atol=1e-3)  # shrunk by a little


def test_msp_orders_by_confidence_without_ties(world):
    logits = np.float32([[0, 0, 0, 0], [2, 0, 0, 0], [60, 0, 0, 0], [61, 0, 0, 0]])
    inspected = Inspected(np.zeros((4, 1, 1, 3), np.uint8), logits, np.zeros((4, 1, 1), np.float32))
    scores = make_peer("msp").score(world[0], inspected)
    assert_allclose(scores[:2], np.log([0.75, 3 / (3 + np.exp(2))]))
    assert (np.diff(scores) < 0).all()


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


@pytest.mark.parametrize("name", LATENT_PEERS)
def test_latents_of_another_class_or_off_the_cloud_stand_out(name, world):
    """Triggered: the shallow taps are another class's, the last is the target's, moved where clean latents seldom are."""
    model, *_ = world
    z, logits = draw_rows(700, KINDS, 4, 16, seed=4)
    fresh, fresh_logits = draw_rows(400, KINDS, 4, 16, seed=5)
    triggered, target = fresh[200:].copy(), np.zeros(200, int)
    other = fresh_logits[200:].argmax(axis=1) != 0
    triggered[:, 48:] = z[logits.argmax(axis=1) == 0][:200, 48:][np.arange(200) % 175]
    triggered[:, 48:52] += 6.0
    triggered, target = triggered[other], 6.0 * np.eye(KINDS)[target[other]]

    def see(rows, scores):
        images = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
        return Inspected(images, scores.astype(np.float32), rows.reshape(-1, 4, 16).astype(np.float32))

    peer = make_peer(name)
    clean = see(z, logits)
    peer.fit(model, clean, clean.predicted)
    scores = peer.score(model, see(np.concatenate([fresh[:200], triggered]), np.concatenate([fresh_logits[:200], target])))
    assert roc_auc_score(np.arange(len(scores)) >= 200, scores) > 0.9
