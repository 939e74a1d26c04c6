# The published recipe of head tuning: as adamw_80k, the backbone frozen, so no layer decay.
_base_ = "adamw_80k.py"
optimizer = dict(_delete_=True, type="AdamW", lr=4e-5, betas=(0.9, 0.999), weight_decay=0.05)
