"""Scoring and training the policy through Megatron's pipeline schedules."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
