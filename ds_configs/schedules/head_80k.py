# The published recipe of head tuning: as adamw_80k, the backbone frozen, so no layer decay.
_base_ = "adamw_80k.py"
optimizer = dict(paramwise_cfg=dict(layer_decay_rate=1.0))
