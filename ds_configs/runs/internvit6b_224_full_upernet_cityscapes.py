# Full fine-tuning of InternViT-6B-224px with UperNet on Cityscapes. No published figure: ADE20K's recipe. Not run here.
# Plan: 8 GPUs of 80 GiB, 53 GiB used on each, 7.7 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224_upernet.py", "../datasets/cityscapes_504.py", "../schedules/published_80k.py"]
model = dict(decode_head=dict(num_classes=19), auxiliary_head=dict(num_classes=19))
load_from = "pretrained/intern_vit_6b_224px.pth"
