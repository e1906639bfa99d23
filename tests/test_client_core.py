import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffense_client
from client_repository import CLASSES, GUARD_ID, make_pixels
from diffense import names
from diffense.errors import (
    BadInputError,
    ModelNotReadyError,
    ServerError,
)
from diffense.images import Preprocessing
from diffense_client._core import (
    Answer,
    Request,
    choose_outputs,
    decode_answer,
    join_parts,
    plan_pixels,
    plan_tensor,
    split_list,
)
from diffense_client._model import OPEN_BATCH, ServedModel, read_config

PREPROCESSING = Preprocessing(size=(8, 8), channels=3, layout="NCHW", dtype="float32")
SERVED = ServedModel(
    name="digits_guarded",
    input_name="image",
    datatype="FP32",
    dtype=np.dtype(np.float32),
    shape=(3, 8, 8),
    max_batch_size=8,
    fixed_batch=False,
    outputs=("logits", "extra"),
    logits="logits",
    guard_id=GUARD_ID,
    preprocessing=PREPROCESSING,
    alpha=0.01,
)


def make_config(**changes: Any) -> dict[str, Any]:
    parameters = {
        names.GUARD_ID_PARAMETER: GUARD_ID,
        names.LOGITS_PARAMETER: "logits",
        names.ALPHA_PARAMETER: "0.05",
        names.PREPROCESSING_PARAMETER: PREPROCESSING.model_dump_json(),
    }
    outputs = ["logits", *names.VERDICT_TENSORS, "extra"]
    config = {
        "max_batch_size": 8,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": ["3", "8", "8"]}],
        "output": [{"name": name} for name in outputs],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }
    return config | changes


def answer(request: Request) -> Answer:
    """What a server says that scores images by their mean."""
    score = request.tensor.reshape(len(request.tensor), -1).mean(axis=1, dtype=np.float64).astype(np.float32)
    arrays: dict[str, Any] = {
        "logits": np.repeat(score[:, None], CLASSES, axis=1),
        "extra": request.tensor,
        names.SCORE: score[:, None],
        names.P_VALUE: 1 - score[:, None],
        names.FLAGGED: (score[:, None] > 0.5).astype(np.uint8),
    }
    return Answer(request.request_id, {name: arrays[name] for name in request.outputs})


def test_public_names_are_the_exported_ones() -> None:
    public = [name for name in vars(diffense_client) if not name.startswith("_") and name not in ("logging", "scan")]
    assert sorted(public) == diffense_client.__all__


def test_config_is_read_in_either_protocols_form() -> None:
    served = read_config("digits_guarded", make_config())
    assert served == replace(SERVED, alpha=0.05)


def test_config_without_batching_keeps_the_batch_in_the_first_dimension() -> None:
    entry = {"name": "image", "data_type": "TYPE_FP32", "dims": [4, 3, 8, 8]}
    fixed = read_config("m", make_config(max_batch_size=0, input=[entry]))
    assert (fixed.max_batch_size, fixed.shape, fixed.fixed_batch) == (4, (3, 8, 8), True)
    free = read_config("m", make_config(max_batch_size=0, input=[entry | {"dims": [-1, 3, 8, 8]}]))
    assert (free.max_batch_size, free.shape, free.fixed_batch) == (OPEN_BATCH, (3, 8, 8), False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": [{"name": "logits"}]}, "not guarded"),
        ({"input": []}, "takes 0 inputs"),
        ({"input": [{"name": "t", "data_type": "TYPE_STRING", "dims": [1]}]}, "holds no pixels"),
        ({"parameters": {}}, names.GUARD_ID_PARAMETER),
        ({"parameters": make_config()["parameters"] | {names.ALPHA_PARAMETER: {"string_value": "x"}}}, "same version"),
        (
            {
                "parameters": make_config()["parameters"]
                | {names.PREPROCESSING_PARAMETER: {"string_value": json.dumps({"size": [8, 8], "newer": 1})}}
            },
            "same version",
        ),
    ],
)
def test_unusable_config_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelNotReadyError, match=told):
        read_config("digits", make_config(**changes))


@given(st.integers(0, 200), st.integers(1, 50))
def test_split_lists_hold_every_item_once_and_in_order(count: int, size: int) -> None:
    spans = split_list(count, size)
    assert [i for span in spans for i in range(count)[span]] == list(range(count))
    assert all(0 < span.stop - span.start <= size for span in spans)
    assert len(spans) == -(-count // size)


@given(count=st.integers(1, 40), limit=st.integers(1, 9), fixed=st.booleans(), share=st.floats(0, 1))
def test_splitting_and_joining_is_the_identity(count: int, limit: int, fixed: bool, share: float) -> None:
    served = replace(SERVED, max_batch_size=limit, fixed_batch=fixed)
    batch_size = max(1, round(limit * share))
    tensor = np.random.default_rng(count).random((count, 3, 8, 8), np.float32)
    requests = list(plan_tensor(served, tensor, None, "id", batch_size))
    assert len({request.request_id for request in requests}) == len(requests)
    assert all(len(request.tensor) == (limit if fixed else request.rows) for request in requests)
    joined = join_parts(served, [decode_answer(request, answer(request)) for request in requests])
    assert np.array_equal(joined.outputs["extra"], tensor)
    assert np.array_equal(joined.score, tensor.reshape(count, -1).mean(axis=1, dtype=np.float64).astype(np.float32))
    assert joined.score.shape == joined.p_value.shape == joined.flagged.shape == (count,)
    assert (joined.score.dtype, joined.p_value.dtype, joined.flagged.dtype) == (np.float32, np.float32, np.uint8)


@given(st.integers(1, 20), st.booleans())
def test_pixels_are_preprocessed_as_the_guard_says(count: int, as_list: bool) -> None:
    pixels = make_pixels(count)
    requests = list(plan_pixels(SERVED, list(pixels) if as_list else pixels, None, None, None))
    sent = np.concatenate([request.tensor for request in requests])
    assert np.array_equal(sent, PREPROCESSING.apply(pixels))
    assert all(request.tensor.flags.c_contiguous for request in requests)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
        ([], "no images"),
        (np.zeros((2, 8, 8, 3), np.float32), "image 0 is float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"image 0 is uint8 \(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), "leading axis"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], r"image 1 is uint8 \(8, 9, 3\)"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3))], "image 1 is float64"),
        ("digits.png", "images are str"),
        ([1, 2], "images are list"),
        (None, "images are NoneType"),
    ],
)
def test_unusable_pixels_are_refused_before_anything_is_sent(images: Any, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        plan_pixels(SERVED, images, None, None, None)


@given(count=st.integers(1, 30), bad=st.data(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_the_first_non_finite_image_is_named(count: int, bad: st.DataObject, value: float) -> None:
    index = bad.draw(st.integers(0, count - 1))
    tensor = np.zeros((count, 3, 8, 8), np.float32)
    tensor[index:, 1, 2, 3] = value
    with pytest.raises(BadInputError, match=rf"image {index} holds NaN"):
        plan_tensor(SERVED, tensor, None, None, None)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (np.zeros((0, 3, 8, 8), np.float32), "no images"),
        (np.zeros((2, 3, 8, 8), np.float64), "image 0 is float64"),
        (np.zeros((2, 8, 8, 3), np.float32), "takes float32"),
        (np.zeros((3, 8, 8), np.float32), "leading axis"),
    ],
)
def test_unusable_tensors_are_refused(tensor: Any, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        plan_tensor(SERVED, tensor, None, None, None)


def test_open_dimensions_take_any_size() -> None:
    served = replace(SERVED, shape=(3, -1, -1))
    (request,) = plan_tensor(served, np.zeros((2, 3, 5, 7), np.float32), None, None, None)
    assert request.tensor.shape == (2, 3, 5, 7)
    with pytest.raises(BadInputError):
        plan_tensor(served, np.zeros((2, 3, 0, 7), np.float32), None, None, None)


def test_batch_size_above_the_servers_limit_is_refused() -> None:
    with pytest.raises(BadInputError, match="batch_size 9 is more than the 8"):
        plan_pixels(SERVED, make_pixels(2), None, None, 9)


def test_preprocessing_that_does_not_fit_the_graph_is_refused() -> None:
    half = replace(SERVED, dtype=np.dtype(np.float16), datatype="FP16")
    with pytest.raises(BadInputError, match="preprocessing gives float32"):
        next(plan_pixels(half, make_pixels(1), None, None, None))


@given(st.lists(st.sampled_from(["logits", "extra"])))
def test_the_verdict_is_always_asked_for(outputs: list[str]) -> None:
    chosen = choose_outputs(SERVED, outputs)
    assert chosen[-3:] == names.VERDICT_TENSORS
    assert set(chosen[:-3]) == set(outputs) and len(set(chosen)) == len(chosen)


def test_unknown_outputs_are_refused_by_name() -> None:
    with pytest.raises(BadInputError, match=r"no output 'probabilities'; it has logits, extra"):
        choose_outputs(SERVED, ["logits", "probabilities"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({names.SCORE: None}, names.SCORE),
        ({"logits": np.zeros((2, 4), np.float32)}, "for 3 rows"),
        ({"logits": np.float32(1)}, "for 3 rows"),
        ({names.P_VALUE: np.zeros((3, 2), np.float32)}, "one value an image"),
        ({names.FLAGGED: np.full((3, 1), 3, np.uint8)}, "above 2"),
    ],
)
def test_answers_that_do_not_fit_are_server_errors(change: dict[str, Any], told: str) -> None:
    (request,) = plan_pixels(SERVED, make_pixels(3), None, None, None)
    good = answer(request)
    decode_answer(request, good)
    arrays = {name: array for name, array in (dict(good.arrays) | change).items() if array is not None}
    with pytest.raises(ServerError, match=told):
        decode_answer(request, Answer(request.request_id, arrays))


def test_an_answer_to_another_request_is_refused() -> None:
    (request,) = plan_pixels(SERVED, make_pixels(1), None, "mine", None)
    with pytest.raises(ServerError, match="'yours-0'"):
        decode_answer(request, Answer("yours-0", answer(request).arrays))
