"""The command that runs a program with the large packages imported already."""

import os
import sys

from preloaded import VARIABLE

PYTHON = os.environ.get(VARIABLE, sys.executable)
"""The command. Outside of a test session, it is the usual Python."""
