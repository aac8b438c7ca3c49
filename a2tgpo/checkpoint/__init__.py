"""Checkpoints: written sharded beside training, verified while read, and kept by rules."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
