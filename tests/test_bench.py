"""The bench on a made-up image set: cache, figures, records. No shared data needed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench_world import SPEC, make_split
from benchmarks import datasets, demo_table, figures, matrix, peer_tables, records, shift, tables, targets
from benchmarks.cache import read_entry, write_entry
from benchmarks.evaluation import evaluate_cell
from benchmarks.metrics import measure_detection
from benchmarks.training import predict
from diffense.errors import OptionError

pytestmark = pytest.mark.usefixtures("float32")


def test_detection_figures_by_hand():
    calibration = np.arange(1, 100, dtype=np.float64)  # 99 scores: p of s is (1 + #{>= s}) / 100
    clean, right = np.array([0.0, 99.5, 96.0, 50.0]), np.array([True, False, True, True])
    triggered, reached = np.array([200.0, 95.5, 10.0, 300.0]), np.array([True, True, True, False])
    found = measure_detection(calibration, clean, right, triggered, reached)
    assert found.fpr_at_1 == 0.25 and found.fpr_at_5 == 0.5
    assert found.tpr_at_fpr1 == pytest.approx(1 / 3) and found.tpr_at_fpr5 == pytest.approx(2 / 3)
    assert found.asr_after_fpr1 == 0.5 and found.asr_after_fpr5 == 0.25  # over all four triggered
    assert found.auroc == pytest.approx((4 + 2 + 1) / 12) and found.auroc_right == pytest.approx((3 + 2 + 1) / 9)


def test_a_trigger_that_never_works_has_no_detection_rate_and_can_be_recorded(bench):
    row = evaluate_cell(targets.make_cell("mnist", "none"), peers=["ratio"])
    assert row["auroc"] is row["tpr_at_fpr1"] is row["asr_before"] is row["peers"]["ratio"]["asr_after_fpr5"] is None
    assert 0 <= row["fpr_at_5"] < 0.2
    records.write_detection(row | {"attack": "htba", "asr_before": 0.0})
    (stored,) = records.read_rows(records.DETECTION)
    assert "| – (–) |" in tables.render_page([stored], [], []) and "| – | – | – |" in tables.render_summary([stored])


def test_peers_are_kept_for_the_same_target_alone(bench):
    row = evaluate_cell(targets.make_cell("mnist", "none"), peers=["ratio"]) | {"commit": "a"}
    records.write_detection(row)
    records.write_detection(row | {"commit": "b", "peers": {}})
    assert set(records.read_rows(records.DETECTION)[0]["peers"]) - {"closed_form"} == {"ratio"}
    records.write_detection(row | {"target_sha256": "another", "peers": {}})
    assert records.read_rows(records.DETECTION)[0]["peers"] == {}


def test_a_cell_is_trained_once_evaluated_and_recorded(bench):
    lines: list[str] = []
    cell = targets.make_cell("mnist", "badnets")
    row = evaluate_cell(cell, peers=["ratio", "scaleup"], progress=lines.append)
    assert row["clean_accuracy"] > 0.9 and row["asr_before"] > 0.9 and row["auroc"] > 0.9
    assert row["asr_after_fpr5"] <= row["asr_after_fpr1"] <= row["asr_before"]
    assert row["n_clean_fit"] + row["n_clean_calibration"] == 500 and row["n_clean_eval"] == 300
    assert 0.0 < row["fit_s"] <= row["cell_s"]
    assert row["peers"]["scaleup"]["target_forwards"] == 5 and row["peers"]["ratio"]["target_forwards"] == 1
    trained = [line for line in lines if line.startswith("epoch")]
    assert len(trained) == SPEC.epochs
    records.write_detection(row)
    assert matrix.find_missing([cell], ["ratio"]) == [] and matrix.find_missing([cell], ["ted"]) == [(cell, ["ted"])]
    again = evaluate_cell(cell, progress=lines.append)
    assert [line for line in lines if line.startswith("epoch")] == trained, "trained again"
    assert again["auroc"] == row["auroc"]
    records.write_detection(again)
    (stored,) = records.read_rows(records.DETECTION)
    assert set(stored["peers"]) - {"closed_form"} == {"ratio", "scaleup"}, "a run without peers forgot them"
    page = tables.render_page([stored], [], [])
    assert "Shapes, BadNets" in page and f"{stored['auroc']:.4f}" in page and "1 of 30 cells" in page
    assert f"{stored['auroc']:.4f}" in tables.render_summary([stored])
    more = tables.render_page([stored, stored | {"seed": 1}, stored | {"target": "convnext"}], [], [])
    first, others = more.split("## Other networks, other target seeds")
    assert "1 of 30 cells" in first and first.count("Shapes, BadNets") == page.split("## Turned")[0].count("Shapes, BadNets")
    assert "| small_cnn, seed 1 |" in others and "| convnext |" in others and "Target seed 0," in first
    second = stored | {"again": 1}
    records.write_detection(second)
    assert records.read_rows(records.DETECTION) == [stored] and records.read_rows(records.VARIANTS) == [second]
    assert "Shapes, BadNets, trained again |" in tables.render_page([stored], [second], [])


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), Path.unlink])
def test_a_damaged_target_is_noticed_and_made_again(bench, spoil):
    lines: list[str] = []
    cell = targets.make_cell("mnist", "none")
    first = targets.get_target(cell, lines.append)
    spoil(first.path)
    second = targets.get_target(cell, lines.append)
    assert any("made again" in line for line in lines) and second.path.is_file()
    assert second.accuracy == first.accuracy
    images = make_split().evaluation.pixels
    np.testing.assert_array_equal(predict(second.network, images), predict(first.network, images))


def test_hidden_triggers_of_every_seed_alter_the_same_clean_network(bench):
    first, second = (targets.get_target(targets.make_cell("mnist", "htba", None, seed), print) for seed in (0, 1))
    assert (first.attack.source, first.attack.target) != (second.attack.source, second.attack.target)
    bodies = [{k: v for k, v in t.network.state_dict().items() if not k.startswith("head")} for t in (first, second)]
    assert bodies[0] and all(bool((bodies[0][k] == bodies[1][k]).all()) for k in bodies[0])


def test_a_broken_off_entry_leaves_the_old_one(tmp_path):
    def fill(work: Path) -> dict[str, int]:
        (work / "a").write_text("1")
        return {"x": 1}

    def fail(work: Path) -> dict[str, int]:
        raise KeyboardInterrupt

    write_entry(tmp_path / "e", {"r": 1}, fill)
    with pytest.raises(KeyboardInterrupt):
        write_entry(tmp_path / "e", {"r": 1}, fail)
    assert read_entry(tmp_path / "e", {"r": 1}, print) == {"x": 1}
    assert read_entry(tmp_path / "e", {"r": 2}, print) is None
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    (tmp_path / "e" / "meta.json").write_text("[]")
    assert read_entry(tmp_path / "e", {"r": 1}, print) is None


def test_a_peer_that_is_not_defined_for_a_network_says_why_and_stops_nobody(bench, monkeypatch):
    monkeypatch.setitem(datasets.SPECS, "mnist", replace(SPEC, network="convnext", epochs=1))
    row = evaluate_cell(targets.make_cell("mnist", "none"), peers=["ibdpsc", "ratio"])
    assert row["peers"]["ibdpsc"]["auroc"] is None and "batch norm" in row["peers"]["ibdpsc"]["reason"].replace("-", " ")
    assert row["peers"]["ratio"]["fpr_at_5"] is not None
    assert "| ibdpsc | – | – |" in tables.render_page([row | {"attack": "htba", "asr_before": 0.0}], [], [])


def test_shifted_images_raise_no_error_and_the_plain_ones_nothing(bench):
    rows = {row["shift"]: row for row in shift.measure_shifts(targets.make_cell("mnist", "none"), print)}
    assert set(rows) == set(shift.SHIFTS)
    plain = evaluate_cell(targets.make_cell("mnist", "none"))
    assert rows["none"]["fpr_at_5"] == plain["fpr_at_5"] and rows["none"]["accuracy"] == plain["clean_accuracy"]
    assert "| Shapes, unpoisoned | JPEG 50 |" in "\n".join(tables.render_shifts(list(rows.values())))


def test_the_closed_form_is_the_guard_itself_where_its_network_stayed_off_and_is_no_peer():
    peer = {"auroc": 0.9, "tpr_at_fpr5": 0.5}
    row = {"auroc": 0.95, "tpr_at_fpr5": 0.6, "peers": {"ratio": peer}}
    assert figures.find_figure(row, "closed_form", "auroc") == 0.95
    with_network = row | {"auroc": 0.99, "peers": {"ratio": peer, "closed_form": {"auroc": 0.97, "tpr_at_fpr5": 0.7}}}
    assert figures.find_figure(with_network, "closed_form", "auroc") == 0.97
    assert figures.find_figure(row, "ted", "auroc") is None
    assert figures.list_peers([row, with_network]) == ["closed_form", "ratio"]


def test_published_figures_stand_beside_ours_of_both_kinds_of_target():
    shared = {"attack": "badnets", "asr_before": 0.99}
    row = make_row(**shared, auroc=0.9, peers={"ted": {"auroc": 0.75, "revision": 1}})
    plain = make_row(
        **shared, target="narrow_resnet18", clean_accuracy=0.9, auroc=0.8, peers={"ted": {"auroc": 0.65, "revision": 1}}
    )
    assert peer_tables.render_published([row, plain])[-1] == "| CIFAR-10, BadNets | ted | 0.96 | 0.75 | 0.65 |"
    assert peer_tables.render_published([row])[-1] == "| CIFAR-10, BadNets | ted | 0.96 | 0.75 | – |"
    assert peer_tables.render_published([plain]) == [] == peer_tables.render_plain([row])
    assert "| CIFAR-10, BadNets (weak target) | 0.8000 | 0.6500 |" in peer_tables.render_plain([row, plain])


@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_keep_shape_and_do_what_they_say(channels):
    images = np.full((2, 8, 8, channels), 100, np.uint8)
    shifted = {name: change(images) for name, change in shift.SHIFTS.items()}
    assert all(found.shape == images.shape and found.dtype == np.uint8 for found in shifted.values())
    assert (shifted["brightness +25 %"] == 125).all() and (shifted["brightness -10 %"] == 90).all()
    assert 3 < shifted["noise 5/255"].std() < 7 and (shifted["JPEG 95"] == 100).all()


def test_unknown_names_list_the_known_ones(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"'cifar'.*cifar10"):
        targets.make_cell("cifar", "badnets")
    with pytest.raises(OptionError, match=r"'bad'.*badnets"):
        targets.make_cell("mnist", "bad")
    with pytest.raises(OptionError, match=r"'vit'.*convnext"):
        targets.make_cell("mnist", "badnets", "vit")
    with pytest.raises(SystemExit, match=r"'bad'.*badnets"):
        matrix.main(["--attacks", "wanet,bad"])
    with pytest.raises(OptionError, match=r"'x'.*strip"):
        matrix.choose_peers("ratio,x")
    monkeypatch.setenv("DIFFENSE_SHARED", str(tmp_path))
    datasets.load_split.cache_clear()
    datasets._load_module.cache_clear()
    with pytest.raises(OptionError, match="DIFFENSE_SHARED"):
        datasets.load_split("mnist")


def test_records_that_are_no_list_of_rows_are_refused(tmp_path):
    for text in ("{", '{"a": 1}', '[{"dataset": "x"}]', "[1]"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(OptionError, match=r"r\.json"):
            records.read_rows(tmp_path / "r.json")


def test_runs_that_write_at_the_same_time_lose_no_row(tmp_path):
    path = tmp_path / "rows.json"
    key = dict.fromkeys(records.KEYS, "x")

    def write(seed):
        for guard_seed in range(10):
            records.write_row(key | {"seed": seed, "guard_seed": guard_seed}, path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(records.read_rows(path)) == 40


def test_runs_that_measure_other_peers_of_a_cell_at_the_same_time_lose_none(bench):
    row = dict.fromkeys(records.KEYS, "x") | {"guard_seed": 0, "clean_per_class": None, "target_sha256": "a"}

    def write(peer):
        records.write_detection(row | {"peers": {str(peer): {"auroc": 0.5}}})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    (stored,) = records.read_rows(records.DETECTION)
    assert set(stored["peers"]) == {str(peer) for peer in range(40)}


def make_row(**changes):
    row = {
        "dataset": "cifar10", "attack": "wanet", "target": "staged_resnet", "seed": 0, "guard_seed": 0, "clean_per_class": None,
        "target_sha256": "a", "clean_accuracy": 0.92, "asr_before": 0.98, "auroc": 0.99, "tpr_at_fpr5": 0.9,
        "fpr_at_1": 0.01, "fpr_at_5": 0.05,
        "network": {"used": True}, "commit": "b6940aa", "machine": "m", "peers": {},
    }  # fmt: skip
    row |= changes
    cell = targets.Cell(row["dataset"], row["attack"], row["target"], row["seed"])
    return {"recipe": cell.recipe_hash} | row


def test_rows_of_another_target_are_not_shown_as_seeds_of_the_cell():
    few = make_row(clean_per_class=5, guard_seed=1)
    lines = tables.render_variants([few, few | {"target_sha256": "b", "clean_accuracy": 0.9192}], [make_row()])[2:]
    assert lines[0].startswith("| CIFAR-10, WaNet | 0.9200 / 0.980 | 5 | 1 | 0.9900 |")
    assert lines[1].startswith("| CIFAR-10, WaNet | 0.9192 / 0.980, another | 5 | 1 |")


def test_what_an_older_revision_of_a_peer_gave_is_marked_counts_for_nothing_and_is_measured_again(monkeypatch):
    old, new = {"auroc": 0.999}, {"auroc": 0.5, "revision": 1}
    rows = [make_row(peers={"ted": old, "knn": {"auroc": 0.7}}), make_row(attack="idba", peers={"ted": new})]
    page = peer_tables.render_peers(rows, "auroc")
    assert page[0] == "| cell | Diffense | knn | ted |"
    assert "| CIFAR-10, WaNet | 0.9900 | 0.7000 | 0.9990† |" in page
    assert page[-2] == "| mean | 0.9900 | 0.7000 (1 cells) | 0.5000 (1 cells) |"
    assert "0.96 | 1.00 |" not in "\n".join(peer_tables.render_published(rows))
    assert "| ted (0.9990†) |" in tables.render_summary([row | {"asr_after_fpr5": 0.0, "tpr_at_fpr1": 1.0} for row in rows])
    monkeypatch.setattr(matrix, "read_rows", lambda path: rows)
    cells = [targets.make_cell("cifar10", attack) for attack in ("wanet", "idba")]
    assert matrix.find_missing(cells, ["ted"]) == [(cells[0], ["ted"])]


def test_a_cell_whose_target_is_made_otherwise_now_is_marked_and_measured_again(monkeypatch):
    old, new = make_row(recipe="0" * 12), make_row(attack="idba")
    unknown = {name: value for name, value in make_row(attack="issba").items() if name != "recipe"}
    assert [tables.name_cell(row) for row in (old, unknown, new)] == ["CIFAR-10, WaNet‡", "CIFAR-10, ISSBA‡", "CIFAR-10, IDBA"]
    monkeypatch.setattr(matrix, "read_rows", lambda path: [old, new, unknown])
    cells = [targets.make_cell("cifar10", attack) for attack in ("wanet", "idba", "issba")]
    assert [cell.attack for cell, _ in matrix.find_missing(cells, [])] == ["wanet", "issba"]
    monkeypatch.setattr(targets, "RECIPE", targets.RECIPE + 1)
    assert [cell.attack for cell, _ in matrix.find_missing(cells, [])] == ["wanet", "idba", "issba"]


def test_pairs_of_hidden_triggers_have_one_clean_network_and_a_mean():
    row = make_row(attack="htba", n_triggered=100, asr_before=0.2, auroc=0.9)
    again = row | {"again": 1, "auroc": 0.8}
    others = [row | {"seed": seed, "auroc": auroc, "peers": {"lda": {"auroc": 0.5}}} for seed, auroc in ((2, 0.6), (1, 0.7))]
    narrow = row | {"target": "narrow_resnet18", "seed": 3}
    assert [pair["auroc"] for pair in peer_tables.find_pairs([row, *others, narrow, make_row()], [again])] == [0.8, 0.7, 0.6]
    again |= {"peers": {"lda": {"auroc": 0.8}, "knn": {"auroc": 0.9}}}
    lines = peer_tables.render_pairs(peer_tables.find_pairs([row, *others], [again]))
    assert lines[-1] == "| CIFAR-10 | 3 | 0.7000 | – | 0.6000 |", "a mean over some of the pairs compares with nothing"
    assert "| CIFAR-10, HTBA, trained again | 0 | 0.9200 | 20 of 100 | – | 0.8000 | – |" in lines
    assert peer_tables.find_pairs([row, make_row(seed=1)], [again]) == peer_tables.render_pairs([]) == []


def test_the_page_tells_which_guards_are_of_an_older_method():
    new = make_row(network={"used": True, "left_out": 31})
    off = make_row(attack="htba", network={"used": False})
    usual = tables.describe_guards([new, off])
    assert "of all in" not in usual and "two draws" in usual and "hundredth" in usual
    rows = [new, make_row(attack="issba"), make_row(attack="idba"), off]
    assert tables.describe_guards(rows) == usual.replace(" (docs", "; of all in CIFAR-10, IDBA; CIFAR-10, ISSBA (docs")


def test_the_summary_tells_mean_and_worst_of_guard_closed_form_and_strongest_peer():
    peers = {"latent_all_doubt": {"auroc": 0.95}, "closed_form": {"auroc": 0.98}}
    rows = [make_row(peers=peers), make_row(auroc=0.97, peers={}), make_row(auroc=None)]
    assert tables.sum_up(rows) == (
        "AUROC, mean and worst of the 2 cells with figures: Diffense 0.98000, 0.9700; closed_form 0.97500, 0.9700; "
        "latent_all_doubt 0.95000, 0.9500. In the 2 without HTBA: Diffense 0.98000, 0.9700. "
        "Clean images flagged: 1.0% to 1.0% at alpha 1 % and 5.0% to 5.0% at alpha 5 %."
    )
    weak = [make_row(auroc=0.5, peers={"lda": {"auroc": 1.0}}, attack="htba"), make_row(peers={"lda": {"auroc": 0.9}})]
    said = tables.sum_up([*weak, make_row(attack="idba", peers={"lda": {"auroc": 0.8}, "ted": {"auroc": 0.9}}, fpr_at_5=0.08)])
    assert "In the 2 without HTBA: Diffense 0.99000, 0.9900; lda 0.85000, 0.8000. " in said, "ted lacks a cell"
    assert said.endswith("and 5.0% to 8.0% at alpha 5 %.")
    assert tables.sum_up([make_row(auroc=None)]) == "No cell has figures."


def test_images_that_reach_the_label_without_the_trigger_are_told_apart():
    row = make_row(asr_before=0.29, n_triggered=100, n_turned=11, auroc_turned=0.981, attack="htba", auroc=0.964)
    lines = tables.render_turned([row, make_row()])
    assert sum(line.startswith("| ") for line in lines) == 3  # head, rule and the one row that tells
    assert lines[-1].endswith("| 29 | 11 | 0.9640 | 0.9810 |")
    assert tables.render_turned([make_row()]) == []


def test_committed_results_have_the_keys_that_readers_expect():
    for row in records.read_rows(records.DETECTION):
        assert {"stand_in", "clean_accuracy", "asr_before", "asr_after_fpr1", "asr_after_fpr5", "auroc"} <= set(row)
        assert {
            "fpr_at_1",
            "target_sha256",
            "n_clean_fit",
            "n_triggered",
            "score_ms",
            "target_forwards",
            "commit",
            "machine",
        } <= set(row)
        assert len(row["target_sha256"]) == 64
        json.dumps(row, allow_nan=False)


def test_the_demonstrations_table_names_the_backend_that_served(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_table, "RESULTS", tmp_path / "demo.json")
    monkeypatch.setattr(demo_table, "describe_run", lambda: {"machine": "m", "backend": "C++", "commit": "c"})
    old = json.loads((Path(demo_table.__file__).parent / "results" / "demo.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(old))
    demo_table.record(tmp_path / "summary.json", 3)
    stored = json.loads((tmp_path / "demo.json").read_text())
    assert [(row["seed"], row["machine"], row["backend"], row["commit"]) for row in stored] == [(3, "m", "C++", "c")] * 2
    assert demo_table.render_table(stored).endswith("onnxruntime backend by Triton's own C++ code.")
    unrecorded = [{key: value for key, value in row.items() if key != "backend"} for row in stored]
    assert demo_table.render_table(unrecorded).endswith("onnxruntime backend by the Python stand-in.")
