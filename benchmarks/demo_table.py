"""Print the README's table from benchmarks/results/demo.json; with a summary.json of a run as argument, record it there first.

usage: python -m benchmarks.demo_table [runs/demo/summary.json [SEED]]
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import describe_machine

RESULTS = Path(__file__).parent / "results" / "demo.json"


def record(summary: Path, seed: int) -> None:
    """Store a run's rows with seed, commit and machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = describe_machine()
    rows = [row | {"seed": seed, "commit": commit, "machine": machine} for row in json.loads(summary.read_text())]
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
    lines.append("")
    lines.append(
        f"{first['dataset']}; seed {first['seed']}, commit {first['commit']}, {first['machine']}; Triton "
        f"{first['server_version']}, placement {first['placement']}, loop {first['loop']}, one image a request, onnxruntime "
        "backend by the Python stand-in."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(render_table(json.loads(RESULTS.read_text())))
