import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.peers import Inspected, make_peer
from benchmarks.peers.discriminant import Discriminants
from benchmarks.peers.gaussian import join_taps
from benchmarks.peers.knn import normalise
from benchmarks.peers.latent_all import list_families
from benchmarks.peers.ranks import Bank as LatentBank
from benchmarks.peers.ranks import rank
from benchmarks.peers.tedpp import TedPlusPlus
from benchmarks.peers.trajectories import Bank, PcaOutliers, choose_rows, is_layer, read_layers
from latent_sets import draw_rows
from peer_world import LATENT_PEERS, TAPS, WIDTH, fit, make_world
from shapes import KINDS, SIDE


@pytest.fixture(scope="module")
def world():
    return make_world()


def test_ranks_on_four_points():
    bank = LatentBank(np.array([0.0, 1, 3, 7])[:, None, None], np.array([0, 1, 0, 1]))
    got = rank(bank, np.array([0.9, 0.9, 6.0, 0.0])[:, None, None], np.array([1, 0, 0, 2]))
    assert_array_equal(got[:, 0], [0, 1, 1, 3])  # the last label has no row: the last rank
    assert_array_equal(rank(bank, bank.latents, bank.labels, np.arange(4))[:, 0], [1, 2, 1, 1])


def test_a_copy_does_not_vouch_for_its_original():
    bank = LatentBank(np.array([0.0, 1, 3, 7, 0.1])[:, None, None], np.array([0, 1, 0, 1, 0]))
    source = np.array([0, 1, 2, 3, 0])
    assert_array_equal(rank(bank, bank.latents, bank.labels, np.arange(5))[:, 0], [0, 3, 1, 1, 0])
    assert_array_equal(rank(bank, bank.latents, bank.labels, source)[:, 0], [1, 3, 1, 1, 1])


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_row_that_is_there_twice_is_judged_without_its_twin(world, kind):
    """Its clean evidence would make it look far too normal."""
    _, clean, _, _ = world
    latents, logits, width, rows = join_taps(clean), clean.logits.astype(np.float64), clean.latents.shape[2], np.arange(240)
    once = list_families()[kind].fit(latents, logits, width, rows).mean()
    twice, both = np.concatenate([latents] * 2), np.concatenate([logits] * 2)
    told = list_families()[kind].fit(twice, both, width, np.tile(rows, 2)).mean()
    untold = list_families()[kind].fit(twice, both, width, np.arange(480)).mean()
    assert untold < once and abs(told - once) < 0.5 * (once - untold)


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


def test_ted_follows_every_convolution_rectifier_and_linear_layer_in_their_order(world):
    model, clean, _, _ = world
    before = model.forwards
    layers = read_layers(model, clean, np.array([5, 2, 7]))
    assert model.forwards - before == 3 and not any(module._forward_hooks for module in model.network.modules())
    assert len(layers) == 2 * len(model.network.blocks) + 1
    ends, _ = model.activations(clean.images[[5, 2, 7]])
    for layer, end in zip(layers[1:-1:2], ends, strict=False):  # each block ends in its rectifier
        assert_allclose(layer, end.reshape(3, -1), rtol=1e-5, atol=1e-6)
    assert_allclose(layers[-1], clean.logits[[5, 2, 7]], rtol=1e-4, atol=1e-5)
    assert not is_layer(torch.nn.Conv2d(3, 3, 1)) and is_layer(torch.nn.Conv2d(3, 3, 3))


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
