"""Shared by all tests: one thread per process (what the machine's cores are counted on), reproducible hypothesis."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PET_LOCAL_ADDR", "127.0.0.1")  # torchrun's: the machine's own name may have no address
# The processes that tests start import this checkout, and what tests share.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
)

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
