"""HunyuanVideo's LoRA names: fused linears of the original, split ones of diffusers, the same effect."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from models.hunyuan.keys import LORA

DIM, MLP, RANK = 6, 24, 3
HEAD = "single_blocks.1.linear1"
THEIRS = [f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]


def branch(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, DIM, generator=g), torch.randn(rows, RANK, generator=g)


def weights(module, pair):
    return {f"{module}.lora_A.weight": pair[0], f"{module}.lora_B.weight": pair[1]}


def effect(state, module):
    return state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]


def read(state):
    """As a file with diffusers' names is read."""
    named = {f"{LORA.original(name.rpartition('.lora_')[0])}.lora_{name.rpartition('.lora_')[2]}": value
             for name, value in state.items()}
    return LORA.from_library(named)


def test_separately_trained_parts_become_one_fused_branch():
    state, rows = {}, [DIM, DIM, DIM, MLP]
    for seed, (name, size) in enumerate(zip(THEIRS, rows, strict=True)):
        state |= weights(name, branch(size, seed))
    joined = read(state)
    assert joined.keys() == weights(HEAD, (0, 0)).keys()
    expected = torch.cat([effect(state, name) for name in THEIRS])
    torch.testing.assert_close(effect(joined, HEAD), expected)


@pytest.mark.parametrize("present", [[0], [0, 2], [1, 3]])
def test_parts_that_were_not_trained_get_zeros(present):
    rows = [DIM, DIM, DIM, 4 * DIM]
    state = {}
    for index in present:
        state |= weights(THEIRS[index], branch(rows[index], index))
    expected = [effect(state, name) if i in present else torch.zeros(rows[i], DIM) for i, name in enumerate(THEIRS)]
    torch.testing.assert_close(effect(read(state), HEAD), torch.cat(expected))


@pytest.mark.parametrize(("module", "rows"), [
    (HEAD, 3 * DIM + MLP), ("double_blocks.0.img_attn_qkv", 3 * DIM), ("double_blocks.19.txt_mlp.fc1", MLP),
    ("txt_in.individual_token_refiner.blocks.1.self_attn_qkv", 3 * DIM), ("final_layer.adaLN_modulation.1", 2 * DIM),
])
def test_to_diffusers_and_back_is_exact(module, rows):
    ours = weights(module, branch(rows))
    theirs = LORA.to_library(ours)
    again = read(theirs)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_the_last_modulation_swaps_shift_and_scale():
    a, b = branch(2 * DIM)
    theirs = LORA.to_library(weights("final_layer.adaLN_modulation.1", (a, b)))
    assert torch.equal(theirs["norm_out.linear.lora_B.weight"], torch.cat([b[DIM:], b[:DIM]]))


def test_kohyas_underscores_are_undone():
    assert LORA.original("double_blocks_12_img_attn_qkv") == "double_blocks.12.img_attn_qkv"
    assert LORA.original("single_blocks_3_modulation_linear") == "single_blocks.3.modulation.linear"
    assert LORA.kohya("double_blocks.12.txt_mlp.fc2") == "lora_unet_double_blocks_12_txt_mlp_fc2"
    assert LORA.original("blocks.0.self_attn.q") is None


def test_two_spellings_of_one_linear_are_refused():
    state = weights(HEAD, branch(3 * DIM + MLP)) | weights(THEIRS[0], branch(DIM))
    with pytest.raises(UserError, match="two spellings"):
        read(state)
