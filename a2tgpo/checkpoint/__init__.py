"""Checkpoints: written sharded while training continues, verified when read, and retained by rules."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
