# Full fine-tuning of InternViT-6B-224px with the linear head on COCO-Stuff-164K. No published figure: ADE20K's recipe.
# Not run here.
# Plan: 8 GPUs of 80 GiB, 41 GiB used on each, 4.9 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224.py", "../datasets/coco_stuff164k_504.py", "../schedules/published_80k.py"]
model = dict(decode_head=dict(num_classes=171))
load_from = "pretrained/intern_vit_6b_224px.pth"
