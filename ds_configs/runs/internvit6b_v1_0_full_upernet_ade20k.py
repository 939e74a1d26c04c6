# Full fine-tuning of InternViT-6B-448px-V1-0 with UperNet on ADE20K. Published: 58.1 mIoU (InternVL 2.5 report, arXiv
# 2412.05271, section 7.2). Source: OpenGVLab/InternVL-MMDetSeg
# mmsegmentation/configs/intern_vit_6b_448px_v1_0/full_tuning. What differs: all 48 blocks, where the published config
# takes the first 45. Not run here.
# Plan: 8 GPUs of 80 GiB, 53 GiB used on each, 7.8 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448_v1_0_upernet.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_448px_v1_0.pth"
