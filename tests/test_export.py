import hashlib

import onnx
import pytest
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

import onnx_models
from diffense import names
from diffense.cli import app
from diffense.errors import ExportError, WrongTargetError
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.serving.settings import AT_ONCE_PARAMETER, GatewayOptions
from diffense.settings import FitSettings
from diffense.target import Target, hash_target
from diffense_export.configs import CONFIG_FILE, FRONT_INSTANCES, parse_config, read_family
from diffense_export.repository import EXPORT_FILE, export_guard, read_export
from repositories import hash_tree, list_models, read_configs_of

SUFFIXES = {
    ("separate", "bls"): ["", "_denoiser", "_features", "_gateway", "_guard", "_guarded"],
    ("separate", "fused"): ["", "_features", "_gateway", "_guard", "_guarded", "_scorer"],
    ("shared", "bls"): ["", "_denoiser", "_gateway", "_guard", "_guarded", "_tapped"],
    ("shared", "fused"): ["", "_gateway", "_guard", "_guarded", "_scorer", "_tapped"],
    ("separate", "direct"): ["", "_features", "_gateway", "_guarded"],
    ("shared", "direct"): ["", "_gateway", "_guarded", "_tapped"],
}


def read_configs(repository):
    return {folder.name: parse_config(folder / CONFIG_FILE) for folder in repository.iterdir()}


def forward(config, tensor):
    """Names under which an ensemble hands a tensor on."""
    return [step.model_name for step in config.ensemble_scheduling.step if tensor in step.input_map.values()]


# What is written


@pytest.mark.parametrize(("placement", "loop"), SUFFIXES)
def test_every_placement_and_loop_has_its_models_and_its_proof(guard, small_target, clean_images, tmp_path, placement, loop):
    repository = tmp_path / "models"
    report = export_guard(guard, small_target, repository, "m", placement=placement, loop=loop, clean=clean_images[:40])
    assert list_models(repository) == sorted("m" + suffix for suffix in SUFFIXES[placement, loop])
    assert sorted(report.models) == list_models(repository)
    assert list(tmp_path.iterdir()) == [repository]
    manifest = read_export(repository, "m")
    assert manifest == report.manifest
    assert (manifest.guard_id, manifest.target_sha256) == (guard.guard_id, guard.manifest.target_sha256)
    assert (manifest.parity.origin, manifest.parity.images) == ("clean images", 40)
    assert all(c.largest_difference <= c.tolerance for c in manifest.parity.comparisons)
    assert manifest.parity.neutrality.rank_correlation > 0.999
    assert manifest.parity.neutrality.verdict_flips == 0


def test_the_target_is_served_byte_for_byte(guard, small_target, tmp_path):
    export_guard(guard, small_target, tmp_path / "r", "m")
    assert (tmp_path / "r" / "m" / "1" / "model.onnx").read_bytes() == small_target.read_bytes()


def test_the_same_export_gives_the_same_bytes(guard, small_target, tmp_path):
    for repository in ("a", "b"):
        export_guard(guard, small_target, tmp_path / repository, "m", loop="fused")
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_a_target_with_external_data_is_copied_with_it(guard, small_target, clean_images, tmp_path):
    target = onnx_models.save(onnx.load(small_target), tmp_path / "big.onnx", external="weights.bin")
    other = fit_guard(Target.open(target), clean_images, tmp_path / "g", settings=FitSettings(alpha=0.02, network="off"))
    export_guard(other, target, tmp_path / "r", "m")
    served = tmp_path / "r" / "m" / "1"
    assert sorted(path.name for path in served.iterdir()) == ["model.onnx", "weights.bin"]
    assert hash_target(served / "model.onnx") == hash_target(target)
    assert "m_denoiser" not in list_models(tmp_path / "r")  # the network is off, and nothing needs a denoiser


def test_no_tensor_is_an_output_of_the_ensemble_and_an_input_of_a_later_step(guard, small_target, tmp_path):
    for placement in ("separate", "shared"):
        export_guard(guard, small_target, tmp_path / placement, "m", placement=placement)
        config = read_configs(tmp_path / placement)["m_guarded"]
        outputs = [output.name for output in config.output]
        assert outputs == ["logits", *names.VERDICT_TENSORS]
        assert all(forward(config, output) == [] for output in outputs)
        assert forward(config, names.LATENTS) == ["m_guard"]


@pytest.mark.parametrize(("loop", "callee"), [("bls", "m_denoiser"), ("fused", "m_scorer")])
def test_the_guards_own_graphs_get_one_thread_unless_told_otherwise(guard, small_target, tmp_path, loop, callee):
    export_guard(guard, small_target, tmp_path / "r", "m", loop=loop)
    configs = read_configs(tmp_path / "r")
    assert configs[callee].parameters["intra_op_thread_count"].string_value == "1"
    assert not any("intra_op_thread_count" in configs[name].parameters for name in ("m", "m_features"))


def test_configs_keep_to_what_the_loops_can_bear(guard, small_target, tmp_path):
    export_guard(guard, small_target, tmp_path / "r", "m", max_batch_size=12, instances=2, threads=3)
    for name, config in read_configs(tmp_path / "r").items():
        assert (config.name, config.max_batch_size) == (name, 12)
        assert config.dynamic_batching.max_queue_delay_microseconds == 0
        assert config.HasField("dynamic_batching") == (config.platform != "ensemble")
        assert all(group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO for group in config.instance_group)
        assert [group.count for group in config.instance_group] == ([] if config.platform == "ensemble" else [2])
        assert bool(config.model_warmup) == (config.backend == "onnxruntime")
        if config.backend == "onnxruntime":
            assert config.parameters["intra_op_thread_count"].string_value == "3"
    guarded = read_configs(tmp_path / "r")["m_guarded"].parameters
    assert guarded[names.GUARD_ID_PARAMETER].string_value == guard.guard_id
    assert guarded[names.LOGITS_PARAMETER].string_value == "logits"
    assert float(guarded[names.ALPHA_PARAMETER].string_value) == guard.manifest.alpha
    stated = guard.preprocessing.model_validate_json(guarded[names.PREPROCESSING_PARAMETER].string_value)
    assert stated == guard.preprocessing


@pytest.mark.parametrize("placement", ["separate", "shared"])
@pytest.mark.parametrize("instances", [1, 4])
def test_queues_are_limited_at_the_fronts_alone_which_get_instances_enough(guard, small_target, tmp_path, placement, instances):
    for queue in (7, 0):
        options = {"placement": placement, "stream": True, "queue": queue, "instances": instances}
        export_guard(guard, small_target, tmp_path / "r", "m", **options)
        configs = read_configs(tmp_path / "r")
        limits = {name: config.dynamic_batching.default_queue_policy.max_queue_size for name, config in configs.items()}
        fronts = {"m_gateway", "m_stream"}
        assert limits == {name: queue if name in fronts else 0 for name in configs}
        for name in set(configs) - {"m_guarded"}:
            least = FRONT_INSTANCES if name in fronts and queue else 1
            assert [group.count for group in configs[name].instance_group] == [max(least, instances)]
        at_once = {name: config.parameters[AT_ONCE_PARAMETER].string_value for name, config in configs.items()}
        turns = str(instances) if queue and instances < FRONT_INSTANCES else ""
        assert at_once == {name: turns if name in fronts else "" for name in configs}


def test_models_that_take_images_answer_them_one_by_one_on_the_cuda_provider(guard, small_target, tmp_path):
    for placement in ("separate", "shared"):
        options = {"placement": placement, "stream": True, "accelerator": "cuda"}
        export_guard(guard, small_target, tmp_path / placement, "m", **options)
        configs = read_configs(tmp_path / placement)
        stacks = {name for name, config in configs.items() if config.HasField("dynamic_batching")}
        assert stacks == {"m_denoiser", "m_guard"}
        export_guard(guard, small_target, tmp_path / placement, "m", **options, queue=7)
        limited = read_configs(tmp_path / placement)["m_gateway"]
        assert limited.dynamic_batching.default_queue_policy.max_queue_size == 7


def test_the_stream_is_made_when_asked_for_and_goes_when_not(guard, small_target, tmp_path):
    report = export_guard(guard, small_target, tmp_path / "r", "m", stream=True)
    assert "m_stream" in report.models
    configs = read_configs(tmp_path / "r")
    assert [name for name, config in configs.items() if config.model_transaction_policy.decoupled] == ["m_stream"]
    assert configs["m_stream"].output == configs["m_guarded"].output
    assert configs["m_stream"].parameters[names.GUARD_ID_PARAMETER].string_value == guard.guard_id
    assert export_guard(guard, small_target, tmp_path / "r", "m").removed == ("m_stream",)


@pytest.mark.parametrize("accelerator", ["none", "cuda", "tensorrt"])
def test_an_accelerator_stands_in_the_configs_of_graphs_alone(guard, small_target, tmp_path, accelerator):
    export_guard(guard, small_target, tmp_path / "r", "m", max_batch_size=12, accelerator=accelerator)
    for name, config in read_configs(tmp_path / "r").items():
        found = config.optimization.execution_accelerators.gpu_execution_accelerator
        expected = [accelerator] if accelerator != "none" and config.backend == "onnxruntime" else []
        assert [entry.name for entry in found] == expected
        if expected == ["cuda"]:
            assert dict(found[0].parameters) == ({} if name == "m" else {"use_tf32": "0"})
        if name == "m" and accelerator == "tensorrt":
            profile = {word: f"image:{batch}x3x16x16" for word, batch in (("min", 1), ("opt", 3), ("max", 12))}
            shapes = {f"trt_profile_{word}_shapes": shape for word, shape in profile.items()}
            assert dict(found[0].parameters) == {"precision_mode": "FP32", **shapes}


def test_the_gateways_options_stand_in_its_config(guard, small_target, tmp_path):
    options = GatewayOptions("reject", 250, True)
    export_guard(guard, small_target, tmp_path / "r", "m", gateway_options=options)
    parameters = read_configs(tmp_path / "r")["m_gateway"].parameters
    assert GatewayOptions.from_parameters({key: value.string_value for key, value in parameters.items()}) == options


def test_options_of_a_gateway_that_is_not_written_are_refused(guard, small_target, tmp_path, run_cli):
    arguments = ["export", guard.directory, "--target", small_target, "--repository", tmp_path / "r", "--model", "m"]
    for option in (["--policy", "reject"], ["--closed"], ["--budget-ms", 100]):
        code, said, told = run_cli(*arguments, "--no-gateway", "--stream", *option)
        assert (code, said) == (2, "")
        assert "are for the gateway alone" in told and option[0] in told
        assert list(tmp_path.iterdir()) == []
    code, said, told = run_cli(*arguments, "--no-gateway", "--queue", 9)
    assert (code, said, list(tmp_path.iterdir())) == (2, "", []) and "--queue limits gateway and stream" in told
    for gateway, options in ((False, GatewayOptions()), (True, GatewayOptions("reject"))):
        report = export_guard(guard, small_target, tmp_path / "r", "m", gateway=gateway, gateway_options=options, dry_run=True)
        assert ("m_gateway" in report.models) == gateway


# What stands in the way


def test_an_export_over_an_older_one_replaces_it_and_its_leftovers_alone(guard, small_target, tmp_path):
    repository = tmp_path / "r"
    (repository / "stranger" / "1").mkdir(parents=True)
    export_guard(guard, small_target, repository, "m", loop="fused")
    export_guard(guard, small_target, repository, "other")
    before = hash_tree(repository / "other")
    report = export_guard(guard, small_target, repository, "m", loop="bls", gateway=False, max_batch_size=5)
    assert report.removed == ("m_gateway", "m_scorer")
    mine = [name for name in list_models(repository) if read_family(repository / name) == "m"]
    assert mine == ["m", "m_denoiser", "m_features", "m_guard", "m_guarded"]
    assert {config.max_batch_size for name, config in read_configs_of(repository, mine)} == {5}
    assert hash_tree(repository / "other") == before
    assert (repository / "stranger" / "1").is_dir()
    assert list(tmp_path.iterdir()) == [repository]


@pytest.mark.parametrize("taken", ["m", "m_guard", "m_gateway"])
def test_a_strangers_folder_is_never_touched(guard, small_target, tmp_path, taken):
    place = tmp_path / "r" / taken
    place.mkdir(parents=True)
    (place / "config.pbtxt").write_text('name: "mine"')
    with pytest.raises(ExportError, match=taken):
        export_guard(guard, small_target, tmp_path / "r", "m")
    assert hash_tree(tmp_path) == {f"r/{taken}/config.pbtxt": hashlib.sha256(b'name: "mine"').hexdigest()}


def test_a_dry_run_writes_nothing_and_says_what_it_would(guard, small_target, tmp_path):
    report = export_guard(guard, small_target, tmp_path / "r", "m", dry_run=True)
    assert report.models == ("m", "m_features", "m_denoiser", "m_guard", "m_gateway", "m_guarded")
    assert hash_tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "a;reboot", "$(id)", "é", "-x", "x" * 201, 'a"b', "a\n"])
def test_names_that_the_python_backend_hands_to_a_shell_are_refused(guard, small_target, tmp_path, name):
    with pytest.raises(ExportError, match="cannot be the name"):
        export_guard(guard, small_target, tmp_path / "r", name)
    assert list(tmp_path.iterdir()) == []


def test_another_classifier_is_refused(guard, tmp_path):
    other = onnx_models.save(onnx_models.plain_cnn(), tmp_path / "other.onnx")
    with pytest.raises(WrongTargetError, match=r"other\.onnx"):
        export_guard(guard, other, tmp_path / "r", "m")


# The command


def test_the_command_writes_what_the_function_writes(guard, small_target, tmp_path):
    arguments = ["export", str(guard.directory), "--target", str(small_target), "--model", "m", "--loop", "fused"]
    done = CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path / "a"), "--policy", "abstain"])
    assert done.exit_code == 0, done.output
    options = GatewayOptions("abstain")
    export_guard(Guard.load(guard.directory), small_target, tmp_path / "b", "m", loop="fused", gateway_options=options)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert str(tmp_path / "a" / "m_guarded") in done.output.replace("\n", "")
    dry = CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path / "c"), "--dry-run"])
    assert "would write" in dry.output
    assert not any((tmp_path / "c").glob("*"))


def test_a_missing_repository_and_a_missing_model_are_told_apart(guard, small_target, tmp_path):
    with pytest.raises(ExportError, match="nowhere is no folder"):
        read_export(tmp_path / "nowhere", "m")
    with pytest.raises(ExportError, match="no export for a model 'm'; `diffense export` writes one"):
        read_export(tmp_path, "m")
    for model in ("second", "first"):
        export_guard(guard, small_target, tmp_path, model)
    with pytest.raises(ExportError, match=r"no export for a model 'first_guarded'; choose from first, second$"):
        read_export(tmp_path, "first_guarded")


def test_a_damaged_export_manifest_is_refused(guard, small_target, tmp_path):
    export_guard(guard, small_target, tmp_path, "m")
    (tmp_path / "m_guarded" / EXPORT_FILE).write_text("{}")
    with pytest.raises(ExportError, match="export the guard again"):
        read_export(tmp_path, "m")
