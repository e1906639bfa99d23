"""The server's response cache on the shared graph of a guarded model, on the real server."""

import time

import numpy as np
import pytest

import shapes
from diffense import names
from diffense.errors import ExportError
from diffense.serve import TritonServer
from diffense_export.repository import export_guard
from triton_calls import MAX_BATCH, ask, read_total

pytestmark = pytest.mark.server

FAMILIES = {"shared": "bls", "whole": "whole"}
HITS = "nv_cache_num_hits_per_model_total"  # the parser ends counters this way


@pytest.fixture(scope="module")
def repository(guard, small_target, clean_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "repository"
    for family, loop in FAMILIES.items():
        export_guard(
            guard, small_target, folder, family, placement="shared", loop=loop, cache=True, max_batch_size=MAX_BATCH,
            threads=1, clean=clean_images[:64],
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(repository, cache_mib=8) as running:
        yield running


def wait_for_hits(server, model, least):
    """The server counts hits in turns of its own."""
    end = time.monotonic() + 10
    while read_total(server, HITS, model=model) < least and time.monotonic() < end:
        time.sleep(0.05)
    return read_total(server, HITS, model=model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_seen_before_gets_the_same_answer_without_its_graph_and_is_counted_all_the_same(server, guard, family):
    image = guard.preprocessing.apply(shapes.draw_shapes(3, seed=5)[0])
    model = family + names.TAPPED_SUFFIX
    scored = read_total(server, "diffense_scored_total", model=family)
    hits = read_total(server, HITS, model=model)
    answers = [ask(server, "grpc", f"{family}_guarded", image) for _ in range(3)]
    for answer in answers[1:]:
        for name in ("logits", *names.VERDICT_TENSORS):
            assert np.array_equal(answer.as_numpy(name), answers[0].as_numpy(name))
    assert wait_for_hits(server, model, hits + 2) == hits + 2
    assert read_total(server, "diffense_scored_total", model=family) == scored + 9


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_is_another_input(server, guard, family):
    image = guard.preprocessing.apply(shapes.draw_shapes(2, seed=6)[0])
    model = family + names.TAPPED_SUFFIX
    ask(server, "grpc", f"{family}_guarded", image[:1])
    hits = read_total(server, HITS, model=model)
    changed = image[:1].copy()
    changed.flat[0] = np.nextafter(changed.flat[0], np.float32(2))
    for other in (image[1:], changed, image[:1].repeat(2, axis=0), image[:1]):
        ask(server, "grpc", f"{family}_guarded", other)
    assert wait_for_hits(server, model, hits + 1) == hits + 1  # the last one, by whose time the others are counted too


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_is_never_answered_from_the_cache(server, guard, family):
    image = guard.preprocessing.apply(shapes.draw_shapes(1, seed=8)[0])
    fronts = [family, family + names.GUARDED_SUFFIX, family + names.GATEWAY_SUFFIX]
    tapped = family + names.TAPPED_SUFFIX
    hits = read_total(server, HITS, model=tapped)
    for front in fronts * 2:
        ask(server, "grpc", front, image)
    assert wait_for_hits(server, tapped, hits + 3) == hits + 3  # the first to ask for latents is the ensemble
    models = ["", names.GUARD_SUFFIX, names.GUARDED_SUFFIX, names.GATEWAY_SUFFIX]
    assert [read_total(server, HITS, model=family + suffix) for suffix in models] == [0] * len(models)


def test_a_server_without_a_cache_answers_as_well(repository, guard):
    image = guard.preprocessing.apply(shapes.draw_shapes(1, seed=7)[0])
    with TritonServer(repository) as plain:
        answer = ask(plain, "http", "shared_guarded", image)
    assert answer.as_numpy(names.SCORE) == pytest.approx(guard.score(shapes.draw_shapes(1, seed=7)[0]).scores[0], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "needs the shared placement"), ({"placement": "shared", "loop": "direct"}, "cannot stand before the verdict")],
)
def test_what_could_give_a_wrong_verdict_is_never_cached(guard, small_target, tmp_path, options, words):
    with pytest.raises(ExportError, match=words):
        export_guard(guard, small_target, tmp_path / "r", "m", cache=True, **options)
    assert not (tmp_path / "r" / "m_guarded").exists()
