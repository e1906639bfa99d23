"""`diffense demo --keep` from end to end, on a classifier that is trained for a few epochs only."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffense.demo.run import SAMPLES
from diffense.ports import choose_ports

SHORT = "from diffense.demo import training; training.EPOCHS = 3; from diffense.cli import main; main()"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
FIGURES = {
    "dataset", "attack", "clean_accuracy_before", "clean_accuracy_after", "asr_before", "asr_after", "alpha", "fpr", "auroc",
    "p50_ms_unguarded", "p50_ms_guarded", "placement", "loop", "server_version",
}  # fmt: skip


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False, **more)


@pytest.mark.server
@pytest.mark.timeout(900)
def test_keep_leaves_a_server_for_the_commands_that_it_prints_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-c", SHORT, "demo", "--keep", "--attacks", "badnets", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        else:
            assert process.stderr is not None
            pytest.fail(f"it ended early: {process.stderr.read()}")
        curl, *scans = [shlex.split(line) for line in shown if line.startswith(("curl ", "diffense "))]
        script = "\n".join(shown[shown.index("python - <<'END'") + 1 : shown.index("END")])

        answer = run([sys.executable, "-c", script])
        assert answer.stderr == ""
        assert len(answer.stdout.replace("[", " ").replace("]", " ").split()) == 2 * SAMPLES
        counts = [run([*scan, "--json"]).stderr.split(" scanned, ")[1].split()[0] for scan in scans]
        assert int(counts[0]) <= 2 < SAMPLES - 2 <= int(counts[1])
        outputs = json.loads(run(curl).stdout)["outputs"]
        assert {output["name"] for output in outputs} == {"diffense_score", "diffense_p_value", "diffense_flagged"}

        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopping the server" in errors
    assert "Traceback" not in errors
    host, port = curl[2].removeprefix("http://").split("/")[0].split(":")
    assert choose_ports(host, [int(port)]) == [int(port)]  # nobody listens there any more

    (figures,) = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert set(figures) == FIGURES
    assert figures["clean_accuracy_before"] == figures["clean_accuracy_after"] > 0.8
    assert figures["asr_before"] > 0.8 > 0.1 > figures["asr_after"]
    assert figures["auroc"] > 0.95
    report = (out / "report.html").read_text(encoding="utf-8")
    assert all(part in report for part in ("BadNets", "false alarm", "<svg", "data:image/png;base64,"))
