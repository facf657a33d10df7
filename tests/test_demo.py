"""The demo: its stages' progress, what it leaves of a stage that fails or is stopped, and how it says so."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from tool_fixture import load_tool

from pretrain.errors import Interrupted, UserError

DEMO = load_tool("demo")
TALKS = """
from pretrain.log import ProgressLine
print("plan: 3 images", flush=True)
line = ProgressLine("detection", 3)
for done in 1, 2, 3:
    line.update(done, "epoch 1/1", 3 - done, {"loss": 1.5})
print("result: here", flush=True)
"""
STOPPABLE = """
import signal, sys, time
def save(number, _):
    print(f"saved at {signal.Signals(number).name}", flush=True)
    sys.exit(85)
signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def stage(code):
    return DEMO.Stage("detection ours", 1, [sys.executable, "-c", code])


def test_progress_is_shown_and_the_log_is_of_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DEMO, "PROGRESS_S", "0")
    DEMO.run_stage(stage(TALKS), tmp_path / "logs" / "1.log")
    last = r"detection 3/3  loss 1.500  epoch 1/1  \d s, done\n"
    assert re.fullmatch(f"    {last}", capsys.readouterr().out)
    assert re.fullmatch(f"plan: 3 images\n{last}result: here\n", (tmp_path / "logs" / "1.log").read_text())


def test_a_stage_that_fails_names_its_log_and_shows_its_end(tmp_path, capsys):
    code = "print('error: no such thing'); raise SystemExit(2)"
    with pytest.raises(UserError, match=f"stage 'detection ours' failed with code 2; .* {tmp_path}/1.log"):
        DEMO.run_stage(stage(code), tmp_path / "1.log")
    assert capsys.readouterr().err == "error: no such thing\n\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_passed_on_and_is_no_failure(tmp_path, number):
    def stop():
        while "ready" not in (log.read_text() if log.is_file() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    log = tmp_path / "1.log"
    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted, match=f"in 'detection ours' \\({number.name}\\); what is done stays"):
        DEMO.run_stage(stage(STOPPABLE), log)
    assert f"saved at {number.name}" in log.read_text()


def test_the_whole_demo_takes_less_than_twenty_minutes_and_the_quick_one_everything_once(tmp_path):
    whole, quick = DEMO.stages(tmp_path), DEMO.stages(tmp_path, quick=True)
    assert [each.title for each in whole] == [each.title for each in quick]
    assert sum(each.budget_s for each in whole) < 16 * 60
    assert "max_iters=10" in quick[3].command


def test_make_takes_the_quick_one():
    line = ["make", "--dry-run", "--assume-old=setup", "demo", "QUICK=1"]
    told = subprocess.run(line, capture_output=True, text=True).stdout
    assert "tools/demo.py --output demo_quick --quick" in told
