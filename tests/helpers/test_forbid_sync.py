from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.forbid_sync import forbid_sync

CALLS = {
    "item": (lambda x: x.sum().item(), True),
    "nonzero": (lambda x: x.nonzero(), True),
    "boolean index": (lambda x: x[x > 0], True),
    "boolean index assigned": (lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)), True),
    "masked_select": (lambda x: x.masked_select(x > 0), True),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), True),
    "equal": (lambda x: torch.equal(x, x + 1), True),
    "integer index": (lambda x: x[x.long()], False),
    "where": (lambda x: x.where(x > 0, 0), False),
    "to": (lambda x: x.to(torch.float64).to(x.device), False),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_waits_is_refused_and_nothing_else(name):
    call, waits = CALLS[name]
    refused = pytest.raises(AssertionError, match="waits for the device") if waits else nullcontext()
    with refused, forbid_sync():
        call(torch.ones(3))


@torch.library.custom_op("allspark_fast::test_only_peek", mutates_args=())
def peek(x: Tensor) -> Tensor:
    return x * x[0].item()


def test_operators_are_looked_into_if_asked():
    with pytest.raises(AssertionError, match="item"), forbid_sync(inside_operators=True):
        peek(torch.ones(3))


def test_copies_between_host_and_device():
    with FakeTensorMode(), forbid_sync():
        x = torch.ones(3, device="cuda")
        x.copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).to("cuda", non_blocking=True)
        for copy in (
            x.cpu,
            x.tolist,
            lambda: x.to("cpu", non_blocking=True),  # who reads the result must wait
            lambda: torch.ones(3).to("cuda"),
            lambda: x.copy_(torch.ones(3)),
            lambda: torch.ones(3).copy_(x),
        ):
            with pytest.raises(AssertionError, match="waits for the device"):
                copy()
