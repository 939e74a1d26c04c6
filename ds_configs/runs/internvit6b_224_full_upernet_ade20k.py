# Full fine-tuning of InternViT-6B-224px with UperNet on ADE20K. Published: 58.9 mIoU (OpenGVLab/InternVL,
# segmentation/README.md). Source: OpenGVLab/InternVL
# segmentation/configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py. Not run here.
# Plan: 8 GPUs of 80 GiB, 53 GiB used on each, 7.8 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224_upernet.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_224px.pth"
