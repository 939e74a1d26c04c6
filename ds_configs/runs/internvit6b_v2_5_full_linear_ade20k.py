# Full fine-tuning of InternViT-6B-448px-V2_5 with the linear head on ADE20K. No published figure. Not run here.
# Plan: 8 GPUs of 80 GiB, 39 GiB used on each, 4.6 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/intern_vit_6b_448px_v2_5.pth"
