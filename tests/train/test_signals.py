"""A stop request is remembered, not obeyed at once, unless the user insists."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from train.engine import signals
from train.engine.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher sends it again at once
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_after_a_while_is_obeyed():
    with StopRequest(patience=0.0), pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the second signal raises
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


CHILD = """
import os, sys, time
sys.path[:0] = [{root!r}]
from train.engine.signals import StopRequest, die_with_launcher
with StopRequest() as stop:
    die_with_launcher()
    print(os.getpid(), flush=True)
    end = time.monotonic() + 20
    while stop.signal is None and time.monotonic() < end:
        time.sleep(0.02)
    open({marker!r}, "w").write(str(stop.signal))
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_learns_of_its_launchers_death_if_it_has_one(launched, tmp_path):
    marker = tmp_path / "signal"
    root = os.fspath(signals.__file__.rsplit("/train/", 1)[0])
    child = CHILD.format(root=root, marker=str(marker))
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {k: v for k, v in os.environ.items() if k not in signals.LAUNCHER_VARIABLES}
    if launched:
        environment["ACCELERATE_MIXED_PRECISION"] = "no"
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
    time.sleep(0.5)
    if launched:
        for _ in range(100):
            if marker.exists():
                break
            time.sleep(0.1)
        assert "15" in marker.read_text() or "SIGTERM" in marker.read_text()
    else:
        assert not marker.exists()
        os.kill(pid, signal.SIGKILL)
