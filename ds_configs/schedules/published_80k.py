# As adamw_80k, and pos_embed and cls_token are decayed: the published runs' rule to exempt them missed their names.
_base_ = "adamw_80k.py"
optimizer = dict(paramwise_cfg=dict(decay_embeddings=True))
