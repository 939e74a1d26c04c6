"""Full-parameter fine-tuning of InternViT-6B for semantic segmentation under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
