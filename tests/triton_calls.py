"""How the tests talk to a server with guarded models, and what they may do to it."""

import os
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import np_to_triton_dtype

from diffense import names
from diffense.serving.meter import EVERY_S
from diffense_export.configs import CONFIG_FILE, format_config, parse_config

CLIENTS = {"grpc": grpc, "http": http}
MAX_BATCH = 16
DEADLINE_S = 60
INVALID = ("400", "StatusCode.INVALID_ARGUMENT")
UNAVAILABLE = ("503", "StatusCode.UNAVAILABLE")


def ask(server, protocol, model, image, outputs=None, **more):
    client_module = CLIENTS[protocol]
    tensor = client_module.InferInput("image", list(image.shape), np_to_triton_dtype(image.dtype))
    tensor.set_data_from_numpy(image)
    wanted = [client_module.InferRequestedOutput(name) for name in outputs] if outputs else None
    if protocol == "grpc":
        client, limit = grpc.InferenceServerClient(server.endpoints.grpc), {"client_timeout": DEADLINE_S}
    else:
        client, limit = http.InferenceServerClient(server.endpoints.http, network_timeout=DEADLINE_S), {}
    with client:
        return client.infer(model, [tensor], outputs=wanted, **limit, **more)


async def send_stream(server, requests):
    """Send (model, id, image) over one stream; every message that comes, in order: id, arrays or error text."""

    async def feed():
        for model, identity, image in requests:
            tensor = grpc.InferInput("image", list(image.shape), "FP32")
            tensor.set_data_from_numpy(image)
            yield {"model_name": model, "inputs": [tensor], "request_id": identity}

    messages = []
    async with grpc_aio.InferenceServerClient(server.endpoints.grpc) as client:
        async for result, error in client.stream_infer(feed()):
            if error is not None:
                messages.append(("", error.message()))
            else:
                response = result.get_response()
                messages.append((response.id, {output.name: result.as_numpy(output.name) for output in response.outputs}))
    return messages


def copy_gateway(repository, family, name, **parameters):
    """A second gateway in front of the same models, with other options."""
    shutil.copytree(repository / f"{family}_gateway", repository / name)
    config = parse_config(repository / name / CONFIG_FILE)
    config.name = name
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    (repository / name / CONFIG_FILE).write_text(format_config(config), encoding="utf-8")


def check_verdict(result, truth, rows):
    assert np.allclose(result.as_numpy(names.SCORE)[:, 0], truth.scores[rows], rtol=0, atol=1e-4)
    assert np.allclose(result.as_numpy(names.P_VALUE)[:, 0], truth.p_values[rows], rtol=0, atol=1e-4)
    assert np.array_equal(result.as_numpy(names.FLAGGED)[:, 0], truth.flagged[rows])


def read_total(server, series, **labels):
    time.sleep(2 * EVERY_S)  # the guard counts behind its answers
    with urllib.request.urlopen(f"http://{server.endpoints.metrics}/metrics", timeout=DEADLINE_S) as page:
        families = text_string_to_metric_families(page.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == series]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def kill_stubs(repository, model):
    """Kill the processes that serve one model of this repository."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "triton_python_backend_stub" in line.split("\0")[0] and f"{repository.resolve()}/{model}/" in line:
            os.kill(int(process.name), signal.SIGKILL)
            killed += 1
    assert killed, f"no process serves {model}"
