"""Served by Triton's Python backend in the client's tests: scores an image by its mean, and fails on demand."""

import time
from collections import Counter

import numpy as np
import triton_python_backend_utils as pb_utils

from client_codes import BROKEN, BUSY, BUSY_TWICE, INVALID, SHORT, SLOW, SLOW_S, THRESHOLD, UNSCORED
from diffense import names


def fail(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


class TritonPythonModel:
    def initialize(self, args):
        self.calls = Counter()  # how often a request id was seen: tells the tests how often a client tried

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        image = image.astype(np.float64) / 255 if image.dtype == np.uint8 else image.astype(np.float64)
        if image.shape[-1] == 3:
            image = image.transpose(0, 3, 1, 2)
        identity = request.request_id()
        self.calls[identity] += 1
        code = round(float(image[0, 0, 0, 0]) * 255)
        if code == SLOW:
            time.sleep(SLOW_S)
        if code == BUSY or (code == BUSY_TWICE and self.calls[identity] <= 2):
            return fail("no more work for now", pb_utils.TritonError.UNAVAILABLE)
        if code == BROKEN:
            return fail("the guard broke", pb_utils.TritonError.INTERNAL)
        if code == INVALID:
            return fail("image holds something unusable", pb_utils.TritonError.INVALID_ARG)
        score = image.mean(axis=(1, 2, 3))
        flagged = score > THRESHOLD
        verdict = {names.SCORE: score, names.P_VALUE: 1 - score, names.FLAGGED: flagged.astype(np.uint8)}
        if code == UNSCORED:
            verdict = {names.SCORE: score * 0 - 1, names.P_VALUE: score * 0 - 1, names.FLAGGED: flagged * 0 + 2}
        outputs = {
            "logits": image.mean(axis=(1, 3)).reshape(len(image), 4, -1).mean(axis=2).astype(np.float32),
            "calls": np.full((len(image), 1), self.calls[identity], np.int64),
            names.SCORE: verdict[names.SCORE].astype(np.float32)[:, None],
            names.P_VALUE: verdict[names.P_VALUE].astype(np.float32)[:, None],
            names.FLAGGED: verdict[names.FLAGGED].astype(np.uint8)[:, None],
        }
        if code == SHORT:
            outputs = {name: values[:-1] for name, values in outputs.items()}
        wanted = set(request.requested_output_names())
        tensors = [pb_utils.Tensor(name, values) for name, values in outputs.items() if name in wanted]
        return pb_utils.InferenceResponse(tensors)
