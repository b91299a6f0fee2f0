"""Settings of the references that ours cannot express are refused rather than passed over."""

from __future__ import annotations

import pytest
from reference_configs import config_from_reference

from train.weights.infer import PublishedFileError


def test_unknown_and_split_settings_of_the_reference_are_refused():
    params = {"input_size": 4, "in_channels": 8, "hidden_size": [16, 24], "depth": [1, 1], "num_heads": 2}
    assert config_from_reference(params).head_num_heads == 2
    for change, match in (({"use_moe": True}, "use_moe"), ({"patch_size": [2, 1]}, "same patch size")):
        with pytest.raises(PublishedFileError, match=match):
            config_from_reference({**params, **change})
    with pytest.raises(PublishedFileError, match="no input_size"):
        config_from_reference({})
