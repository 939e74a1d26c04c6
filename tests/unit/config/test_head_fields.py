from __future__ import annotations

from ds_seg.config.head_fields import auxiliary_head_fields, classifying_head, decode_head_fields, predicting_head

FCN, OCR = {"type": "FCNHead", "num_classes": 5}, {"type": "OCRHead", "num_classes": 7}
KNET = {"type": "IterativeDecodeHead", "kernel_generate_head": FCN}


def test_fields_of_one_head_and_of_several():
    assert decode_head_fields({"decode_head": FCN}) == [("model.decode_head", FCN)]
    cascade = {"decode_head": [FCN, OCR], "auxiliary_head": [OCR]}
    assert decode_head_fields(cascade) == [("model.decode_head[0]", FCN), ("model.decode_head[1]", OCR)]
    assert auxiliary_head_fields(cascade) == [("model.auxiliary_head[0]", OCR)]
    assert auxiliary_head_fields({"auxiliary_head": FCN}) == [("model.auxiliary_head", FCN)]
    assert decode_head_fields({}) == auxiliary_head_fields({"auxiliary_head": None}) == []


def test_the_last_head_predicts_and_k_nets_inner_head_has_the_classes():
    assert predicting_head({"decode_head": FCN}) == ("model.decode_head", FCN)
    assert predicting_head({"decode_head": [FCN, OCR]}) == ("model.decode_head[1]", OCR)
    assert predicting_head({"decode_head": KNET}) == ("model.decode_head.kernel_generate_head", FCN)
    assert classifying_head("model.auxiliary_head[0]", KNET)[0] == "model.auxiliary_head[0].kernel_generate_head"
