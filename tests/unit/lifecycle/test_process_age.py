"""The time since a process was started, according to the operating system."""

import subprocess
import sys
import time

import psutil

from a2tgpo.lifecycle.process_age import process_age_s

ROUNDING_S = 1.0
"""psutil uses the time of the boot, which the system reports in whole seconds."""


def test_the_age_is_that_of_the_process_not_of_the_module():
    started = psutil.Process().create_time()
    least = time.time() - started
    age = process_age_s()
    most = time.time() - started
    assert least - ROUNDING_S < age < most + ROUNDING_S


def test_a_new_process_is_younger():
    code = "from a2tgpo.lifecycle.process_age import process_age_s; print(process_age_s())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(found.stdout) < process_age_s()
