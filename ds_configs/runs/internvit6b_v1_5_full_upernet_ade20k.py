# Full fine-tuning of InternViT-6B-448px-V1-5 with UperNet on ADE20K. Published: 58.8 mIoU (InternVL 2.5 report, arXiv
# 2412.05271, section 7.2). Source: OpenGVLab/InternVL-MMDetSeg
# mmsegmentation/configs/intern_vit_6b_448px_v1_5/full_tuning. Not run here.
# Plan: 8 GPUs of 80 GiB, 51 GiB used on each, 7.5 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448_upernet.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_448px_v1_5.pth"
