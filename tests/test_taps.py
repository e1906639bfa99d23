from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_models as models
from diffense.errors import TargetError
from diffense.fit import default_preprocessing
from diffense.tapping import open_pooling
from diffense.taps import FEWEST_TAPS, MOST_TAPS, Tap, choose_taps
from diffense.target import Target, open_session, run_batched

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SMALL: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": models.plain_cnn,
    "plain_opset11": lambda: models.plain_cnn(11),
    "fixed_batch": lambda: models.plain_cnn(batch=4),
    "resnet": models.preact_resnet,
    "deep_resnet": lambda: models.preact_resnet(blocks=12),
    "vit": models.vit,
    "vit_decomposed_norm": lambda: models.vit(13),
    "vit_sequence_first": models.vit_sequence_first,
    "convnext": models.convnext,
    "convnext_channels_last": lambda: models.convnext(13, channels_last=True),
    "densenet": models.densenet,
    "two_towers": models.two_towers,
    "mixer": models.patchify_mixer,
    "silu": models.silu_cnn,
}


def target_of(model: onnx.ModelProto, folder: Path) -> Target:
    return Target.open(models.save(model, folder / "target.onnx"))


def images_for(target: Target, rows: int) -> np.ndarray:
    return np.random.default_rng(1).random((rows, *(side or 0 for side in target.input.shape[1:])), np.float32)


@pytest.mark.parametrize("name", SMALL)
def test_six_to_ten_taps_of_growing_depth_whose_shapes_are_those_of_a_run(name: str, tmp_path: Path) -> None:
    target = target_of(SMALL[name](), tmp_path)
    taps = target.choose_taps()
    assert 6 <= len(taps) <= 10
    assert [tap.depth for tap in taps] == sorted(tap.depth for tap in taps)
    assert 0 < taps[0].depth < taps[-1].depth < 1
    names = [tap.name for tap in taps]
    whole = target.with_outputs(names)
    cut = target.truncate(names)
    images = images_for(target, 4)
    full = open_session(whole, optimize=False).run([target.logits, *names], {"image": images})
    short = open_session(cut, optimize=False).run(None, {"image": images})
    for tap, before, after in zip(taps, full[1:], short, strict=True):
        assert before.shape == (*tap.shape[: tap.batch_axis], 4, *tap.shape[tap.batch_axis :])
        assert np.array_equal(before, after)
    (logits,) = run_batched(open_session(target.path, optimize=False), images, None, target.batch)
    assert np.array_equal(full[0], logits)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"densenet", "two_towers"}))
def test_tapping_does_not_move_the_logits_of_the_optimised_graph(name: str, tmp_path: Path) -> None:
    target = target_of(SMALL[name](), tmp_path)
    images = images_for(target, 4)
    whole = target.with_outputs([tap.name for tap in target.choose_taps()])
    (tapped,) = run_batched(open_session(whole, threads=1), images, [target.logits], target.batch)
    (alone,) = run_batched(open_session(target.path, threads=1), images, [target.logits], target.batch)
    np.testing.assert_allclose(tapped, alone, rtol=0, atol=1e-5)
    assert np.array_equal(tapped.argmax(axis=1), alone.argmax(axis=1))


@pytest.mark.parametrize("name", SMALL)
def test_last_tap_is_what_the_head_reads(name: str, tmp_path: Path) -> None:
    model = SMALL[name]()
    target = target_of(model, tmp_path)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    assert target.list_taps()[-1].name == target.choose_taps()[-1].name == gemm.input[0]


def test_only_the_end_of_convolution_normalisation_activation_is_listed(tmp_path: Path) -> None:
    taps = target_of(models.plain_cnn(), tmp_path).list_taps()
    assert [tap.name for tap in taps[:-1]] == [f"stage{s}_{i}" for s in range(3) for i in range(2)]
    assert taps[-1].kind == "vector"


def test_gated_activations_are_not_cut_in_two(tmp_path: Path) -> None:
    taps = target_of(models.silu_cnn(), tmp_path).list_taps()
    assert [tap.name for tap in taps] == [*(f"active{i}" for i in range(6)), "pooled"]


def test_stage_ends_of_a_deep_residual_net_are_taken(tmp_path: Path) -> None:
    target = target_of(models.preact_resnet(blocks=12), tmp_path)
    taps = target.choose_taps()
    assert len(target.list_taps()) > 30
    assert len(taps) == 9  # its last stage alone is a third of the depth
    listed = target.list_taps()
    ends = {tap.name for tap, after in pairwise(listed) if tap.positions != after.positions}
    assert len(ends) == 3
    assert ends <= {tap.name for tap in taps}
    assert "last_map" in ends
    assert max(after.depth - tap.depth for tap, after in pairwise(taps)) < 0.3


@pytest.mark.parametrize("opset", [13, 17])
def test_transformer_taps_are_tokens_at_the_ends_of_blocks(opset: int, tmp_path: Path) -> None:
    target = target_of(models.vit(opset), tmp_path)
    listed = {tap.name: tap for tap in target.list_taps()}
    expected = {"embedded", *(f"attended{i}" for i in range(4)), *(f"block{i}" for i in range(3))}
    assert expected <= set(listed)
    assert all(listed[name].kind == "tokens" and listed[name].shape == (17, 16) for name in expected)
    normed, class_token = target.list_taps()[-2:]
    assert (class_token.name, class_token.kind, class_token.shape) == ("class_token", "vector", (16,))
    assert (normed.kind, normed.shape) == ("tokens", (17, 16))
    assert sum(tap.kind == "tokens" for tap in target.choose_taps()) >= 5


def test_tokens_of_a_sequence_first_transformer_are_those_of_the_same_one_with_the_batch_first(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (11, 16, 16, 3), np.uint8)
    taps, pooled = [], []
    for name in ("vit", "vit_sequence_first"):
        target = Target.open(models.save(SMALL[name](), tmp_path / f"{name}.onnx"))
        taps.append(target.choose_taps())
        pooled.append(open_pooling(target, taps[-1], default_preprocessing(target))(images))
    assert [(tap.kind, tap.shape) for tap in taps[0]] == [(tap.kind, tap.shape) for tap in taps[1]]
    assert [tap.batch_axis for tap in taps[1]] == [int(tap.kind == "tokens") for tap in taps[1]]
    assert sum(tap.batch_axis for tap in taps[1]) >= 5
    (logits, features), (other_logits, other_features) = pooled
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=1e-4)
    for feature, other in zip(features, other_features, strict=True):
        np.testing.assert_allclose(feature, other, rtol=0, atol=1e-4)


def test_maps_with_channels_last_are_told_from_maps_with_channels_second(tmp_path: Path) -> None:
    first = target_of(models.convnext(), tmp_path).list_taps()
    last = target_of(models.convnext(channels_last=True), tmp_path).list_taps()
    shapes_first = {tap.name: (tap.kind, tap.shape) for tap in first}
    shapes_last = {tap.name: (tap.kind, tap.shape) for tap in last}
    for stage, (width, side) in enumerate(((8, 8), (16, 4), (32, 2))):
        for step in range(2):
            assert shapes_first[f"block{stage}_{step}"] == ("map", (width, side, side))
            assert shapes_last[f"block{stage}_{step}"] == ("map_nhwc", (side, side, width))


def test_parallel_towers_give_the_ends_of_their_blocks(tmp_path: Path) -> None:
    names = [tap.name for tap in target_of(models.two_towers(), tmp_path).list_taps()]
    assert set(names) == {f"tower{t}_{i}" for t in range(2) for i in range(4)} | {"joined"}
    assert names[-1] == "joined"


def test_a_small_net_gives_what_there_is(tmp_path: Path) -> None:
    assert [tap.shape for tap in target_of(models.two_layers(), tmp_path).choose_taps()] == [(8, 6, 6), (8,)]


def test_a_linear_classifier_has_nothing_to_tap(tmp_path: Path) -> None:
    b = models.Builder()
    b.head(b.node("Flatten", "image"), 48)
    target = target_of(b.model(("N", 3, 4, 4), models.scores()), tmp_path)
    with pytest.raises(TargetError, match=r"has 0 tensors .* needs 2"):
        target.choose_taps()


def test_named_taps_come_in_order_of_depth(tmp_path: Path) -> None:
    target = target_of(models.vit(), tmp_path)
    taps = target.choose_taps(["block2", "attended0"])
    assert [(tap.name, tap.kind) for tap in taps] == [("attended0", "tokens"), ("block2", "tokens")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blok1", "block2"], r"'blok1' is no tensor .*block1"),
        (["logits"], "'logits' is no tensor between"),
        (["image"], "'image' is no tensor between"),
        (["block1", "block1"], "once"),
        ([], "at least one"),
    ],
)
def test_wrong_names_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        target_of(models.vit(), tmp_path).choose_taps(names)


def test_tensors_read_inside_a_branch_count_as_paths(tmp_path: Path) -> None:
    taps = target_of(models.branching(), tmp_path).list_taps()
    assert [tap.name for tap in taps] == ["shallow", "branched", "last", "pooled"]


def test_nodes_in_any_order_give_the_same_taps(tmp_path: Path) -> None:
    model = models.vit()
    expected = target_of(model, tmp_path).list_taps()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    assert target_of(model, tmp_path).list_taps() == expected


def test_tensors_that_fold_tokens_into_the_batch_are_no_taps(tmp_path: Path) -> None:
    target = target_of(models.folded_tokens(), tmp_path)
    assert [tap.shape for tap in target.list_taps()] == [(8, 4, 4), (16, 8), (16, 8), (8,)]
    with pytest.raises(TargetError, match=r"'folded' has shape \(80, 8\)"):
        target.choose_taps(["folded"])


def test_half_precision_inside_is_tapped_as_it_is(tmp_path: Path) -> None:
    taps = target_of(models.half_precision(), tmp_path).list_taps()
    assert [(tap.shape, tap.dtype) for tap in taps] == [((8, 8, 8), "float16"), ((8, 4, 4), "float16"), ((8,), "float16")]


def test_attention_weights_are_no_tap(tmp_path: Path) -> None:
    model = models.vit()
    weights = next(node.output[0] for node in model.graph.node if node.op_type == "Softmax")
    with pytest.raises(TargetError, match=r"has shape \(5, 2, 17, 17\) and type float32"):
        target_of(model, tmp_path).choose_taps([weights])


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_the_light_models_of_the_onnx_package(path: Path) -> None:
    target = Target.open(path)
    assert (target.classes, target.opset, target.batch, target.size) == (1000, 9, 1, (224, 224))
    listed, taps = target.list_taps(), target.choose_taps()
    depths = [tap.depth for tap in taps]
    assert 6 <= len(taps) <= 10
    assert all(shallow < deep for shallow, deep in pairwise(depths))
    assert taps[-1] == listed[-1]
    sides = [tap.positions for tap in taps]
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) >= 4
    graph = onnx.load(path).graph
    maker = {output: node for node in graph.node for output in node.output}
    node = maker[target.logits]
    while node.op_type in {"Softmax", "GlobalAveragePool", "Relu"}:
        node = maker[node.input[0]]
    head = node.input[0]
    while head != taps[-1].name:
        assert maker[head].op_type in {"Reshape", "Dropout"}
        head = maker[head].input[0]


@given(
    depths=st.lists(st.floats(0.01, 0.99), min_size=FEWEST_TAPS, max_size=60, unique=True).map(sorted),
    sides=st.lists(st.integers(1, 60), min_size=60, max_size=60),
)
def test_choice_is_ordered_bounded_and_ends_with_the_last(depths: list[float], sides: list[int]) -> None:
    sizes = sorted(sides, reverse=True)
    candidates = [Tap(f"t{i}", "map", (4, sizes[i], sizes[i]), depth) for i, depth in enumerate(depths)]
    chosen = choose_taps(candidates)
    assert min(6, len(candidates)) <= len(chosen) <= MOST_TAPS
    assert [tap for tap in candidates if tap in chosen] == chosen
    assert chosen[-1] == candidates[-1]
    assert choose_taps(candidates) == chosen


def lay_out(*stages: tuple[int, list[float]]) -> list[Tap]:
    """A candidate a depth: (side of the maps, depths) of each stage."""
    return [Tap(f"t{depth}", "map", (8, side, side), depth) for side, depths in stages for depth in depths]


def test_a_wide_gap_in_the_last_third_is_divided_evenly() -> None:
    # An EfficientNet: the ends of its stages leave the blocks of the last two without a tap.
    late = [0.72, 0.79, 0.85, 0.91, 0.95, 0.97]
    candidates = lay_out(
        (96, [0.02]), (48, [0.05, 0.1]), (24, [0.15, 0.21]), (12, [0.25, 0.33]), (6, [0.4, 0.51, 0.69]), (3, [*late, 0.98]),
        (1, [0.99]),
    )  # fmt: skip
    assert [tap.depth for tap in choose_taps(candidates)] == [0.02, 0.1, 0.21, 0.33, 0.51, 0.69, 0.79, 0.91, 0.98, 0.99]


def test_an_early_gap_of_the_same_width_stays_and_so_does_one_without_candidates() -> None:
    early = lay_out(
        (96, [0.02]), (48, [0.1]), (24, [0.2, 0.3, 0.4, 0.5]), (12, [0.7]), (6, [0.8]), (3, [0.9]), (1, [0.95, 0.99])
    )
    depths = [tap.depth for tap in choose_taps(early)]
    assert len(depths) == 8
    bare = lay_out((96, [0.02]), (48, [0.1]), (24, [0.2, 0.25, 0.3, 0.35]), (12, [0.45]), (6, [0.5]), (3, [0.7]), (1, [0.99]))
    assert [tap.depth for tap in choose_taps(bare)][-2:] == [0.7, 0.99] and len(choose_taps(bare)) == 8
