"""The exported repository through the real server: what a client sees, whatever else happens."""

import itertools
import json
import shutil
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
from google.protobuf import text_format
from tritonclient.utils import InferenceServerException

import shapes
from diffense import names
from diffense.serving.settings import BUDGET_PARAMETER, CLOSED_PARAMETER, POLICY_PARAMETER
from diffense_export.configs import CONFIG_FILE, parse_config
from diffense_export.repository import export_guard
from triton_calls import CLIENTS, DEADLINE_S, INVALID, MAX_BATCH, ask, check_verdict, copy_gateway, read_total

pytestmark = pytest.mark.server

FAMILIES = tuple(f"{placement}_{loop}" for placement in ("separate", "shared") for loop in ("bls", "fused", "whole", "direct"))
FRONTS = ("guarded", "gateway")
OUTPUTS = ("logits", *names.VERDICT_TENSORS)


@pytest.fixture(scope="session")
def server(guard, small_target, clean_images, tmp_path_factory, triton_for):
    repository = tmp_path_factory.mktemp("families") / "repository"
    for family in FAMILIES:
        placement, loop = family.split("_")
        export_guard(
            guard, small_target, repository, family, placement=placement, loop=loop, max_batch_size=MAX_BATCH, threads=1,
            clean=clean_images[:64],
        )  # fmt: skip
    for policy in ("abstain", "reject"):
        copy_gateway(
            repository,
            "separate_bls",
            policy,
            **{POLICY_PARAMETER: policy, CLOSED_PARAMETER: "true", BUDGET_PARAMETER: "20000"},
        )
    copy_gateway(repository, "separate_bls", "hasty", **{BUDGET_PARAMETER: "1"})
    return triton_for(repository)


@pytest.fixture(scope="session")
def known(guard):
    """Images, half of them unlike anything clean, their input tensors, and what the guard says without a server.

    None of them calibrated the guard: a score that ties with its own moves a p-value by a rank with the last bit.
    """
    clean = shapes.draw_shapes(8, seed=77)[0]
    strange = np.random.default_rng(3).integers(0, 256, clean.shape, np.uint8)
    pixels = np.concatenate([clean, strange])
    return pixels, guard.preprocessing.apply(pixels), guard.score(pixels)


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_guard_and_production_is_untouched(server, known, family, front, protocol):
    _, image, truth = known
    production = ask(server, protocol, family, image).as_numpy("logits")
    result = ask(server, protocol, f"{family}_{front}", image)
    check_verdict(result, truth, slice(None))
    if family.startswith("separate"):
        assert np.array_equal(result.as_numpy("logits"), production)
    else:
        assert np.abs(result.as_numpy("logits") - production).max() <= 1e-5
    assert result.as_numpy("logits").dtype == production.dtype


@pytest.mark.parametrize(
    ("family", "front"), [*itertools.product(["separate_bls", "shared_fused"], FRONTS), ("shared_direct", "guarded")]
)
def test_32_clients_at_once_get_their_own_answers(server, known, family, front):
    _, image, truth = known
    generator = np.random.default_rng(0)
    model = f"{family}_{front}" if front == "guarded" else "abstain" if family == "separate_bls" else f"{family}_gateway"
    rows = [generator.choice(len(image), int(size)) for size in generator.integers(1, 9, 32)]
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda picked: ask(server, "grpc", model, image[picked]), rows))
    alone = ask(server, "grpc", family, image).as_numpy("logits")
    for result, picked in zip(results, rows, strict=True):
        if (result.as_numpy(names.FLAGGED) == names.UNSCORED).all() and model == f"{family}_gateway":
            continue  # an overloaded gateway may run out of its budget; who gets whose answer is what is asked here
        check_verdict(result, truth, picked)
        kept = truth.flagged[picked] == names.PASSED
        assert np.allclose(result.as_numpy("logits")[kept], alone[picked][kept], atol=1e-4)


def spoil(image, value):
    spoilt = image[:3].copy()
    spoilt[1, ..., 0] = value
    return spoilt


BAD = {
    "dtype": (lambda image: image[:2].astype(np.float64), "FP64|data-type"),
    "shape": (lambda image: image[:2, :, :-1], "shape"),
    "rank": (lambda image: image[0], "shape|batch"),
    "nan": (lambda image: spoil(image, np.nan), "image 1 of the request"),
    "infinity": (lambda image: spoil(image, np.inf), "image 1 of the request"),
    "empty": (lambda image: image[:0], "Expected"),
    "oversized": (lambda image: np.repeat(image, 2, axis=0), "batch-size must be <= 16"),
}


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("front", FRONTS)
def test_bad_input_is_the_clients_error_and_the_server_goes_on(server, known, front, kind, protocol):
    _, image, truth = known
    change, words = BAD[kind]
    model = "separate_bls_guarded" if front == "guarded" else "abstain"
    with pytest.raises(InferenceServerException, match=words) as caught:
        ask(server, protocol, model, change(image))
    assert caught.value.status() in INVALID
    assert str(server.repository) not in caught.value.message()
    assert "Traceback" not in caught.value.message()
    check_verdict(ask(server, protocol, model, image[:2], names.VERDICT_TENSORS), truth, [0, 1])


def test_a_bad_image_does_not_fail_the_requests_it_is_stacked_with(server, known):
    _, image, truth = known

    def try_one(number):
        if number % 4:
            return ask(server, "grpc", "separate_bls_guarded", image[:2])
        with pytest.raises(InferenceServerException, match="image 1 of the request"):
            ask(server, "grpc", "separate_bls_guarded", spoil(image, np.nan))
        return None

    with ThreadPoolExecutor(24) as pool:
        for result in pool.map(try_one, range(24)):
            if result is not None:
                check_verdict(result, truth, [0, 1])


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", ["separate_bls", "shared_fused", "separate_direct", "shared_direct"])
def test_every_subset_of_outputs_can_be_asked_for(server, known, family, front):
    _, image, _ = known
    whole = ask(server, "grpc", f"{family}_{front}", image[:2])
    for count in range(1, len(OUTPUTS) + 1):
        for wanted in itertools.combinations(OUTPUTS, count):
            result = ask(server, "grpc", f"{family}_{front}", image[:2], wanted)
            assert {output.name for output in result.get_response().outputs} == set(wanted)
            for name in wanted:
                assert np.allclose(result.as_numpy(name), whole.as_numpy(name), atol=1e-5)


def test_asking_for_production_outputs_alone_keeps_the_guard_on(server, known):
    _, image, _ = known
    before = read_total(server, "diffense_scored_total", model="shared_bls")
    ask(server, "grpc", "shared_bls_guarded", image[:3], ["logits"])
    assert read_total(server, "diffense_scored_total", model="shared_bls") == before + 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("family", ["separate_direct", "shared_direct"])
def test_without_the_guards_model_a_bad_image_has_no_verdict_and_harms_no_other(server, known, family, value):
    _, image, truth = known
    before = read_total(server, "diffense_scored_total", model=family)  # the gateway's
    result = ask(server, "grpc", f"{family}_guarded", spoil(image, value))
    assert result.as_numpy(names.FLAGGED).ravel().tolist() == [truth.flagged[0], names.UNSCORED, truth.flagged[2]]
    assert result.as_numpy(names.SCORE)[1] == result.as_numpy(names.P_VALUE)[1] == names.NOT_SCORED_VALUE
    assert np.allclose(result.as_numpy(names.SCORE)[[0, 2], 0], truth.scores[[0, 2]], atol=1e-4)
    assert read_total(server, "diffense_scored_total", model=family) == before


def test_a_gateway_without_a_guards_model_counts(server, known):
    _, image, truth = known
    counted = ("diffense_scored_total", "diffense_flagged_total", "diffense_unscored_total")
    before = [read_total(server, series, model="shared_direct") for series in counted]
    ask(server, "grpc", "shared_direct_gateway", image)
    ask(server, "grpc", "shared_direct_gateway", spoil(image, np.nan)[1:2])
    after = [read_total(server, series, model="shared_direct") for series in counted]
    assert np.subtract(after, before).tolist() == [len(image), truth.flagged.sum(), 1]


def test_the_metrics_page_counts_what_was_flagged_and_refused(server, known):
    _, image, truth = known
    model = {"model": "separate_fused"}
    counted = ("diffense_scored_total", "diffense_flagged_total", "diffense_score_count")
    before = [read_total(server, series, **model) for series in counted]
    refused = read_total(server, "diffense_unscored_total", reason="invalid_arg", **model)
    ask(server, "http", "separate_fused_guarded", image)
    with pytest.raises(InferenceServerException):
        ask(server, "http", "separate_fused_guarded", spoil(image, np.nan))
    after = [read_total(server, series, **model) for series in counted]
    assert np.subtract(after, before).tolist() == [len(image), truth.flagged.sum(), len(image)]
    assert read_total(server, "diffense_unscored_total", reason="invalid_arg", **model) == refused + 1


def test_plain_json_over_http_works(server, known):
    _, image, truth = known
    body = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [2, *image.shape[1:]], "data": image[:2].ravel().tolist()}]
    }
    url = f"http://{server.endpoints.http}/v2/models/separate_bls_guarded/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=DEADLINE_S) as answer:
        outputs = {output["name"]: output for output in json.load(answer)["outputs"]}
    assert set(outputs) == set(OUTPUTS)
    assert outputs[names.FLAGGED]["datatype"] == "UINT8"
    assert np.allclose(outputs[names.SCORE]["data"], truth.scores[:2], atol=1e-4)


def test_a_client_that_gives_up_harms_nobody(server, known):
    _, image, truth = known
    with grpc.InferenceServerClient(server.endpoints.grpc) as client:
        tensor = grpc.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)
        for _ in range(8):
            with pytest.raises(InferenceServerException, match=r"Deadline|CANCELLED"):
                client.infer("separate_bls_guarded", [tensor], client_timeout=0.001)
    check_verdict(ask(server, "grpc", "separate_bls_guarded", image), truth, slice(None))


def test_a_timeout_in_the_request_ends_the_scoring_and_not_the_answer(server, known):
    _, image, _ = known
    production = ask(server, "grpc", "separate_bls", image[:2]).as_numpy("logits")
    for front in FRONTS:
        result = ask(server, "grpc", f"separate_bls_{front}", image[:2], timeout=1)
        assert np.array_equal(result.as_numpy("logits"), production)
        assert (result.as_numpy(names.FLAGGED) == names.UNSCORED).all()
        assert (result.as_numpy(names.SCORE) == -1).all()


# The gateway's policies


def test_abstain_withholds_flagged_images_alone(server, known):
    _, image, truth = known
    assert 0 < truth.flagged.sum() < len(image)
    production = ask(server, "grpc", "separate_bls", image).as_numpy("logits")
    result = ask(server, "grpc", "abstain", image)
    flagged = truth.flagged == names.FLAGGED_YES
    check_verdict(result, truth, slice(None))
    assert (result.as_numpy("logits")[flagged] == 0).all()
    assert np.array_equal(result.as_numpy("logits")[~flagged], production[~flagged])


@pytest.mark.parametrize("protocol", CLIENTS)
def test_reject_refuses_requests_with_a_flagged_image(server, known, protocol):
    _, image, truth = known
    passed, flagged = (int(np.flatnonzero(truth.flagged == value)[0]) for value in (names.PASSED, names.FLAGGED_YES))
    check_verdict(ask(server, protocol, "reject", image[[passed]]), truth, [passed])
    with pytest.raises(InferenceServerException, match="flagged image 1 of the request") as caught:
        ask(server, protocol, "reject", image[[passed, flagged]])
    assert caught.value.status() in INVALID


def test_a_budget_too_small_still_gives_production_outputs(server, known):
    _, image, _ = known
    production = ask(server, "grpc", "separate_bls", image).as_numpy("logits")
    before = read_total(server, "diffense_unscored_total", model="separate_bls")
    result = ask(server, "grpc", "hasty", image)
    assert np.array_equal(result.as_numpy("logits"), production)
    assert (result.as_numpy(names.FLAGGED) == names.UNSCORED).all()
    assert read_total(server, "diffense_unscored_total", model="separate_bls") >= before + len(image)


def test_configs_are_read_by_the_server_as_they_were_meant(server):
    with grpc.InferenceServerClient(server.endpoints.grpc) as client:
        for folder in sorted(server.repository.iterdir()):
            meant = parse_config(folder / CONFIG_FILE)
            read = client.get_model_config(folder.name, client_timeout=DEADLINE_S).config
            assert read.max_batch_size == meant.max_batch_size
            for ours, theirs in ((meant.input, read.input), (meant.output, read.output)):
                assert [text_format.MessageToString(e) for e in ours] == [text_format.MessageToString(e) for e in theirs]
            for key, value in meant.parameters.items():
                assert read.parameters[key].string_value == value.string_value


def test_curl_gets_an_answer(server, known):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    _, image, truth = known
    body = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, *image.shape[1:]], "data": image[:1].ravel().tolist()}]
    }
    url = f"http://{server.endpoints.http}/v2/models/separate_bls_guarded/infer"
    done = subprocess.run(
        [curl, "-sS", "--max-time", str(DEADLINE_S), "-d", "@-", url], input=json.dumps(body), capture_output=True, text=True
    )
    outputs = {output["name"]: output["data"] for output in json.loads(done.stdout)["outputs"]}
    assert np.allclose(outputs[names.SCORE], truth.scores[:1], atol=1e-4)
