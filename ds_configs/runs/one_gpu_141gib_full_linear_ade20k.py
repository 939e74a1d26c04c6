# internvit6b_224_full_linear_ade20k on one GPU of 141 GiB, everything resident. Not run here.
# Plan (ds-seg plan --gpus 1 --gpu-memory 141): 1 GPU of 141 GiB, 126 GiB used, 41 hours.
_base_ = "internvit6b_224_full_linear_ade20k.py"
model = dict(backbone=dict(checkpointing="selective"))
data = dict(samples_per_gpu=8)
