"""Run a real Triton server as a child process: start, wait for a real inference, stop."""

import atexit
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self

from diffense import health
from diffense.backends import ServerFiles, assemble_backends, check_package, find_server, server_environment
from diffense.errors import ServeError
from diffense.ports import choose_ports
from diffense.serverlog import explain_log

__all__ = ["Endpoints", "ServerFiles", "TritonServer", "find_server"]

SHELL_SAFE: Final = re.compile(r"[\w/.@+,:=%-]+", re.ASCII)
POLL_S: Final = 0.1
KEPT_LINES: Final = 4000
LAST_LINES_S: Final = 2.0  # that the log's end may take to arrive after the server's
SHARED_MEMORY: Final = Path("/dev", "shm")
# The kernel ends the server when this process dies, however it dies; exec keeps that wish, fork does not.
LAUNCHER: Final = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
# Each graph has threads of its own otherwise, and those of the idle ones hold the cores for milliseconds (docs/decisions/0029).
ONE_POOL: Final = "--backend-config=onnxruntime,enable-global-threadpool=1"
_COUNT = itertools.count()


@dataclass(frozen=True)
class Endpoints:
    """Addresses (host:port) at which a server answers."""

    http: str
    grpc: str
    metrics: str


class TritonServer:
    """A Triton server on one model repository; a context manager that starts and stops it.

    Start it from a thread that lives as long as the server: the kernel ends the server with the thread that started it.

    Args:
        repository: the model repository.
        http_port: port of the HTTP endpoint, 0 for a free one; likewise ``grpc_port`` and ``metrics_port``.
        host: address to bind to; only this machine can reach the default.
        log: file for the server's log (None: a temporary file, kept only when something went wrong;
            ``Path("-")``: standard error).
        model_control: ``explicit`` loads models only when a client asks for it.
        extra: more options for the server.
        server: which server, see :func:`find_server`.
        grace_s: seconds that running requests get at the end before the server is killed.
        cache_mib: MiB of memory for the responses of models that let the server keep them; 0 for no cache.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        log: Path | None = None,
        model_control: Literal["none", "explicit"] = "none",
        extra: Sequence[str] = (),
        server: str = "auto",
        grace_s: int = 15,
        cache_mib: int = 0,
    ) -> None:
        self.repository = repository
        self.host = host
        self.model_control = model_control
        self.extra = tuple(extra)
        self.grace_s = grace_s
        self.cache_mib = cache_mib
        self.log = log
        self.files: ServerFiles | None = None
        self._temporary_log: Path | None = None
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._which = server
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoints: Endpoints | None = None
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        # Begins as the backend's own does: servers from 2.60 on keep clients out of regions that are called so.
        self._prefix = f"triton_python_backend_shm_region_diffense_{os.getpid()}_{next(_COUNT)}_"
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def endpoints(self) -> Endpoints:
        """Where the running server answers.

        Raises:
            ServeError: the server is not running.
        """
        if self._endpoints is None:
            raise ServeError("the server is not running; call start() first")
        return self._endpoints

    @property
    def pid(self) -> int:
        """Process id of the running server.

        Raises:
            ServeError: the server is not running.
        """
        if self._process is None:
            raise ServeError("the server is not running; call start() first")
        return self._process.pid

    def start(self, timeout_s: float = 120.0) -> Endpoints:
        """Start the server and wait until a real inference works.

        Raises:
            ServeError: no server, a port in use, a model that does not load, or no answer within ``timeout_s``; the
                message is one line that names the model and the log file.
        """
        if self._process is not None:
            raise ServeError("the server is already running")
        if not self.repository.is_dir():
            raise ServeError(f"{self.repository} is no folder; give the model repository that `diffense export` wrote")
        if not SHELL_SAFE.fullmatch(str(self.repository.resolve())):
            raise ServeError(
                f"{self.repository}: Triton's Python backend starts its processes through a shell that takes no such path; "
                "move the repository to one of ASCII letters, digits and / . _ - + @ , : = %"
            )
        if self.model_control == "none" and not any(entry.is_dir() for entry in self.repository.iterdir()):
            raise ServeError(f"{self.repository} holds no model; give the model repository that `diffense export` wrote")
        hidden = [entry for entry in self.repository.iterdir() if entry.name.startswith(".") and entry.is_dir()]
        if self.model_control == "none" and hidden:
            raise ServeError(
                f"Triton takes {hidden[0]} for a model and would not start; move it out of the repository (an export that is "
                "killed while it installs across file systems leaves such a folder)"
            )
        self.files = find_server(self._which)
        check_package(self.files)
        deadline = time.monotonic() + timeout_s
        try:
            self._launch(self.files)
            self._wait_ready(deadline, timeout_s)
            health.check_server(self.endpoints.http, max(1.0, deadline - time.monotonic()))
        except ServeError as error:
            self._end(keep_log=True)
            kept = "" if self.log is None or str(self.log) == "-" else f" (log: {self.log})"
            raise ServeError(f"{error}{kept}") from None
        except BaseException:
            self._end(keep_log=True)
            raise
        return self.endpoints

    def check(self, timeout_s: float = 30.0) -> list[str]:
        """Ask the guarded models for an inference; see :func:`diffense.health.check_server`."""
        return health.check_server(self.endpoints.http, timeout_s)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until the server ends; its exit code, or None when it still runs after ``timeout_s``."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def explain(self) -> str:
        """Say in one line why the server ended, as far as its log tells."""
        return self._read_reason() or "the server gives no reason"

    def stop(self) -> int:
        """Let running requests finish, end the server and remove what it left; 0 when it ended in order.

        A temporary log stays where the server had ended by itself. Calling it again, or before ``start``, does nothing.
        """
        return self._end(keep_log=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(keep_log=error is not None)

    def _launch(self, files: ServerFiles) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="diffense-serve-")
        backends = assemble_backends(files, Path(self._folder.name) / "backends")
        ports = choose_ports(self.host, self._wanted_ports)
        near = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared, not bound
        near = f"[{near}]" if ":" in near else near
        self._endpoints = Endpoints(*(f"{near}:{port}" for port in ports))
        services = ("http", "grpc", "metrics")
        command = [
            str(files.binary),
            f"--model-repository={self.repository.resolve()}",
            *backends,
            *(f"--{service}-address={self.host}" for service in services),
            *(f"--{service}-port={port}" for service, port in zip(services, ports, strict=True)),
            f"--model-control-mode={self.model_control}",
            f"--exit-timeout-secs={self.grace_s}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            *((ONE_POOL,) if files.onnxruntime_backend == "C++" else ()),
            "--log-format=ISO8601",
            *(() if _has_gpu() else ("--allow-gpu-metrics=false",)),
            *((f"--cache-config=local,size={self.cache_mib << 20}",) if self.cache_mib else ()),
            *self.extra,
        ]
        sink = self._open_log()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=server_environment(files),
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which then stops the server
        )
        atexit.register(self.stop)
        if self._process.stdout is None:
            raise ServeError("the server's log cannot be read")
        self._reader = threading.Thread(target=self._copy_log, args=(self._process.stdout, sink), daemon=True)
        self._reader.start()

    def _open_log(self) -> BinaryIO:
        if self.log is not None and str(self.log) == "-":
            return sys.stderr.buffer
        if self.log is None:
            handle, name = tempfile.mkstemp(prefix="diffense-triton-", suffix=".log")
            os.close(handle)
            self._temporary_log = self.log = Path(name)
        try:
            return self.log.open("wb")
        except OSError as error:
            raise ServeError(f"cannot write the log {self.log}: {error.strerror}") from None

    def _copy_log(self, source: BinaryIO, sink: BinaryIO) -> None:
        writable = True
        for line in source:
            self._lines.append(line.decode(errors="replace").rstrip("\n"))
            if writable:
                try:
                    sink.write(line)
                    sink.flush()
                except (OSError, ValueError):  # a full disk, a closed standard error: the log ends, the server must not
                    writable = False
        source.close()
        if sink is not sys.stderr.buffer:
            with contextlib.suppress(OSError):
                sink.close()

    def _read_reason(self) -> str | None:
        if self._reader is not None:
            self._reader.join(LAST_LINES_S)
        return explain_log(list(self._lines))  # a copy: a process that outlives the server may still write

    def _wait_ready(self, deadline: float, timeout_s: float) -> None:
        while time.monotonic() < deadline:
            code = self.wait(POLL_S)
            if code is not None:
                raise ServeError(self._read_reason() or f"the server ended with code {code} before it was ready")
            if health.is_ready(self.endpoints.http):
                return
        raise ServeError(f"the server was not ready within {timeout_s:g} s")

    def _end(self, *, keep_log: bool) -> int:
        process, self._process, self._endpoints = self._process, None, None
        code = 0
        if process is not None:
            keep_log = keep_log or process.poll() is not None
            code = _terminate(process, self.grace_s)
            atexit.unregister(self.stop)
            for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
                left.unlink(missing_ok=True)
        if self._reader is not None:
            self._reader.join(5.0)
            self._reader = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        if self._temporary_log is not None:
            if not keep_log and code == 0:
                self._temporary_log.unlink(missing_ok=True)
                self.log = None
            self._temporary_log = None  # what is kept now, and named in an error, stays
        return code


def _terminate(process: subprocess.Popen[bytes], grace_s: int) -> int:
    """End the process and its group; 0 when it left by itself with 0."""
    code = process.poll()
    if code is None:
        process.send_signal(signal.SIGTERM)
        try:
            # The server itself counts the grace; what comes on top is for unloading.
            code = process.wait(grace_s + 5)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
