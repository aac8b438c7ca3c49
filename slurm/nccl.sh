# shellcheck shell=bash
# NCCL on InfiniBand or RoCE, for all jobs; sourced by job.sh. Variables of the environment take precedence.
: "${NCCL_DEBUG:=WARN}"                        # INFO prints the rings and which devices are used
: "${NCCL_IB_TIMEOUT:=22}"                     # 4 us * 2^22: a switch may be slow under load
: "${NCCL_IB_RETRY_CNT:=7}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"      # a dead peer ends the others
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"          # orders communication before computation, as Megatron expects
export NCCL_DEBUG NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT TORCH_NCCL_ASYNC_ERROR_HANDLING CUDA_DEVICE_MAX_CONNECTIONS
# Select the network if a node has several: NCCL_IB_HCA=mlx5_0,... NCCL_SOCKET_IFNAME=...
for name in NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_TOPO_FILE; do
  if [ -n "${!name:-}" ]; then export "${name?}"; fi
done
