"""GPUs that a plan may use. Speeds are the manufacturers' figures, and memory is the total that torch reports."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_gib: float
    bf16_tflops: float
    """Peak of dense bfloat16 products, 1e12 operations per second."""
    fp32_tflops: float
    """Peak without tensor cores, 1e12 operations per second. Training in float32 has this peak."""
    memory_tb_per_s: float
    """Bandwidth of the GPU's own memory, in 1e12 bytes per second."""
    node_gb_per_s: float
    """One-way bandwidth of a GPU's link to the other GPUs of its node, 1e9 bytes per second."""
    network_gb_per_s: float
    """One GPU's share of the one-way bandwidth between nodes, 1e9 bytes per second."""
    host_gb_per_s: float
    """One-way bandwidth between a GPU and its host's memory, 1e9 bytes per second."""
    capability: tuple[int, int]
    """CUDA's compute capability, which determines the FP8 recipes that the GPU supports."""
    gpus_per_node: int = 8
    host_memory_gib: float = 1024
    """GiB of host memory of a node. The value is a guess."""

    def link_bytes_per_s(self, span: int) -> float:
        """Return the peak rate, in bytes per second, of the slowest link among `span` consecutive ranks."""
        return 1e9 * (self.node_gb_per_s if span <= self.gpus_per_node else self.network_gb_per_s)

    def peak_flops(self, dtype: str) -> float:
        """Return the GPU's peak operations per second in `dtype`, which is bfloat16 or float32."""
        return 1e12 * (self.bf16_tflops if dtype == "bfloat16" else self.fp32_tflops)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100-80gb",
            memory_gib=79.1,
            bf16_tflops=312,
            fp32_tflops=19.5,
            memory_tb_per_s=2.04,
            node_gb_per_s=300,
            network_gb_per_s=25,
            host_gb_per_s=32,
            capability=(8, 0),
        ),
        Gpu(
            name="h100-80gb",
            memory_gib=79.1,
            bf16_tflops=989,
            fp32_tflops=67,
            memory_tb_per_s=3.35,
            node_gb_per_s=450,
            network_gb_per_s=50,
            host_gb_per_s=64,
            capability=(9, 0),
        ),
        Gpu(
            name="h200-141gb",
            memory_gib=139.7,
            bf16_tflops=989,
            fp32_tflops=67,
            memory_tb_per_s=4.8,
            node_gb_per_s=450,
            network_gb_per_s=50,
            host_gb_per_s=64,
            capability=(9, 0),
        ),
        Gpu(
            name="h20-96gb",
            memory_gib=95.0,
            bf16_tflops=148,
            fp32_tflops=44,
            memory_tb_per_s=4.0,
            node_gb_per_s=450,
            network_gb_per_s=50,
            host_gb_per_s=64,
            capability=(9, 0),
        ),
        Gpu(
            name="b200-180gb",
            memory_gib=178.3,
            bf16_tflops=2250,
            fp32_tflops=75,
            memory_tb_per_s=8.0,
            node_gb_per_s=900,
            network_gb_per_s=50,
            host_gb_per_s=64,
            capability=(10, 0),
        ),
        Gpu(
            name="gb200-186gb",
            memory_gib=184.0,
            bf16_tflops=2450,
            fp32_tflops=80,
            memory_tb_per_s=8.0,
            node_gb_per_s=900,
            network_gb_per_s=50,
            host_gb_per_s=450,
            capability=(10, 0),
            gpus_per_node=72,
            host_memory_gib=16_000,
        ),
    )
}
