"""What the report of the compiled kernels counts; tests/kernels/test_compile_targets.py compiles them."""

import pytest
import torch

pytest.importorskip("triton")

from bench.gpus import GPUS
from bench.launch_work import work_of
from bench.launches import Call, record_launches
from bench.static_report import instruction_mix

MAPS, ROWS, COLUMNS = 2, 4096, 21 * 1024


def test_instructions_of_nvidia() -> None:
    assembly = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R8, [R5] ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R8, R4, R12 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
        /*0070*/             @UP1  FFMA R9, R7, R8, R9 ;
        /*0080*/                   LOP3.LUT R2, R3, R4, RZ, 0x3c, !PT ;
        /*0090*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_1:
"""
    expected = {"matrix": 2, "global": 2, "shared": 1, "special": 1, "float": 1, "integer": 2, "other": 2}
    assert instruction_mix(assembly) == expected


def test_instructions_of_amd() -> None:
    assembly = """
_kernel:                                ; @kernel
; %bb.0:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_store_dword v0, v1, s[4:7], 0 offen
\tds_read_b128 v[4:7], v8
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\tv_exp_f32_e32 v1, v1
\tv_mul_f32_e32 v2, v1, v3
\tv_xor_b32_e32 v5, v6, v7
\ts_waitcnt vmcnt(0)
.LBB0_1:
"""
    expected = {"matrix": 1, "global": 2, "shared": 1, "special": 1, "float": 1, "integer": 1, "other": 2}
    assert instruction_mix(assembly) == expected


@pytest.mark.parametrize("dropout", [False, True])
def test_work_of_a_map(dropout: bool) -> None:
    logits = torch.empty(MAPS, ROWS, COLUMNS, dtype=torch.float16, device="meta")
    row_key = torch.empty(MAPS, ROWS, dtype=torch.int32, device="meta") if dropout else None
    work = work_of("softmax", Call({"logits": logits, "row_key": row_key}, (1,)))
    entries = MAPS * ROWS * COLUMNS
    assert work.arithmetic == (0, entries, 7 * entries if dropout else 0)
    assert work.moved == 2 * entries + (4 * MAPS * ROWS if dropout else 0)
    assert work.bound("sm_90") == ("memory", work.moved / GPUS["sm_90"].peaks.bytes)


def test_a_kernel_without_arithmetic_moves_its_tensors() -> None:
    x = torch.empty(1000, device="meta")
    bound, seconds = work_of("write", Call({"features": x, "queue": x}, (1,))).bound("sm_100")
    assert (bound, seconds) == ("memory", 8000 / 8000e9)


def test_launches_of_nothing_are_none() -> None:
    assert record_launches(lambda: None) == {}
