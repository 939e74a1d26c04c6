# UperNet on the frozen InternViT-6B-448px-V1-2 on ADE20K. Published: 55.2 mIoU (InternVL 2.5 report, arXiv 2412.05271,
# section 7.2). Source: OpenGVLab/InternVL-MMDetSeg mmsegmentation/configs/intern_vit_6b_448px_v1_2/head_tuning. Not run
# here.
# Plan: 8 GPUs of 80 GiB, 17 GiB used on each, 4.4 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448_upernet.py", "../datasets/ade20k_504.py", "../schedules/head_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0), auxiliary_head=dict(in_index=1))
load_from = "pretrained/intern_vit_6b_448px_v1_2.pth"
