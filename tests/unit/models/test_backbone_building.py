import pytest

from ds_seg.errors import ConfigError
from ds_seg.models.backbone_building import build_backbone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dims": 16}, r"^model\.backbone can't be built: model\.backbone\.embed_dims: .* mean 'embed_dim'\?"),
        (
            {"num_heads": 3},
            r"^model\.backbone \(InternViT\) can't be built: embed_dim 16 is not a multiple of num_heads",
        ),
    ],
)
def test_a_backbone_that_cannot_be_built_is_told_by_its_key(changes, message):
    cfg = {"type": "InternViT6B", "embed_dim": 16, "num_heads": 2, "depth": 1, "out_indices": [0], **changes}
    with pytest.raises(ConfigError, match=message):
        build_backbone({"backbone": cfg})
