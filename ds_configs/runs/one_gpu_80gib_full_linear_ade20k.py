# internvit6b_224_full_linear_ade20k on one GPU of 80 GiB and a host of 128 GiB that holds the optimizer, in memory that
# is not pinned: torch rounds pinned memory up, to 115 GiB in all. Not run here.
# Plan (ds-seg plan --gpus 1 --gpu-memory 80 --host-memory 128): 49 GiB used on the GPU, 107 GiB of the host, 93 hours.
_base_ = "internvit6b_224_full_linear_ade20k.py"
model = dict(backbone=dict(checkpointing="selective"))
data = dict(samples_per_gpu=8)
deepspeed_config = "{{ fileDirname }}/../deepspeed/zero3_bf16_offload_unpinned.json"
