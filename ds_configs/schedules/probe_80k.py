# The published linear-probe recipe: as adamw_80k, the backbone frozen, no weight decay.
_base_ = "adamw_80k.py"
optimizer = dict(_delete_=True, type="AdamW", lr=4e-5, betas=(0.9, 0.999), weight_decay=0.0)
