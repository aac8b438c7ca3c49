"""Exit codes of all programs."""

DOES_NOT_FIT = 1
"""A dry run's plan does not fit the GPUs."""
BAD_CONFIG = 2
"""The user made a mistake, for example in the configuration."""
BROKEN_RUN = 3
"""The run failed, or its guards stopped it."""
START_AGAIN = 75
"""The run has been saved and should be started again. sysexits.h calls this code EX_TEMPFAIL."""
