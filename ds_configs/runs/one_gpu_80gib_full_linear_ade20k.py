# internvit6b_224_full_linear_ade20k on one GPU of 80 GiB, 45% of the optimizer in host memory. Not run here.
# Plan (ds-seg plan --gpus 1 --gpu-memory 80 --host-memory 128): 67 GiB used on the GPU, 65 GiB of the host, 93 hours.
_base_ = "internvit6b_224_full_linear_ade20k.py"
data = dict(samples_per_gpu=8)
deepspeed_config = "{{ fileDirname }}/../deepspeed/zero3_bf16_offload_partly.json"
