# A small network of the 6B kind, fine-tuned in full on generated scenes: what `make demo` runs.
_base_ = ["../models/internvit_tiny.py", "../datasets/demo.py", "../schedules/demo.py"]
