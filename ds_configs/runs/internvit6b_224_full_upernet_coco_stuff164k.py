# Full fine-tuning of InternViT-6B-224px with UperNet on COCO-Stuff-164K. No figure at hand. Source:
# OpenGVLab/InternVL-MMDetSeg mmsegmentation/configs/intern_vit_6b/full_tuning. Not run here.
# Plan: 8 GPUs of 80 GiB, 53 GiB used on each, 7.8 hours (ds-seg plan; predicted).
_base_ = ["../models/internvit6b_224_upernet.py", "../datasets/coco_stuff164k_504.py", "../schedules/published_80k.py"]
model = dict(decode_head=dict(num_classes=171), auxiliary_head=dict(num_classes=171))
load_from = "pretrained/intern_vit_6b_224px.pth"
