# Your own images and masks in two folders: copy this file and change the values, as docs/own-data.md shows.
_base_ = ["../models/internvit6b_224.py", "../datasets/folders.py", "../schedules/adamw_80k.py"]
classes = ["background", "roof", "road"]  # in the order of the ids in the masks: 0, 1, 2
mine = dict(data_root="data/mine", classes=classes, img_suffix=".jpg", seg_map_suffix=".png")
data = dict(train=mine, val=mine, test=mine)
model = dict(decode_head=dict(num_classes=len(classes)))
load_from = "pretrained/intern_vit_6b_224px.pth"
