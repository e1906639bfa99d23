"""A family of served models around a real guard, on the fake server module."""

from dataclasses import replace

import numpy as np

from diffense import names
from diffense.serving.gateway import GatewayService
from diffense.serving.guard import GuardService
from diffense.serving.meter import Meter
from diffense.serving.settings import GatewayOptions, Wiring
from diffense.serving.stream import StreamService
from diffense.serving.turn import Turn
from fake_triton import FakeBackend, Request, TritonError

VERDICTS = list(names.VERDICT_TENSORS)
ALL = ["logits", *VERDICTS]
DENOISER_INPUTS = (names.NOISED, names.SIGMA, names.GUIDE)
WIRING = Wiring(
    model="m",
    outputs=("logits",),
    logits="logits",
    loop="bls",
    callee="m_denoiser",
    latents_model="m_features",
    shared=False,
    input="image",
    raw_logits=names.RAW_LOGITS,
)


DIRECT = replace(WIRING, loop="direct", callee="", latents_model="m_tapped", shared=True, raw_logits="")


class ServedFamily:
    """Twelve images, what every model gives for them, and services that ask those models."""

    def __init__(self, guard, clean_images):
        self.guard = guard
        self.image = guard.preprocessing.apply(clean_images[:12])
        self.logits, self.latents = guard.run(clean_images[:12])
        self.truth = guard.score(clean_images[:12])
        self.steps = guard.manifest.sampling.steps

    def denoise(self, arrays):
        return {names.SAMPLE: self.guard.denoise(*(arrays[name] for name in DENOISER_INPUTS))}

    def production(self, arrays):
        return {"logits": self.look_up(self.logits, self.logits[0], arrays["image"])}

    def features(self, arrays):
        assert set(arrays) == {"image", names.RAW_LOGITS} and len(arrays[names.RAW_LOGITS]) == len(arrays["image"])
        return self.find_latents(arrays)

    def tapped(self, arrays):
        return self.production(arrays) | self.find_latents(arrays)

    def judge_directly(self, arrays):
        """A graph of target and verdict; an image that it does not know has none."""
        known = dict(zip(VERDICTS, self.truth[:3], strict=True))
        dtypes, nothing = (np.float32, np.float32, np.uint8), (-1, -1, names.UNSCORED)
        found = {
            name: self.look_up(known[name][:, None].astype(dtype), np.array([missing], dtype), arrays["image"])
            for name, dtype, missing in zip(VERDICTS, dtypes, nothing, strict=True)
        }
        return self.production(arrays) | found

    def find_latents(self, arrays):
        return {names.LATENTS: self.look_up(self.latents, self.latents[0] * np.nan, arrays["image"])}

    def look_up(self, known, unknown, images):
        found = [np.flatnonzero((self.image == image).all(axis=(1, 2, 3))) for image in images]
        return np.stack([known[rows[0]] if len(rows) else unknown for rows in found])

    def guard_service(self, wiring=WIRING, clock=None, **models):
        backend = FakeBackend(**{"m_denoiser": self.denoise, **models})
        more = {"clock": clock} if clock else {}
        return backend, GuardService(backend, wiring, self.guard.scorer, Meter(backend, "m"), **more)

    def gateway_service(self, options=None, wiring=WIRING, clock=None, **models):
        backend = self.make_backend(wiring, **models)
        more = {"clock": clock} if clock else {}
        return backend, GatewayService(backend, wiring, options or GatewayOptions(), Meter(backend, "m"), Turn(None), **more)

    def stream_service(self, wiring=WIRING, **models):
        backend = self.make_backend(wiring, **models)
        return backend, StreamService(backend, wiring, Meter(backend, "m"), Turn(None))

    def make_backend(self, wiring=WIRING, **models):
        _, inner = self.guard_service(wiring)

        def judge(arrays):
            return inner.answer([Request(arrays, VERDICTS)])[0].arrays()

        return FakeBackend(**{"m": self.production, "m_features": self.features, "m_guard": judge, **models})

    def ask_guard(self, rows, wanted=ALL, latents=None, **more):
        latents = self.latents[rows] if latents is None else latents
        return Request({"diffense_raw_0": self.logits[rows], names.LATENTS: latents}, wanted, **more)

    def ask_gateway(self, rows, wanted=ALL, image=None, **more):
        return Request({"image": self.image[rows] if image is None else image}, wanted, **more)

    def check(self, response, rows):
        self.check_arrays(response.arrays(), rows)

    def check_arrays(self, arrays, rows):
        assert np.allclose(arrays[names.SCORE][:, 0], self.truth.scores[rows], rtol=1e-5, atol=1e-5)
        assert np.allclose(arrays[names.P_VALUE][:, 0], self.truth.p_values[rows], atol=1e-6)
        assert np.array_equal(arrays[names.FLAGGED][:, 0], self.truth.flagged[rows])
        assert [arrays[name].dtype for name in VERDICTS] == [np.float32, np.float32, np.uint8]


def fail(*_):
    raise TritonError("Stub process '/srv/secret/m_guard_0_0' is not healthy.", TritonError.INTERNAL)
