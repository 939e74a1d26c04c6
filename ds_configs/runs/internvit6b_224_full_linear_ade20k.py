# Full fine-tuning of InternViT-6B-224px with the linear head on ADE20K. Published: 57.2 mIoU (OpenGVLab/InternVL,
# segmentation/README.md). Source: OpenGVLab/InternVL
# segmentation/configs/intern_vit_6b/few_shot/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_1of1.py. Not run here.
# Plan: 8 GPUs of 80 GiB, 41 GiB used on each, 4.9 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_224px.pth"
