# Few-shot: full fine-tuning of InternViT-6B-224px with the linear head on 1/16 of ADE20K's training images. Published:
# 46.5 mIoU (OpenGVLab/InternVL, segmentation/README.md). Source: OpenGVLab/InternVL
# segmentation/configs/intern_vit_6b/few_shot/linear_intern_vit_6b_504_5k_ade20k_bs16_lr4e-5_1of16.py. Not run here.
# Plan: 8 GPUs of 80 GiB, 41 GiB used on each, 0.31 hours (ds-seg plan; predicted).
_base_ = "internvit6b_224_full_linear_ade20k.py"
data = dict(train=dict(max_image_num=20210 // 16))
lr_config = dict(warmup_iters=100)
runner = dict(max_iters=5000)
evaluation = dict(interval=1000)
