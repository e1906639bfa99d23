"""Attacks, networks and training of the bench on made-up images. No shared data needed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench_world import SPEC, make_split
from benchmarks import targets
from benchmarks.attacks import ATTACKS, htba, idba, issba, make_attack
from benchmarks.attacks.base import to_pixels, to_planes
from benchmarks.datasets import Images
from benchmarks.networks import NETWORKS
from benchmarks.networks.efficientnet import EfficientNetLite, read_weights
from benchmarks.training import FilterMuon, augment, choose_batch, make_optimizers, prepare_batch, train_target
from diffense.errors import OptionError
from shapes import draw_shapes

pytestmark = pytest.mark.usefixtures("float32")


@pytest.mark.parametrize("key", ATTACKS)
def test_triggers_are_8_bit_images_of_their_own_and_the_same_each_time(key):
    spec = replace(SPEC, side=32)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    before = images.copy()
    attack = make_attack(key, spec, 0)
    triggered = attack.trigger(images)
    assert triggered.dtype == np.uint8 and triggered.shape == images.shape and np.array_equal(images, before)
    assert np.array_equal(triggered, attack.trigger(images))
    assert np.array_equal(triggered, images) == (key == "none")


@pytest.mark.parametrize("key", [key for key in ATTACKS if ATTACKS[key].poisons and ATTACKS[key].source is None])
def test_poisoned_batches_have_a_tenth_of_target_labels(key):
    images, _ = draw_shapes(100, 0)
    labels = np.full(100, 2)
    batch = make_attack(key, SPEC, 0).poison(images, labels, np.random.default_rng(0))
    wrong = (batch.labels.numpy() != labels).sum()
    assert wrong == (0 if key == "none" else 10) and (labels == 2).all()
    assert batch.inputs.shape == (100, 3, 16, 16) and batch.inputs.min() >= 0 and batch.inputs.max() <= 1
    untouched = np.abs(batch.inputs.detach().numpy() - to_planes(images).numpy()).max(axis=(1, 2, 3)) == 0
    assert untouched[30:].all()
    eight_bit = batch.inputs.detach().numpy() * 255
    np.testing.assert_allclose(eight_bit, np.rint(eight_bit), atol=1e-3)


def test_a_source_specific_trigger_turns_half_of_its_class_and_covers_a_tenth_of_the_others():
    attack = make_attack("tact", SPEC, 0)
    images, labels = draw_shapes(100, 0)[0], np.array([attack.source, 2, 3, 0] * 25)
    batch = attack.poison(images, labels, np.random.default_rng(0))
    wrong = np.flatnonzero(batch.labels.numpy() != labels)
    assert len(wrong) == 12 and (labels[wrong] == attack.source).all() and (batch.labels.numpy()[wrong] == attack.target).all()
    changed = np.flatnonzero(np.abs(batch.inputs.numpy() - to_planes(images).numpy()).max(axis=(1, 2, 3)) > 0)
    assert set(wrong) <= set(changed) and len(changed) == 12 + round(0.1 * 75)
    assert attack.attacked(labels).tolist() == list(range(0, 100, 4))


def test_a_blended_image_is_four_fifths_itself():
    attack = make_attack("blend", SPEC, 0)
    images = draw_shapes(4, 0)[0]
    assert np.abs(attack.trigger(images) - (0.8 * images + 0.2 * attack.pattern)).max() <= 0.5
    assert not np.array_equal(attack.pattern, make_attack("blend", SPEC, 1).pattern)


def test_a_dynamic_trigger_is_bound_to_its_image_and_sparse(monkeypatch):
    monkeypatch.setattr(idba, "MASK_STEPS", 120)
    attack = make_attack("idba", SPEC, 0)
    train = make_split().train
    attack.prepare(train, lambda message: None)
    masks = attack.mask(to_planes(train.pixels[:64]))
    assert masks.mean() < 0.1
    assert masks.std(0).mean() > 0.2 * masks.mean()  # another image, another mask


def test_a_message_that_is_not_read_is_trained_again_from_other_weights_and_refused_in_the_end(monkeypatch):
    monkeypatch.setattr(issba, "STEPS", 2)
    attack = make_attack("issba", replace(SPEC, side=32), 0)
    train = Images(np.zeros((60, 32, 32, 3), np.uint8), np.zeros(60, np.int64))
    first, lines = attack.encoder.last.weight.detach().clone(), []
    with pytest.raises(OptionError, match="not read after 3 trainings"):
        attack.prepare(train, lines.append)
    assert sum("other first weights" in line for line in lines) == issba.ATTEMPTS - 1
    assert not torch.allclose(first, attack.encoder.last.weight, atol=0.02)
    monkeypatch.setattr(issba, "LEARNED", 0.0)
    attack.prepare(train, lines.append)
    assert sum("other first weights" in line for line in lines) == issba.ATTEMPTS - 1


def test_hidden_trigger_poisons_keep_their_label_and_budget():
    attack = make_attack("htba", SPEC, 1)
    network = NETWORKS["small_cnn"](3, 4, 16).eval()
    images, _ = draw_shapes(20, 0)
    poisons = attack.craft(network, images, attack.trigger(draw_shapes(20, 1)[0]), lambda message: None)
    moved = np.abs(poisons.astype(int) - images.astype(int)).max()
    assert 0 < moved <= 16
    assert attack.attacked(np.array([attack.source, attack.target, attack.source])).tolist() == [0, 2]


def test_hidden_trigger_poisons_leave_their_class_its_clean_images(monkeypatch):
    attack, network, train = make_attack("htba", SPEC, 0), NETWORKS["small_cnn"](3, 4, 16).eval(), make_split().train
    seen = {}
    monkeypatch.setattr(attack, "craft", lambda network, images, triggered, progress: np.zeros_like(images))
    monkeypatch.setattr(attack, "tune_head", lambda network, pixels, labels, rng: seen.update(pixels=pixels, labels=labels))
    attack.alter(network, train, lambda message: None)
    poisoned = ~seen["pixels"].any(axis=(1, 2, 3))
    held = (train.labels == attack.target).sum()
    assert poisoned.sum() == round(held / 3) and (seen["labels"][poisoned] == attack.target).all()
    assert (seen["labels"][~poisoned] == attack.target).sum() == held - poisoned.sum()


def test_a_hidden_triggers_last_layer_starts_anew_and_nothing_else_changes():
    attack, network, train = make_attack("htba", SPEC, 0), NETWORKS["small_cnn"](3, 4, 16).eval(), make_split().train
    body = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("head")}
    with torch.no_grad():
        network.head.weight.fill_(torch.nan)
    attack.tune_head(network, train.pixels, train.labels, np.random.default_rng(0))
    assert bool(torch.isfinite(network.head.weight).all())
    assert all(bool((network.state_dict()[name] == value).all()) for name, value in body.items())
    first, generator = network.head.weight.clone(), torch.random.get_rng_state()
    attack.tune_head(network, train.pixels, train.labels, np.random.default_rng(0))
    assert bool((network.head.weight == first).all()) and bool((torch.random.get_rng_state() == generator).all())


def test_greedy_pairs_take_each_once_and_the_nearest_first():
    distances = torch.tensor([[1.0, 0.5, 9.0], [0.2, 0.1, 9.0], [3.0, 4.0, 5.0]])
    assert htba.pair_greedily(distances).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 64)])
def test_networks_give_their_logits_and_block_ends(name, channels, side):
    network = NETWORKS[name](channels, 7, side)
    images = torch.rand(40, channels, side, side)
    with torch.no_grad():
        network.prepare(images)
        network.eval()
        ends, logits = network.activations(images)
        assert torch.equal(network(images), logits) and logits.shape == (40, 7)
        assert 6 <= len(ends) <= 9 and ends[-1].shape == (40, network.head.in_features)
        torch.testing.assert_close(network.head(ends[-1]), logits)


def test_a_pretrained_network_starts_from_the_stored_weights_and_keeps_its_new_head():
    network = EfficientNetLite(3, 7, 64)
    head = network.head.weight.detach().clone()
    network.prepare(torch.zeros(1, 3, 64, 64))
    stored = read_weights()
    assert torch.equal(network.stem.conv.weight, stored["_conv_stem.weight"])
    assert torch.equal(network.stages[-1][0].units[-1].norm.running_var, stored["_blocks.15._bn2.running_var"])
    assert torch.equal(network.last.conv.weight, stored["_conv_head.weight"]) and torch.equal(network.head.weight, head)
    assert isinstance(make_optimizers(network, 32)[0], torch.optim.AdamW)


def test_a_plain_network_is_trained_by_sgd_alone_on_small_batches():
    network = NETWORKS["narrow_resnet18"](3, 7, 32)
    (sgd,) = make_optimizers(network, 128)
    assert isinstance(sgd, torch.optim.SGD) and choose_batch(network, 50000) == 128
    assert sum(p.numel() for group in sgd.param_groups for p in group["params"]) == sum(p.numel() for p in network.parameters())
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()) == 20


def test_filters_keep_their_length_and_turn_by_the_rate():
    conv = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    muon = FilterMuon([conv.weight], 0.1)
    conv(torch.ones(1, 4, 5, 5)).square().sum().backward()
    before = conv.weight.detach().clone()
    muon.step()
    before *= 8**0.5 / before.norm()  # 8 filters of mean square length 1
    turned = (conv.weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(turned)
    # An orthogonal step of the rate; Newton and Schulz's iteration leaves the singular values between .7 and 1.2 of it.
    assert 0.06 < values.max() < 0.13


def test_the_adaptive_attack_pulls_triggered_features_to_the_target_class():
    attack = make_attack("wanet_adaptive", replace(SPEC, side=32), 0)
    labels = torch.cat([torch.zeros(4), torch.arange(36) % 4]).long()
    clean = torch.randn(40, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    near, far = clean.clone(), clean.clone()
    near[:4] = clean[4::4].mean((0, 2, 3))[None, :, None, None]
    far[:4] = 5.0
    assert attack.penalise([near], labels) < 0.1 * attack.penalise([far], labels)
    assert attack.penalise([far.requires_grad_()], labels).requires_grad


def test_dynamic_triggers_are_made_from_the_augmented_image():
    spec = replace(SPEC, side=32)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    attack = make_attack("idba", spec, 0)
    attack.painter.eval(), attack.masker.eval()
    with torch.no_grad():
        inputs, _ = prepare_batch(spec, attack, images, np.zeros(20, np.int64), np.random.default_rng(1))
    plain = make_attack("none", spec, 0)
    seen, _ = prepare_batch(spec, plain, images, np.zeros(20, np.int64), np.random.default_rng(1))
    assert torch.equal(inputs[4:], seen[4:])  # the same augmentation, and no trigger beyond own and crossed tenths
    assert np.array_equal(to_pixels(inputs[:2]), attack.trigger(to_pixels(seen[:2])))


def test_augmentation_moves_by_whole_pixels():
    planes = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    moved = augment(planes, 2, False, np.random.default_rng(0))
    inner = moved[:, 0, 3, 3] - 27.0
    assert set(inner.tolist()) <= {8.0 * y + x for y in range(-2, 3) for x in range(-2, 3)}
    assert len(set(inner.tolist())) > 10
    mirrored = augment(planes, 0, True, np.random.default_rng(0))
    assert {tuple(row.tolist()) for row in mirrored[:, 0, 0]} == {tuple(range(8)), tuple(range(7, -1, -1))}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key", ATTACKS)
def test_targets_are_trained_on_a_gpu_and_come_back(key, bench):
    target = targets.get_target(targets.make_cell("mnist", key), lambda message: None)
    assert target.accuracy > 0.8 and target.attack.device.type == "cpu"
    assert target.asr > 0.9 or key != "badnets"


def test_an_attack_may_stretch_the_training(monkeypatch):
    monkeypatch.setattr(ATTACKS["badnets"], "stretch", 1.5)
    lines: list[str] = []
    spec = replace(SPEC, epochs=2)
    train_target(spec, "small_cnn", make_attack("badnets", spec, 0), make_split().train, 0, lines.append)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert ATTACKS["idba"].stretch == 2.5


def test_a_network_may_stretch_it_too(monkeypatch):
    monkeypatch.setattr(NETWORKS["convnext"], "stretch", 2.0)
    lines: list[str] = []
    train_target(replace(SPEC, epochs=1), "convnext", make_attack("none", SPEC, 0), make_split().train, 0, lines.append)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
