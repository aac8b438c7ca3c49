"""Process groups, collectives and random state.

On a machine without a GPU, importing this package adapts Megatron-Core to the CPU (see `cpu`). Therefore import this
package before any module of `megatron`.
"""

from a2tgpo.parallel import cpu

cpu.install()
