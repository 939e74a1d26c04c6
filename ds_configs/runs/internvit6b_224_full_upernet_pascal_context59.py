# Full fine-tuning of InternViT-6B-224px with UperNet on Pascal Context (59 classes). No published figure: ADE20K's
# recipe at half its length. Not run here.
# Plan: 8 GPUs of 80 GiB, 53 GiB used on each, 3.9 hours (ds-seg plan; predicted).
_base_ = [
    "../models/internvit6b_224_upernet.py",
    "../datasets/pascal_context59_504.py",
    "../schedules/published_80k.py",
]
model = dict(decode_head=dict(num_classes=59), auxiliary_head=dict(num_classes=59))
runner = dict(max_iters=40000)
load_from = "pretrained/intern_vit_6b_224px.pth"
