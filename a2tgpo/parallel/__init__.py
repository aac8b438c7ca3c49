"""Process groups, collectives and random state.

Importing this package adapts Megatron-Core to a machine without a GPU. Therefore import this package before
`megatron`.
"""

from a2tgpo.parallel import cpu

cpu.install()
