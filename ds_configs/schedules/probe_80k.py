# The published recipe of linear probing: as head_80k, no weight decay.
_base_ = "head_80k.py"
optimizer = dict(weight_decay=0.0)
