# Full fine-tuning of InternViT-6B-448px-V1-0 with the linear head on ADE20K. No published figure. Not run here.
# Plan: 8 GPUs of 80 GiB, 41 GiB used on each, 4.9 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448_v1_0.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_448px_v1_0.pth"
