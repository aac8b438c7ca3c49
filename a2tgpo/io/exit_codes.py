"""Exit codes of all programs."""

DOES_NOT_FIT = 1
"""A dry run whose plan does not fit the GPUs."""
BAD_CONFIG = 2
"""The user's mistake."""
BROKEN_RUN = 3
"""A run that failed or that its guards stopped."""
START_AGAIN = 75
"""The run is saved and should be started again: EX_TEMPFAIL of sysexits.h."""
