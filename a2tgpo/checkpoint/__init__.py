"""Write sharded checkpoints while training continues, verify each when it is read, and remove old ones by rules."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
