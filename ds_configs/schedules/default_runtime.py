log_config = dict(interval=50, hooks=[dict(type="TextLoggerHook"), dict(type="WandbLoggerHook")])
checkpoint_config = dict(by_epoch=False, interval=1000, max_keep_ckpts=2)
evaluation = dict(interval=8000, metric="mIoU", save_best="mIoU")
optimizer_config = dict()
