import itertools

from allspark_fast.data.loader import mix_seed


def test_one_part_is_splitmix64():
    # First outputs of SplitMix64 seeded with 0 and 1, as published with the algorithm.
    assert mix_seed(0) == 0xE220A8397B1DCDAF
    assert mix_seed(1) == 0x910A2DEC89025CC1
    assert mix_seed(2**70 + 3) == mix_seed(3)
    assert 0 <= mix_seed(-1) < 2**64


def test_order_and_number_of_parts_matter():
    keys = [key for length in (1, 2, 3, 4) for key in itertools.product(range(5), repeat=length)]
    assert len({mix_seed(*key) for key in keys}) == len(keys)
