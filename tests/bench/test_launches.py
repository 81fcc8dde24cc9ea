"""The launches of a training step, by count."""

import pytest

from bench.launches import count_launches


@pytest.mark.parametrize(
    ("size", "options", "norms", "most"),
    [
        ("tiny", {}, 21, 886),
        ("tiny", {"amp": False}, 21, 756),
        pytest.param("pascal", {}, 163, 4481, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_launches_no_more_than_it_did(size, options, norms, most):
    """On a change for the better, lower the number."""
    launches = count_launches(size, **options)
    assert launches["native_layer_norm"] == 2 * norms  # the pseudo-label pass, and the forward pass
    assert launches.total() <= most
