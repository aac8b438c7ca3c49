"""The command that runs a program with the large packages imported already."""

import os
import sys

from preloaded import VARIABLE

PYTHON = os.environ.get(VARIABLE, sys.executable)
"""Path of the client (client.py). Outside a test session, this is the usual Python."""
