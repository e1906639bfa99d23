"""Read from its log why a Triton server did not start, or ended."""

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
    re.compile(r"^(?P<reason>Signal \(\d+\) received)"),  # a crash, or somebody's kill
    re.compile(r"^\S+ E \d+ \S+\] (?P<reason>.+)"),
)
# Words of the server and of Python that say nothing about the model.
PREFIXES: Final = re.compile(
    r"^(?:(?:Internal|Invalid argument|Not found|Unavailable|Unsupported): )?(?:TritonModelException: )?"
)
# What a server dies of when a model's process holds a lock that they share and gets no processor time for ten seconds.
STARVED: Final = "boost::interprocess::lock_exception"
STARVED_REASON: Final = (
    "a model's process did not run for 10 s, of which the server dies: the machine is overloaded, or the process was stopped"
)
HARMLESS: Final = ("CudaDriverHelper", "CUDA driver version is insufficient")  # errors on every machine without a GPU


def explain_log(lines: Iterable[str]) -> str | None:
    """Say in one line which models did not load and why, or what the server died of; None when the log does not tell."""
    reasons: dict[str, str] = {}
    last_resort = protobuf = None
    for line in lines:
        if STARVED in line:
            return STARVED_REASON
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
            if not any(words in line for words in HARMLESS) and (found := pattern.search(line)):
                last_resort = _shorten(found["reason"])
                break
    if reasons:
        return "; ".join(f"model {model} does not load: {reason}" for model, reason in reasons.items())
    return last_resort


def _shorten(reason: str) -> str:
    """Keep what stands before a Python trace-back; Triton writes line breaks as backslash and n."""
    text = re.split(r"\\n|\n", reason.strip().strip('"'), maxsplit=1)[0].strip()
    return PREFIXES.sub("", text)
