# Linear probe of the frozen InternViT-6B-448px-V2_5 on ADE20K. Published: 39.4 mIoU
# (OpenGVLab/InternVL, segmentation/README.md). Not run here.
_base_ = ["../models/internvit6b_v2_5.py", "../datasets/ade20k_504.py", "../schedules/probe_80k.py"]
model = dict(backbone=dict(freeze_vit=True, drop_path_rate=0.0))
load_from = "pretrained/intern_vit_6b_448px_v2_5.pth"
