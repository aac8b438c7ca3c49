"""Load a Hugging Face checkpoint into a Megatron GPT model, and export the model as a checkpoint."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
