# Full fine-tuning of InternViT-300M-448px with UperNet on ADE20K. No published figure. Not run here.
# Plan: 8 GPUs of 80 GiB, 8 GiB used on each, 2.2 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit300m_448_upernet.py", "../datasets/ade20k_504.py", "../schedules/published_80k.py"]
load_from = "pretrained/InternViT-300M-448px"
