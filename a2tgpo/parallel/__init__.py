"""Process groups, collectives and random state.

Importing this package adapts Megatron-Core to a machine without a GPU (see `cpu`), so import it before any module of
`megatron`.
"""

from a2tgpo.parallel import cpu

cpu.install()
