# Full fine-tuning of InternViT-6B-448px-V2_5 with the linear head on COCO-Stuff-164K. No published figure: ADE20K's
# recipe. Not run here.
# Plan: 8 GPUs of 80 GiB, 39 GiB used on each, 4.6 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_448.py", "../datasets/coco_stuff164k_504.py", "../schedules/published_80k.py"]
model = dict(decode_head=dict(num_classes=171))
load_from = "pretrained/intern_vit_6b_448px_v2_5.pth"
