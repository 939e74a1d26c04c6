# UperNet on the frozen InternViT-6B-224px on ADE20K. Published: 54.9 mIoU (OpenGVLab/InternVL, segmentation/README.md).
# Source: OpenGVLab/InternVL
# segmentation/configs/intern_vit_6b/head_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen.py. Not run
# here.
# Plan: 8 GPUs of 80 GiB, 17 GiB used on each, 4.5 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224_upernet.py", "../datasets/ade20k_504.py", "../schedules/head_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0), auxiliary_head=dict(in_index=1))
load_from = "pretrained/intern_vit_6b_224px.pth"
