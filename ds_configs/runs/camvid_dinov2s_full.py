# Full fine-tuning of DINOv2-S/14 on CamVid; give the pretrained weights with --load-from.
_base_ = ["../models/dinov2s.py", "../datasets/camvid.py", "../schedules/camvid_120.py"]
data = dict(samples_per_gpu=2)
optimizer_config = dict(grad_clip=dict(max_norm=1.0))  # gradient norms are 10 to 80
