import os
import re
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_server import run_http
from diffense import health
from diffense.backends import (
    assemble_backends,
    find_server,
    server_environment,
)
from diffense.errors import ServeError
from diffense.ports import choose_ports
from diffense.serve import ONE_POOL, TritonServer
from diffense.serverlog import STARVED_REASON, explain_log
from repositories import write_plain_model, write_verdict_model

RUN = "import sys; from pathlib import Path; from diffense.serve import TritonServer\n"
PATIENCE_S = 30.0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    end = time.monotonic() + PATIENCE_S
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not is_running(pid)


def find_children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here", encoding="utf-8")
    with pytest.raises(ServeError, match="holds no model"):
        TritonServer(tmp_path).start()


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} .*in use"):
            TritonServer(tmp_path, grpc_port=port, model_control="explicit").start()


def test_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="nothing is no folder"):
        TritonServer(tmp_path / "nothing").start()


@pytest.mark.parametrize(
    ("line", "explanation"),
    [
        (
            "E 1 model_lifecycle.cc:642] \"failed to load 'prod' version 1: Internal: TritonModelException: 'logits' is"
            ' [4] in the graph, not [5]\\n\\nAt:\\n  /srv/backends/onnxruntime/model.py(65): check\\n"',
            "model prod does not load: 'logits' is [4] in the graph, not [5]",
        ),
        (
            'E 1 model_repository_manager.cc:703] "Invalid argument: ensemble x contains models that are not available'
            ' or ambiguous: y"',
            "model x does not load: contains models that are not available or ambiguous: y",
        ),
        ("error: creating server: Internal - out of things", "Internal - out of things"),
        ("Signal (11) received.", "Signal (11) received"),
        ("  what():  boost::interprocess::lock_exception", STARVED_REASON),
        ('2026-01-01T00:00:00Z E 4679 server.cc:241] "CudaDriverHelper has not been initialized."', None),
        ("x E 1 e.cc:1] unable to create stream for m: CUDA driver version is insufficient for CUDA runtime version", None),
    ],
)
def test_log_is_explained(line: str, explanation: str | None) -> None:
    assert explain_log(["2026 I 1 server.cc:1] starting", line]) == explanation


def test_unknown_config_field_is_named() -> None:
    lines = [
        "[libprotobuf ERROR /b/text_format.cc:337] Error parsing text-format inference.ModelConfig: 13:4: Message type "
        '"inference.ModelConfig" has no field named "foo".',
        "E 1 m.cc:1] \"Poll failed for model directory 'prod': failed to read text proto from /r/prod/config.pbtxt\"",
    ]
    assert 'no field named "foo"' in (explain_log(lines) or "")


@given(st.lists(st.text(max_size=80), max_size=20))
def test_any_log_gives_one_line_or_nothing(lines: list[str]) -> None:
    explanation = explain_log(line.replace("\n", " ") for line in lines)
    assert explanation is None or "\n" not in explanation


@pytest.mark.server
@pytest.mark.usefixtures("stand_in")
def test_bad_config_is_explained_in_one_line(tmp_path: Path) -> None:
    repository, log = tmp_path / "repository", tmp_path / "triton.log"
    write_plain_model(repository, "good")
    write_plain_model(repository, "broken", classes=4)
    with pytest.raises(ServeError) as caught:
        TritonServer(repository, log=log).start()
    message = str(caught.value)
    assert message.startswith("model broken does not load: 'logits' is [3] in the graph, not [4]")
    assert str(log) in message
    assert "\n" not in message
    assert "good" not in message
    assert "failed to load 'broken'" in log.read_text()


@pytest.mark.server
@pytest.mark.usefixtures("stand_in")
def test_server_stops_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    write_plain_model(tmp_path, "plain")
    others = {path.name.rsplit("_", 1)[0] for path in Path("/dev", "shm").glob(f"*_diffense_{os.getpid()}_*")}
    server = TritonServer(tmp_path)
    server.start()
    pid, http, log = server.pid, server.endpoints.http, server.log
    children = find_children(pid)
    (prefix,) = {path.name.rsplit("_", 1)[0] for path in Path("/dev", "shm").glob(f"*_diffense_{os.getpid()}_*")} - others
    assert server.check() == ["plain"]
    assert children, "the stand-in has a process of its own"
    assert server.stop() == 0
    assert server.stop() == 0, "a second stop does nothing"
    assert not health.is_ready(http)
    assert all(wait_until_gone(process) for process in (pid, *children))
    assert not list(Path("/dev", "shm").glob(f"{prefix}*"))
    assert log is not None
    assert not log.exists()
    with pytest.raises(ServeError, match="not running"):
        _ = server.endpoints


@pytest.mark.parametrize("body", [b"<html>", b'{"a": 1}', b"[1]", b'[{"state": "READY"}]'])
def test_a_server_that_is_no_triton_is_unhealthy_in_one_line(body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with run_http(Handler) as address, pytest.raises(ServeError, match="is this a Triton server"):
        health.check_server(address)
    with pytest.raises(ServeError, match="localhost:abc is no address"):
        health.check_server("localhost:abc")


@pytest.mark.server
def test_killed_model_process_looks_ready_and_fails_the_check(tmp_path: Path) -> None:
    write_verdict_model(tmp_path / "repository", "digits_guarded", flagged=0)
    server = TritonServer(tmp_path / "repository", grace_s=1, log=tmp_path / "log")
    server.start()
    try:
        assert server.check() == ["digits_guarded"]
        for child in find_children(server.pid):
            os.kill(child, signal.SIGKILL)
        assert health.is_ready(server.endpoints.http)
        with pytest.raises(ServeError, match=r"digits_guarded does not answer: .*not healthy"):
            server.check()
        command = [sys.executable, "-m", "diffense.health", server.endpoints.http]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 1
        assert "unhealthy: digits_guarded" in answer.stderr
    finally:
        server.stop()


@pytest.mark.server
def test_a_killed_gateway_fails_the_check_and_one_that_gives_no_verdict_does_not(tmp_path: Path) -> None:
    write_verdict_model(tmp_path / "repository", "digits_guarded", flagged=0)
    write_verdict_model(tmp_path / "repository", "digits_gateway", flagged=2)
    server = TritonServer(tmp_path / "repository", grace_s=1, log=tmp_path / "log")
    server.start()
    try:
        assert server.check() == ["digits_gateway", "digits_guarded"]
        (gateway,) = (
            child for child in find_children(server.pid) if b"digits_gateway" in Path(f"/proc/{child}/cmdline").read_bytes()
        )
        os.kill(gateway, signal.SIGKILL)
        with pytest.raises(ServeError, match=r"digits_gateway does not answer: .*not healthy"):
            server.check()
    finally:
        server.stop()


@pytest.mark.server
@pytest.mark.usefixtures("stand_in")
def test_a_model_that_was_unloaded_on_purpose_is_not_missed(tmp_path: Path) -> None:
    write_plain_model(tmp_path, "plain")
    write_verdict_model(tmp_path, "digits_guarded", flagged=0)
    server = TritonServer(tmp_path, model_control="explicit", extra=["--load-model=*"])
    with server:
        assert server.check() == ["digits_guarded"]
        http = server.endpoints.http
        assert health.ask(http, "POST", "/v2/repository/models/digits_guarded/unload", b"{}", timeout_s=10).status == 200
        assert server.check() == ["plain"]


def test_a_folder_that_triton_would_take_for_a_model_is_named(tmp_path: Path) -> None:
    write_plain_model(tmp_path, "plain")
    (tmp_path / ".diffense-stage-x").mkdir()
    with pytest.raises(ServeError, match=r"\.diffense-stage-x for a model.* move it out"):
        TritonServer(tmp_path).start()


@pytest.mark.server
def test_guard_that_does_not_score_fails_the_start(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "repository", "digits")
    write_verdict_model(tmp_path / "repository", "digits_guarded", flagged=2)
    with pytest.raises(ServeError, match="digits_guarded answers, but its guard does not score"):
        TritonServer(tmp_path / "repository", log=tmp_path / "log").start()


@pytest.mark.server
def test_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "repository", "plain")
    code = f"{RUN}s = TritonServer(Path(sys.argv[1])); s.start(); print(s.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "repository")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # a killed process cannot remove its folder
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    assert wait_until_gone(pid)


@pytest.mark.server
def test_server_on_path_comes_first_and_keeps_its_own_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in NVIDIA's containers, where the program knows its backends; here it is the wheel's behind a script.
    wheel = find_server("wheel")
    options = " ".join(assemble_backends(wheel, tmp_path / "backends"))
    libraries = server_environment(wheel)["LD_LIBRARY_PATH"]
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >{tmp_path}/given\nLD_LIBRARY_PATH={libraries} exec {wheel.binary} {options} $*\n")
    program.chmod(0o755)
    write_plain_model(tmp_path / "repository", "plain")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with TritonServer(tmp_path / "repository") as server:
        assert server.files is not None
        assert (server.files.kind, server.files.binary) == ("native", program)
        assert ONE_POOL in (tmp_path / "given").read_text().split(), (
            "graphs of a server with its own backend share their threads"
        )
        assert server.check() == ["plain"]
        assert server.log is not None
        assert str(tmp_path / "backends" / "onnxruntime") in server.log.read_text()


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_serves_and_stops_with_0(tmp_path: Path, number: signal.Signals) -> None:
    write_plain_model(tmp_path / "repository", "plain")
    ports = [str(port) for port in choose_ports("127.0.0.1", [0, 0, 0])]
    options = ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]
    command = [sys.executable, "-m", "diffense", "serve", str(tmp_path / "repository"), *options]
    # A shell starts the background jobs of a script with SIGINT ignored; the command ends all the same.
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with subprocess.Popen(ignoring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if line.startswith("ready"):
                break
        assert f"HTTP    127.0.0.1:{ports[0]}\n" in shown
        assert health.check_server(f"127.0.0.1:{ports[0]}") == ["plain"]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ("stand-in" in errors) == (find_server().onnxruntime_backend == "stand-in")
    assert "Traceback" not in errors


@pytest.mark.server
def test_command_explains_a_bad_config_without_a_traceback(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "repository", "broken", classes=4)
    options = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--log", str(tmp_path / "log")]
    command = [sys.executable, "-m", "diffense", "serve", str(tmp_path / "repository"), *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("diffense:")]
    assert "model broken does not load" in line
    assert "Traceback" not in answer.stderr


@pytest.mark.server
def test_the_log_that_an_error_names_is_there(tmp_path: Path) -> None:
    write_plain_model(tmp_path / "repository", "broken", classes=4)
    options = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "diffense", "serve", str(tmp_path / "repository"), *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": str(tmp_path)})
    found = re.search(r"\(log: (.*)\)", answer.stderr.replace("\n", ""))
    assert found is not None
    assert "failed to load 'broken'" in Path(found.group(1)).read_text()


@pytest.mark.server
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    write_plain_model(tmp_path, "plain")
    with TritonServer(tmp_path, log=Path("/dev/full"), extra=["--log-verbose=1"]) as server:
        for _ in range(30):  # some hundred kilobytes of log, more than a pipe holds
            assert server.check() == ["plain"]


@pytest.mark.parametrize("name", ["two words", "a;b", "$(touch x)", "caf\u00e9", "a'b"])
def test_a_repository_whose_path_a_shell_would_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ServeError, match="shell"):
        TritonServer(tmp_path / name).start()
