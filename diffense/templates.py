"""Where the served Python models that ship with Diffense lie on this machine."""

import importlib.util
from pathlib import Path
from typing import Final

from diffense.errors import ServeError

FOLDER: Final = "model_repository"
STAND_IN: Final = "onnxruntime_standin"


def find_templates() -> Path:
    """Folder with one sub-folder a kind of served Python model.

    A wheel carries it inside ``diffense_export``, a checkout at its top level.

    Raises:
        ServeError: neither place has it.
    """
    # Only the location is wanted: importing the exporter would pull in onnx.
    exporter = importlib.util.find_spec("diffense_export")
    places = [Path(place) / FOLDER for place in (exporter.submodule_search_locations or ())] if exporter else []
    places.append(Path(__file__).resolve().parents[1] / FOLDER)
    for place in places:
        if (place / STAND_IN / "model.py").is_file():
            return place
    raise ServeError("the served Python models are missing from this installation of diffense; install it again")
