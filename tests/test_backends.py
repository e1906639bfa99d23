"""What a server needs before it starts: its files, this package, free ports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffense.backends import (
    NATIVE_LIBRARY,
    NATIVE_SETTING,
    assemble_backends,
    check_numpy,
    check_package,
    find_server,
    server_environment,
)
from diffense.errors import ServeError
from diffense.ports import choose_ports
from diffense.templates import find_templates

COMPILE = Path(__file__).parents[1] / "benchmarks" / "serving" / "get_onnxruntime_backend.sh"


@pytest.mark.parametrize("version", ["2.0.0", "2.4.6", "3.0.0rc1"])
def test_numpy_2_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(ServeError, match=rf"numpy {version}.*empty outputs.*numpy<2"):
        check_numpy(version)


def test_numpy_1_is_taken() -> None:
    check_numpy("1.26.4")


def test_templates_have_the_stand_in() -> None:
    assert "stand-in" in (find_templates() / "onnxruntime_standin" / "model.py").read_text()


def test_a_compiled_onnxruntime_backend_takes_the_place_of_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NATIVE_SETTING, raising=False)
    assert find_server("wheel").onnxruntime_backend == "stand-in"
    monkeypatch.setenv(NATIVE_SETTING, str(tmp_path / "compiled"))
    with pytest.raises(ServeError, match=rf"{NATIVE_SETTING}=.*compiled: no {NATIVE_LIBRARY} there; unset it"):
        find_server("wheel")
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / NATIVE_LIBRARY).touch()
    files = find_server("wheel")
    assert files.onnxruntime_backend == "C++"
    assemble_backends(files, tmp_path / "backends")
    assert [path.name for path in (tmp_path / "backends" / "onnxruntime").iterdir()] == [NATIVE_LIBRARY]


@pytest.mark.parametrize(("arguments", "settings", "said"), [
    ([], {}, "usage: .*get_onnxruntime_backend.sh DIR"),
    (["folder"], {"PYTHON": "no-such-python"}, "no-such-python has no onnxruntime|apt install"),
])  # fmt: skip
def test_the_script_that_compiles_the_backend_says_what_is_missing(
    tmp_path: Path, arguments: list[str], settings: dict[str, str], said: str
) -> None:
    command = ["bash", str(COMPILE), *(str(tmp_path / name) for name in arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert re.match(f"get_onnxruntime_backend: .*({said})", line)


def test_server_of_a_wrong_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "tritonserver", tmp_path):
        with pytest.raises(ServeError, match="no program"):
            find_server(str(path))


def test_environment_puts_this_python_first_and_keeps_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    environment = server_environment(find_server("wheel"))
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    assert server_environment(find_server("wheel"))["OPENBLAS_NUM_THREADS"] == "4"
    assert any("nvidia_pytriton.libs" in part for part in environment["LD_LIBRARY_PATH"].split(os.pathsep))


def test_a_package_that_served_models_would_not_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_package(find_server("wheel"))
    monkeypatch.setattr("diffense.__file__", "/elsewhere/diffense/__init__.py")
    with pytest.raises(ServeError, match=r"and not /elsewhere/diffense/__init__\.py"):
        check_package(find_server("wheel"))


def test_a_port_wanted_twice_is_refused() -> None:
    with pytest.raises(ServeError, match=r"port 31999 of 127\.0\.0\.1 is wanted twice"):
        choose_ports("127.0.0.1", [31_999, 0, 31_999])


def test_drawn_ports_differ_from_wanted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffense.ports.FREE_PORTS", range(31_996, 31_999))
    assert sorted(choose_ports("127.0.0.1", [0, 31_997, 0])) == [31_996, 31_997, 31_998]


def test_free_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = choose_ports("127.0.0.1", [0, 0, 0])
    assert len(set(ports)) == 3
    assert max(ports) < 32_000
