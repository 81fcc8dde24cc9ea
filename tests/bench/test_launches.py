"""The launches of a training step, by count."""

import pytest

from bench.launches import count_launches


@pytest.mark.parametrize(("options", "most"), [({}, 915), ({"amp": False}, 781)], ids=str)
def test_a_tiny_step_launches_no_more_than_it_did(options: dict, most: int) -> None:
    """On a change for the better, lower the number."""
    launches = count_launches("tiny", **options)
    assert launches["native_layer_norm"] == 2 * 21  # the pseudo-label pass, and the forward pass
    assert launches.total() <= most
