"""Read why a Triton server did not start from its log."""

import re
from collections.abc import Iterable
from typing import Final

# Seen in servers 2.51; each gives the model and the reason, in the order of how much they tell.
MODEL_REASONS: Final = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.+)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.+)"),
    re.compile(r"ensemble (?P<model>\S+) (?P<reason>contains models that are not available.+)"),
)
PROTOBUF_REASON: Final = re.compile(r"text_format\.cc:\d+\] Error parsing text-format [\w.]+: (?P<reason>.+)")
LAST_RESORTS: Final = (
    re.compile(r"error: creating server: (?P<reason>.+)"),
    re.compile(r"^(?:tritonserver|error): (?P<reason>.+)"),
    re.compile(r"^\S+ E \d+ \S+\] (?P<reason>.+)"),
)
# Words of the server and of Python that say nothing about the model.
PREFIXES: Final = re.compile(
    r"^(?:(?:Internal|Invalid argument|Not found|Unavailable|Unsupported): )?(?:TritonModelException: )?"
)
HARMLESS: Final = "CudaDriverHelper"  # logged as an error on every machine without a GPU


def explain_log(lines: Iterable[str]) -> str | None:
    """Say in one line which models did not load and why; None when the log does not tell."""
    reasons: dict[str, str] = {}
    last_resort = protobuf = None
    for line in lines:
        if found := PROTOBUF_REASON.search(line):
            protobuf = found["reason"]
        for pattern in MODEL_REASONS:
            if found := pattern.search(line):
                reason = _shorten(found["reason"])
                # The parser's complaint stands on the line before the model's and alone names the field.
                if "failed to read text proto" in reason and protobuf:
                    reason = f"{reason}: {protobuf}"
                reasons.setdefault(found["model"], reason)
        for pattern in LAST_RESORTS:
            if HARMLESS not in line and (found := pattern.search(line)):
                last_resort = _shorten(found["reason"])
                break
    if reasons:
        return "; ".join(f"model {model} does not load: {reason}" for model, reason in reasons.items())
    return last_resort


def _shorten(reason: str) -> str:
    """Keep what stands before a Python trace-back; Triton writes line breaks as backslash and n."""
    text = re.split(r"\\n|\n", reason.strip().strip('"'), maxsplit=1)[0].strip()
    return PREFIXES.sub("", text)
