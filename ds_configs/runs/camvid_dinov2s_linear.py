# Linear probe of the frozen DINOv2-S/14 on CamVid; give the pretrained weights with --load-from.
_base_ = ["../models/dinov2s.py", "../datasets/camvid.py", "../schedules/camvid_120.py"]
model = dict(backbone=dict(freeze_vit=True))
data = dict(samples_per_gpu=2)
