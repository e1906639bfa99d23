"""The stream as Triton's Python backend runs it: life cycle only, the rest is in `diffense.serving`."""

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from diffense.serving.calls import read_parameters
from diffense.serving.meter import EVERY_S, Meter
from diffense.serving.settings import Wiring
from diffense.serving.stream import StreamService
from diffense.serving.turn import Turn


class TritonPythonModel:
    """One instance of the stream."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the wiring and register the metrics."""
        parameters = read_parameters(args["model_config"])
        try:
            wiring, turn = Wiring.from_parameters(parameters), Turn.from_parameters(parameters, args["model_instance_name"])
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self.meter = Meter(pb_utils, wiring.model, EVERY_S)
        self.service = StreamService(pb_utils, wiring, self.meter, turn)

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer a batch of requests through their senders."""
        self.service.answer(requests)

    def finalize(self) -> None:
        """Wait for the verdicts that are still under way, and stop counting."""
        self.service.close()
        self.meter.close()
