"""The launches of a training step, by count."""

import pytest

from bench.launches import count_launches


@pytest.mark.parametrize(("options", "most"), [({}, 915), ({"amp": False}, 781)], ids=str)
def test_a_tiny_step_launches_no_more_than_it_did(options: dict, most: int) -> None:
    """On a change for the better, lower the number."""
    launches = count_launches("tiny", **options)
    assert launches["native_layer_norm"] == 2 * 21  # the pseudo-label pass, and the forward pass
    assert launches.total() <= most


@pytest.mark.slow
def test_compiled_blocks_launch_less_but_all_products() -> None:
    compiled, plain = count_launches("tiny", compile="on"), count_launches("tiny")
    assert all(compiled[name] == plain[name] > 0 for name in ("mm", "addmm", "convolution", "depthwise_gelu"))
    assert compiled["native_layer_norm"] == 2 * 10  # those between blocks, and the decoder's
    assert compiled["generated"] > 0
    assert compiled.total() <= 876
