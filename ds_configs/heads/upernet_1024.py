# UperNet on a backbone of 1024 channels, at MMSegmentation's own width.
_base_ = "upernet.py"
upernet = dict(in_channels=[1024, 1024, 1024, 1024], channels=512)
upernet_auxiliary = dict(in_channels=1024, channels=256)
