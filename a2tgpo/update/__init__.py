"""Score and train the policy with Megatron's pipeline schedules."""

import a2tgpo.parallel  # noqa: F401  must adapt Megatron to the machine before the modules here import it
