# UperNet on the frozen InternViT-6B-448px-V1-0 on ADE20K. Published: 55.4 mIoU (InternVL 2.5 report, arXiv 2412.05271,
# section 7.2). Source: OpenGVLab/InternVL-MMDetSeg mmsegmentation/configs/intern_vit_6b_448px_v1_0/head_tuning. What
# differs: all 48 blocks, where the published config takes the first 45. Not run here.
# Plan: 8 GPUs of 80 GiB, 17 GiB used on each, 4.5 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448_v1_0_upernet.py", "../datasets/ade20k_504.py", "../schedules/head_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0), auxiliary_head=dict(in_index=1))
load_from = "pretrained/intern_vit_6b_448px_v1_0.pth"
