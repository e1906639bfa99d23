"""TensorRT plans, as far as they go without a GPU: every exported graph is parsed and compiled ahead of time."""

import json
import shutil

import numpy as np
import onnx
import pytest
from tritonclient.grpc import model_config_pb2

import onnx_models
from ahead_of_time import AheadOfTime, load
from diffense import names
from diffense.errors import DiffenseError, ExportError, ParityError
from diffense.fit import fit_guard
from diffense.graphs import load_model, save_graph
from diffense.settings import FitSettings
from diffense.target import Target
from diffense_export.configs import CONFIG_FILE, parse_config
from diffense_export.engine import Shapes, find_device
from diffense_export.half import convert_half
from diffense_export.plans import PLAN_FILE, PLANS_FILE, PlansManifest, build_plans, choose_shapes, make_config
from diffense_export.repository import export_guard
from repositories import hash_tree

# TensorRT for RTX keeps no timings and says so; the calls are the same.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FORMS = {
    "m": ("separate", "bls"), "f": ("shared", "fused"), "w": ("shared", "whole"), "s": ("separate", "whole"),
    "d": ("shared", "direct"), "e": ("separate", "direct"),
}  # fmt: skip
GRAPHS = {
    "m": ("m_features", "m_denoiser"), "f": ("f_tapped", "f_scorer"), "w": ("w_tapped",), "s": ("s_features",),
    "d": ("d_tapped",), "e": ("e_features",),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(guard, small_target, clean_images, tmp_path_factory):
    """A repository of every form of the family; tests copy it."""
    repository = tmp_path_factory.mktemp("plans") / "r"
    for model, (placement, loop) in FORMS.items():
        export_guard(
            guard, small_target, repository, model, placement=placement, loop=loop, max_batch_size=12, clean=clean_images[:32]
        )
    return repository


@pytest.fixture
def repository(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "r")


@pytest.fixture
def engine(monkeypatch, tmp_path):
    return AheadOfTime(load(monkeypatch), tmp_path / "r.timing")


def describe(config):
    return [(t.name, t.data_type, list(t.dims), t.HasField("reshape")) for t in (*config.input, *config.output)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", FORMS)
def test_a_family_is_served_as_plans_under_the_same_names_and_types(repository, engine, model, precision):
    before = {folder.name: hash_tree(folder) for folder in repository.iterdir()}
    configs = {name: parse_config(repository / name / CONFIG_FILE) for name in GRAPHS[model]}
    manifest = build_plans(repository, model, engine, precision=precision)
    assert tuple(plan.model for plan in manifest.plans) == GRAPHS[model]
    for name, old in configs.items():
        new = parse_config(repository / name / CONFIG_FILE)
        assert (new.platform, new.backend, new.default_model_filename) == ("tensorrt_plan", "tensorrt", PLAN_FILE)
        assert (new.name, new.max_batch_size, describe(new)) == (name, 12, describe(old))
        assert "intra_op_thread_count" not in new.parameters
        assert (repository / name / "1" / "model.onnx").is_file()
        assert (repository / name / "1" / PLAN_FILE).stat().st_size > 100_000
    stated = json.loads((repository / f"{model}_guarded" / PLANS_FILE).read_text())
    assert PlansManifest.model_validate(stated) == manifest
    assert (manifest.compute_capability, manifest.tensorrt, manifest.precision) == ("8.6", engine.version, precision)
    worst = max(comparison.largest_difference for plan in manifest.plans for comparison in plan.parity)
    assert worst < 1e-4 if precision == "fp32" else 1e-4 < worst < 0.1
    touched = {*GRAPHS[model], f"{model}_guarded"}
    after = {folder.name: hash_tree(folder) for folder in repository.iterdir()}
    assert {name for name, files in after.items() if files != before.get(name)} == touched
    assert sorted(path.name for path in repository.parent.iterdir()) == ["r", "r.timing"]


def test_plans_are_built_again_from_the_graphs_beside_them_production_only_when_asked(guard, small_target, repository, engine):
    build_plans(repository, "m", engine, precision="fp32")
    manifest = build_plans(repository, "m", engine, precision="fp32", production=True, cuda_graphs=True)
    assert [plan.model for plan in manifest.plans] == ["m", "m_features", "m_denoiser"]
    assert parse_config(repository / "m" / CONFIG_FILE).optimization.cuda.graphs
    with pytest.raises(ExportError, match="runs on tensorrt"):  # an export cannot tell which classifier a plan was
        export_guard(guard, small_target, repository, "m", production=False)


def test_production_that_was_left_alone_is_not_built(guard, small_target, repository, engine):
    export_guard(guard, small_target, repository, "m", production=False)
    with pytest.raises(ExportError, match="m was exported with --no-production"):
        build_plans(repository, "m", engine, production=True)


def test_plans_stack_requests_also_where_the_config_for_onnxruntime_does_not():
    config = model_config_pb2.ModelConfig(name="m", max_batch_size=8)
    assert make_config(config, cuda_graphs=False).HasField("dynamic_batching")
    config.max_batch_size = 0
    assert not make_config(config, cuda_graphs=False).HasField("dynamic_batching")


def test_every_batch_that_is_served_is_in_the_profile(exported):
    config = parse_config(exported / "m_denoiser" / CONFIG_FILE)
    shapes = choose_shapes(config, exported / "m_denoiser" / "1" / "model.onnx", 12)
    assert [tuple(shape[0] for shape in shapes[name]) for name in (names.NOISED, names.SIGMA, names.GUIDE)] == [(1, 3, 12)] * 3
    config = parse_config(exported / "m_features" / CONFIG_FILE)
    assert choose_shapes(config, exported / "m_features" / "1" / "model.onnx", 12) == {
        "image": Shapes((1, 3, 16, 16), (3, 3, 16, 16), (12, 3, 16, 16)),
        names.RAW_LOGITS: Shapes((1, 4), (3, 4), (12, 4)),
    }


@pytest.mark.parametrize(
    ("model", "fault"), [("f", "differs"), ("f", "hides NaN"), ("f", "cannot be read"), ("d", "hides NaN"), ("e", "judges NaN")]
)
def test_whatever_fails_leaves_the_repository_as_it_was(repository, engine, monkeypatch, model, fault):
    run = engine.run

    def judge(plan, inputs):  # logits that are no numbers like any others
        return run(plan, {name: np.nan_to_num(array) if name == names.RAW_LOGITS else array for name, array in inputs.items()})

    if fault == "differs":
        monkeypatch.setattr(engine, "run", lambda plan, inputs: {k: v + 1 for k, v in run(plan, inputs).items()})
    elif model == "d":
        monkeypatch.setattr(
            engine, "run", lambda plan, inputs: {k: v % 2 if k == names.FLAGGED else v for k, v in run(plan, inputs).items()}
        )
    elif fault == "judges NaN":
        monkeypatch.setattr(engine, "run", judge)
    elif fault == "hides NaN":
        monkeypatch.setattr(engine, "run", lambda plan, inputs: {k: np.nan_to_num(v) for k, v in run(plan, inputs).items()})
    else:
        (repository / "f_scorer" / "1" / "model.onnx").write_bytes(b"nothing")
    before = hash_tree(repository)
    with pytest.raises(DiffenseError) as caught:
        build_plans(repository, model, engine, precision="fp32")
    assert isinstance(caught.value, ParityError) == (fault != "cannot be read")
    assert hash_tree(repository) == before
    assert {path.name for path in repository.parent.iterdir()} <= {"r", "r.timing"}


def test_whole_numbers_bytes_and_one_number_an_image_keep_their_types(engine, tmp_path):
    # Of fewer images some directions of the toys' last taps are all rounding, and float16 misses them.
    coarse = np.random.default_rng(1).integers(0, 256, (600, 4, 4, 3)).astype(np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    models = {"several": onnx_models.add_outputs(onnx_models.plain_cnn(), "N"), "bytes": onnx_models.uint8_input()}
    models["fixed"] = onnx_models.add_outputs(onnx_models.plain_cnn(batch=4), 4)
    for name, model in models.items():
        target = onnx_models.save(model, tmp_path / f"{name}.onnx")
        network = "on" if name == "fixed" else "off"
        settings = FitSettings(alpha=0.1, network=network, training_steps=50)
        guard = fit_guard(Target.open(target), images, tmp_path / name, settings=settings)
        export_guard(guard, target, tmp_path / "r", name, placement="shared", clean=images[:40])
        manifest = build_plans(tmp_path / "r", name, engine, precision="fp16", production=True)
        shapes = {plan.model: next(iter(plan.shapes.values())) for plan in manifest.plans}
        batches = {name: [shape[0] for shape in three] for name, three in shapes.items()}
        if name == "fixed":  # the guard's own graph gets as many rows as can be scored
            assert batches == {name: [4, 4, 4], f"{name}_tapped": [4, 4, 4], f"{name}_denoiser": [1, 1, 4]}
        else:
            assert batches == {name: [1, 8, 32], f"{name}_tapped": [1, 8, 32]}
    config = parse_config(tmp_path / "r" / "several" / CONFIG_FILE)
    label = next(output for output in config.output if output.name == "label")
    assert (label.data_type, list(label.dims), label.HasField("reshape")) == (9, [1], True)


def test_a_type_that_tensorrt_lacks_is_named(repository, engine):
    path = repository / "m_features" / CONFIG_FILE
    path.write_text(path.read_text().replace("TYPE_FP32", "TYPE_FP64"))
    with pytest.raises(ExportError, match=r"m_features is TYPE_FP64.*serve this model as ONNX"):
        build_plans(repository, "m", engine)


def test_a_plan_with_other_types_than_the_config_is_refused(repository, engine, monkeypatch):
    build, before = engine.build, hash_tree(repository)
    monkeypatch.setattr(engine, "build", lambda graph, shapes: (b"plan", build(graph, shapes)[1] | {"logits": "HALF"}))
    with pytest.raises(ExportError, match=r"logits of f_tapped is TYPE_FP32, but HALF in the plan"):
        build_plans(repository, "f", engine)
    assert hash_tree(repository) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["m_features", "f_tapped", "f_scorer", "m_denoiser", "w_tapped", "s_features"])
def test_polygraphy_folds_and_reads_every_graph(exported, engine, tmp_path, name, precision):
    from polygraphy.tools import main

    model = load_model(exported / name / "1" / "model.onnx")
    path, folded = tmp_path / "graph.onnx", tmp_path / "folded.onnx"
    save_graph(convert_half(model) if precision == "fp16" else model, path)
    assert main(["surgeon", "sanitize", str(path), "--fold-constants", "-o", str(folded)]) == 0
    assert main(["inspect", "model", str(folded)]) == 0
    onnx.checker.check_model(onnx.load(folded), full_check=True)


@pytest.mark.skipif(find_device() is not None, reason="there is a GPU here")
def test_without_a_gpu_one_line_says_what_to_run_where(exported, run_cli):
    before = hash_tree(exported)
    code, said, told = run_cli("plans", exported, "m")
    assert (code, said, told.count("\n")) == (2, "", 1)
    assert f"DIFFENSE_REPOSITORY={exported} docker compose" in told
    assert "run --rm plans m" in told
    assert hash_tree(exported) == before
    code, _, told = run_cli("plans", exported, "nobody")
    assert code == 2 and f"no export for a model 'nobody'; choose from {', '.join(sorted(FORMS))}" in told


@pytest.mark.gpu
@pytest.mark.skipif(find_device() is None, reason="no NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu_plans_agree_with_onnxruntime(repository, run_cli, precision):
    pytest.importorskip("tensorrt")
    for model in FORMS:
        code, said, told = run_cli("plans", repository, model, "--precision", precision)
        assert code == 0, told
        assert f"{precision}, differs from onnxruntime by" in said
