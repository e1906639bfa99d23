"""The guard as Triton's Python backend runs it: life cycle only, the rest is in `diffense.serving`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from diffense.errors import DiffenseError
from diffense.scorer import Scorer
from diffense.serving.calls import read_parameters
from diffense.serving.guard import GuardService
from diffense.serving.meter import EVERY_S, Meter
from diffense.serving.settings import Wiring


class TritonPythonModel:
    """One instance of the guard."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the guard's arrays, whose hashes are checked, and register the metrics."""
        try:
            wiring = Wiring.from_parameters(read_parameters(args["model_config"]))
            scorer = Scorer.load(Path(args["model_repository"], args["model_version"]))
        except (DiffenseError, ValueError) as error:
            raise pb_utils.TritonModelException(f"{error}; export the guard again") from None
        self.meter = Meter(pb_utils, wiring.model, EVERY_S)
        self.service = GuardService(pb_utils, wiring, scorer, self.meter)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of requests."""
        return self.service.answer(requests)

    def finalize(self) -> None:
        """Stop counting."""
        self.meter.close()
