"""Print the README's table from benchmarks/results/demo.json; with a summary.json of a run as argument, record it there first.

usage: python -m benchmarks.demo_table [runs/demo/summary.json [SEED]]
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import describe_run

RESULTS = Path(__file__).parent / "results" / "demo.json"


def record(summary: Path, seed: int) -> None:
    """Store a run's rows with seed, commit, machine and the onnxruntime backend of this machine's server.

    Raises:
        ServeError: there is no server.
    """
    rows = [row | {"seed": seed} | describe_run() for row in json.loads(summary.read_text())]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def render_table(rows: list[dict[str, Any]]) -> str:
    """Rows -> Markdown."""
    lines = [
        "| attack | clean accuracy, before = after | ASR before → after | false alarms (alpha) | AUROC | median latency |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["clean_accuracy_before"] != row["clean_accuracy_after"]:
            raise SystemExit(f"{row['attack']}: clean accuracy changed, the table's heading would lie")
        lines.append(
            f"| {row['attack']} | {row['clean_accuracy_before']:.2%} | {row['asr_before']:.2%} → {row['asr_after']:.2%} "
            f"| {row['fpr']:.2%} ({row['alpha']:.0%}) | {row['auroc']:.4f} "
            f"| {row['p50_ms_unguarded']:.1f} → {row['p50_ms_guarded']:.1f} ms |"
        )
    first = rows[0]
    # Rows of before a backend was recorded are of the stand-in, which was the only one then.
    by = "the Python stand-in" if first.get("backend", "stand-in") == "stand-in" else f"Triton's own {first['backend']} code"
    lines.append("")
    lines.append(
        f"{first['dataset']}; seed {first['seed']}, commit {first['commit']}, {first['machine']}; Triton "
        f"{first['server_version']}, placement {first['placement']}, loop {first['loop']}, one image a request, onnxruntime "
        f"backend by {by}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(render_table(json.loads(RESULTS.read_text())))
