"""Write sharded checkpoints while training continues, verify them when they are read, and remove old checkpoints."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
