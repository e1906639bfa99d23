"""A small HTTP server that speaks Triton's protocol to the clients, for what a real server cannot be made to do on purpose."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from client_repository import CLASSES, GUARD_ID, MAX_BATCH, SHAPE
from diffense import names

ANSWERS: Final = {names.SCORE: ("FP32", 0.25), names.P_VALUE: ("FP32", 0.75), names.FLAGGED: ("UINT8", names.PASSED)}
PREPROCESSING: Final = json.dumps({"size": SHAPE[:2], "channels": SHAPE[2], "layout": "NCHW", "dtype": "float32"})
CONFIG: Final = {
    "max_batch_size": MAX_BATCH,
    "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}],
    "output": [{"name": name} for name in ("logits", *names.VERDICT_TENSORS)],
    "parameters": {
        names.GUARD_ID_PARAMETER: {"string_value": GUARD_ID},
        names.LOGITS_PARAMETER: {"string_value": "logits"},
        names.PREPROCESSING_PARAMETER: {"string_value": PREPROCESSING},
    },
}


class Served:
    """What the server does and has seen.

    Args:
        refusals: how many attempts to register a region get 503.
        ones: dimensions of size 1 behind the classes of the logits, of which the last class is the largest.
    """

    def __init__(self, refusals: int = 0, ones: int = 0) -> None:
        self.refusals, self.ones = refusals, ones
        self.asked: list[str] = []  # regions, each time that the server was to register one
        self.regions: set[str] = set()  # that it knows now

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to one request."""
        if path.endswith("/config"):
            return 200, CONFIG
        if "/systemsharedmemory/" in path:
            *_, region, verb = path.split("/")
            return self._keep(region, verb)
        return self._infer(json.loads(body))  # no bytes follow: the image lies in shared memory

    def _keep(self, region: str, verb: str) -> tuple[int, Any]:
        if verb == "unregister":
            self.regions.discard(region)
            return 200, {}
        self.asked.append(region)
        if self.refusals:
            self.refusals -= 1
            return 503, {"error": "busy"}
        self.regions.add(region)
        return 200, {}

    def _infer(self, request: Any) -> tuple[int, Any]:
        (image,) = request["inputs"]
        region = image["parameters"]["shared_memory_region"]
        if region not in self.regions:
            return 400, {"error": f"Unable to find shared memory region: '{region}'"}
        rows = image["shape"][0]
        logits = {
            "name": "logits",
            "datatype": "FP32",
            "shape": [rows, CLASSES, *[1] * self.ones],
            "data": list(range(CLASSES)) * rows,
        }
        verdicts = [
            {"name": name, "datatype": datatype, "shape": [rows, 1], "data": [value] * rows}
            for name, (datatype, value) in ANSWERS.items()
        ]
        return 200, {"id": request["id"], "outputs": [logits, *verdicts]}


@contextmanager
def serve_http(served: Served) -> Iterator[str]:
    """Run the server; gives its host:port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, answer = served.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - the name that http.server looks for

        def log_message(self, *values: Any) -> None:
            pass

    with run_http(Handler) as address:
        yield address


@contextmanager
def run_http(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server of this handler; gives its host:port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
