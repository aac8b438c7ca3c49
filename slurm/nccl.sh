# shellcheck shell=bash
# Settings of NCCL on InfiniBand or RoCE; job.sh sources this file for all jobs. Variables that are already set keep their values.
: "${NCCL_DEBUG:=WARN}"                        # INFO prints the rings and the network devices
: "${NCCL_IB_TIMEOUT:=22}"                     # timeout of 4 us * 2^22, because a switch may be slow under load
: "${NCCL_IB_RETRY_CNT:=7}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"      # if a rank dies, the other ranks end, too
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"          # orders communication before computation, as Megatron expects
export NCCL_DEBUG NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT TORCH_NCCL_ASYNC_ERROR_HANDLING CUDA_DEVICE_MAX_CONNECTIONS
# If a node has several networks, select one with NCCL_IB_HCA=mlx5_0,... and NCCL_SOCKET_IFNAME=...
for name in NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_TOPO_FILE; do
  if [ -n "${!name:-}" ]; then export "${name?}"; fi
done
