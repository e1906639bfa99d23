"""Processes of a front that wait for each other."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffense.serving.settings import AT_ONCE_PARAMETER
from diffense.serving.turn import Turn

HOLD = """
import sys, time
from pathlib import Path
from diffense.serving.turn import Turn
with Turn(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""
WORK = """
import sys, time
from pathlib import Path
from diffense.serving.turn import Turn
turn, log = Turn(Path(sys.argv[1])), Path(sys.argv[2])
for _ in range(20):
    with turn, log.open("a") as file:
        print("in", file=file, flush=True)
        time.sleep(0.002)
        print("out", file=file, flush=True)
"""


@pytest.fixture
def start():
    """Start Python on code; whatever is left of it is killed."""
    with ExitStack() as stack:

        def run(code, *arguments):
            process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_one_process_at_a_time_works(start, tmp_path):
    processes = [start(WORK, tmp_path / "turn", tmp_path / "log") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 60


def test_a_process_that_is_killed_gives_its_turn_back(start, tmp_path):
    holder = start(HOLD, tmp_path / "turn")
    assert holder.stdout.readline() == "holds\n"
    waiting = start(HOLD, tmp_path / "turn")
    time.sleep(0.5)
    os.set_blocking(waiting.stdout.fileno(), False)
    assert not waiting.stdout.readline()
    os.set_blocking(waiting.stdout.fileno(), True)
    holder.send_signal(signal.SIGKILL)
    assert waiting.stdout.readline() == "holds\n"


def test_instances_share_as_many_turns_as_may_work_at_once(in_folder):
    turns = [Turn.from_parameters({AT_ONCE_PARAMETER: "2"}, f"m_gateway_0_{index}") for index in range(3)]
    assert turns[0].path == turns[2].path != turns[1].path
    assert {path.name for path in in_folder.iterdir()} == {f"diffense_{os.getppid()}_m_gateway_0_{slot}" for slot in (0, 1)}
    for turn in turns:
        turn.close()
        turn.close()
    assert not list(in_folder.iterdir())


def test_without_the_parameter_nobody_waits(in_folder):
    turn = Turn.from_parameters({}, "m_gateway_0_0")
    with turn, turn:
        assert not list(in_folder.iterdir())
    turn.close()


@pytest.mark.parametrize("stated", ["0", "-1", "one", ""])
def test_a_parameter_that_makes_no_sense_is_named(stated):
    with pytest.raises(ValueError, match=AT_ONCE_PARAMETER):
        Turn.from_parameters({AT_ONCE_PARAMETER: stated}, "m_gateway_0_0")


def test_a_link_in_the_place_of_the_file_is_not_followed(in_folder):
    other = in_folder / "other"
    (in_folder / f"diffense_{os.getppid()}_m_gateway_0_0").symlink_to(other)
    with pytest.raises(ValueError, match=f"diffense_{os.getppid()}_m_gateway_0_0.*{AT_ONCE_PARAMETER}"):
        Turn.from_parameters({AT_ONCE_PARAMETER: "1"}, "m_gateway_0_0")
    assert not Path(other).exists()
