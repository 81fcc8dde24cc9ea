import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.forbid_sync import forbid_sync

WAITS = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean index assigned": lambda x: x.clone().index_put_((x > 0,), torch.tensor(1.0)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "to the host": lambda x: x.to("cpu", non_blocking=True),  # who reads the result must wait
    "copied to the host": lambda x: torch.ones(3).copy_(x),
    "to the device": lambda _: torch.ones(3).to("cuda"),
    "copied to the device": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_what_waits_is_refused(call):
    with FakeTensorMode(), pytest.raises(AssertionError, match="waits for the device"), forbid_sync():
        call(torch.ones(3, device="cuda"))


def test_nothing_else_is_refused():
    with FakeTensorMode(), forbid_sync():
        x = torch.ones(3, device="cuda")
        x[x.long()].where(x > 0, 0).to(torch.float64).to(x.device)
        x.copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).to("cuda", non_blocking=True)


@torch.library.custom_op("allspark_fast::test_only_peek", mutates_args=())
def peek(x: Tensor) -> Tensor:
    return x * x[0].item()


def test_operators_are_looked_into_if_asked():
    with pytest.raises(AssertionError, match="item"), forbid_sync(inside_operators=True):
        peek(torch.ones(3))
