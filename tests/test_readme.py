"""The README's commands and snippets are run as they stand, on a small classifier; only the ports are free ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo_table import RESULTS, render_table
from benchmarks.records import DETECTION, SERVING, read_rows
from benchmarks.serving.table import render_summary as render_serving
from benchmarks.tables import render_summary
from diffense.ports import choose_ports
from shapes import draw_shapes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command, folder, expected=(0,)):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, shell=True)  # noqa: S602
    assert done.returncode in expected, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def save_images(folder, count, seed):
    folder.mkdir()
    for i, image in enumerate(draw_shapes(count, seed)[0]):
        Image.fromarray(image).save(folder / f"{i:04}.png")


@pytest.mark.server
def test_guard_your_own_model_and_ask_it(small_target, tmp_path):
    shutil.copy(small_target, tmp_path / "classifier.onnx")
    save_images(tmp_path / "clean", 250, seed=11)
    save_images(tmp_path / "suspects", 12, seed=12)
    guard_it, scan_it, bench_it = blocks("bash")
    assert len(guard_it.strip().splitlines()) < 10
    *commands, serve = guard_it.strip().splitlines()
    for command in commands:
        output = run(command, tmp_path)
        if "score" in command:
            rows = [json.loads(line) for line in output.splitlines()]
            assert [set(row) for row in rows] == [{"index", "path", "label", "score", "p_value", "flagged"}] * 12
    ports = choose_ports("127.0.0.1", (0, 0, 0))
    options = [f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    with subprocess.Popen(
        [*serve.split(), *options], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            said = ""
            while f"127.0.0.1:{ports[1]}" not in said:
                line = server.stdout.readline()
                assert line, said
                said += line
            snippet, stream_it = blocks("python")
            (tmp_path / "ask.py").write_text(snippet.replace("8001", str(ports[1])))
            answers = run(f"{sys.executable} ask.py", tmp_path).splitlines()
            assert len(answers) == 12 and all(re.search(r"\.png 0\.\d{3}|\.png 1\.000", line) for line in answers)
            (tmp_path / "stream.py").write_text(stream_it.replace("8001", str(ports[1])))
            labels, flagged = run(f"{sys.executable} stream.py", tmp_path).splitlines()
            assert len(re.findall(r"\d+", labels)) == len(re.findall(r"\d", flagged)) == 12
            run(scan_it.strip().replace("8001", str(ports[1])), tmp_path, expected=(0, 1))
            assert len((tmp_path / "verdicts.csv").read_text().splitlines()) == 13
            run(f"{bench_it.strip().replace('8001', str(ports[1]))} --seconds 0.2 --rounds 1", tmp_path)
            assert len(json.loads((tmp_path / "bench.json").read_text())) == 4
        finally:
            server.send_signal(signal.SIGINT)
            server.stdout.read()
        assert server.wait(60) == 0


def test_the_figures_are_those_of_the_results():
    assert render_table(json.loads(RESULTS.read_text(encoding="utf-8"))) in README


def test_the_detection_table_is_that_of_the_results():
    assert render_summary(read_rows(DETECTION)) in README


def test_the_serving_table_is_that_of_the_results():
    assert "\n".join(render_serving(read_rows(SERVING))) in README


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:docs|benchmarks|docker)/[^` ]*)`", README):
        assert (ROOT / path).exists(), path


def test_every_command_is_in_the_readme_or_helps_itself():
    from diffense.cli import COMMANDS

    for name in COMMANDS:
        assert run(f"diffense {name} --help", ROOT).count("Usage") == 1
    assert all(
        f"diffense {name}" in README
        for name in (
            "fit",
            "score",
            "calibrate",
            "inspect",
            "export",
            "serve",
            "scan",
            "demo",
            "doctor",
            "evaluate",
            "bench",
            "plans",
        )
    )
