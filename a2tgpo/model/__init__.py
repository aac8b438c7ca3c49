"""The policy: a Hugging Face checkpoint as a Megatron GPT model, and back."""

import a2tgpo.parallel  # noqa: F401  adapts Megatron to the machine before the modules here import it
