"""Recomputed blocks: in pieces and whole the same, to fp32's rounding; what is kept, what is alive, what is computed again."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.activations import EXACT, STORAGE, SUBJECTS, WAYS, Storage, Subject, measure
from common.errors import UserError
from loraedit_ext import launch
from loraedit_ext.config import load_config
from models import blocks, eight_bit, recompute
from models.blocks import computing, resident, slices
from models.eight_bit import EightBitLinear
from models.hunyuan import transformer as hunyuan
from models.layers import compile_blocks
from models.recompute import recomputed

GRID = (2, 4, 5)
PLAIN = WAYS["nothing recomputed (`false`)"]


def subject(name, storage=EXACT, batch=1):
    """A small block of a kind, a Hunyuan one with padding at the end of a sample's text."""
    made = SUBJECTS[name](GRID, storage)
    at = made.at
    if isinstance(at, hunyuan.Conditions):
        vector, clean = at.vector.repeat(batch, 1), at.clean.repeat(batch, 1)
        lengths = [made.x.shape[1] - 3 * (index + 1) for index in range(batch)]
        at = hunyuan.Conditions(vector, at.rope, lengths, clean, at.preserved.repeat(batch, 1))
    x = torch.randn(batch, *made.x.shape[1:], generator=torch.Generator().manual_seed(0))
    return Subject(made.block, x, at)


def gradients(part, run):
    """Of the input and of every weight that has one, and the output."""
    x = part.x.clone().requires_grad_()
    weights = {name: weight for name, weight in part.block.named_parameters() if weight.requires_grad}
    output = run(part.block, x, part.at)
    found = torch.autograd.grad(output.square().mean(), [x, *weights.values()])
    return dict(zip(["output", "input", *weights], [output.detach(), *found], strict=True))


def agree(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_slices_are_few_and_even():
    assert slices(0, 10, 10) == [slice(0, 10)]
    assert slices(2, 12, 4) == [slice(2, 5), slice(5, 8), slice(8, 12)]
    assert [part.stop - part.start for part in slices(0, 20280, 4096)] == [4056] * 5


@pytest.mark.parametrize("trained", ["LoRA", "gates too", "everything"])
@pytest.mark.parametrize("most", [1000, 7])
@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_are_those_of_a_block_that_keeps_everything(monkeypatch, name, most, trained):
    monkeypatch.setattr(blocks, "PIECE", most)
    part = subject(name, batch=2)
    for weight_name, weight in part.block.named_parameters():
        if trained == "everything" or (trained == "gates too" and "mod" in weight_name):
            weight.requires_grad_(True)
    expected = gradients(part, PLAIN)
    for keeps in (False, True):
        agree(gradients(part, partial(recomputed, keep_attention=keeps)), expected, 1e-5)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_piece_that_is_forgotten_is_noticed(monkeypatch, name):
    """The test above can fail."""
    monkeypatch.setattr(blocks, "PIECE", 7)
    part = subject(name, batch=2)
    expected = gradients(part, PLAIN)
    real = recompute._Backward._through_finish

    def but_one(self, attended):
        whole, self.pieces = self.pieces, self.pieces[1:]
        passed = real(self, attended)
        self.pieces = whole
        return passed

    monkeypatch.setattr(recompute._Backward, "_through_finish", but_one)
    with pytest.raises(AssertionError):
        agree(gradients(part, recomputed), expected, 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", SUBJECTS)
def test_sampling_in_pieces(monkeypatch, name):
    part = subject(name, batch=2)
    whole = part.block(part.x, part.at)
    monkeypatch.setattr(blocks, "PIECE", 7)
    found = part.block(part.x, part.at)
    assert (found - whole).norm() <= 1e-6 * whole.norm()


class Operations(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SUBJECTS)
def test_attention_that_is_kept_is_not_computed_again(name):
    ran = {}
    for keeps in (False, True):
        with Operations() as operations:
            found = gradients(subject(name), partial(recomputed, keep_attention=keeps))
        ran[keeps] = operations.ran["_scaled_dot_product_flash_attention_for_cpu"]
        again = found if not keeps else again  # noqa: F821
    assert ran[False] - ran[True] == 1
    agree(found, again, 0.0)


# Of the linears of a block, the part that ends a branch.
LAST = {"Wan": 1728 / (6 * 640 + 2 * 1728), "HunyuanVideo, double": 4 / 12, "HunyuanVideo, single": 5 / 12}


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_ends_a_branch_is_not_computed_again(name):
    """Unless its gate is trained."""
    part = subject(name)
    found, kept = (measure(part, run, torch.float32) for run in (recomputed, PLAIN))
    linears = kept.forward[0]
    assert (found.total[0] - kept.total[0]) / linears == pytest.approx(1 - LAST[name], abs=0.08)
    for weight_name, weight in part.block.named_parameters():
        weight.requires_grad_(weight.requires_grad or "mod" in weight_name)
    found, kept = (measure(part, run, torch.float32) for run in (recomputed, PLAIN))
    assert (found.total[0] - kept.total[0]) / linears == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_block_keeps_one_row_and_works_in_few(monkeypatch, name):
    """In bf16 at a size that has fused attention, in ten pieces; a row is one bf16 activation."""
    part = SUBJECTS[name]((4, 32, 32), STORAGE["bf16"])
    monkeypatch.setattr(blocks, "PIECE", -(-part.x.shape[1] // 10))
    row = 2 * part.x.numel()
    found = {way: measure(part, run) for way, run in WAYS.items()}
    kept = [measured.kept / row for measured in found.values()]
    alive = [measured.peak / row for measured in found.values()]
    assert kept[1:] == pytest.approx([2, 1, 2.02], abs=0.1)
    assert max(alive[2:]) < 14.5 < 33 < alive[1]


def test_a_backward_pass_that_never_comes_leaves_nothing_behind(monkeypatch):
    """Neither what is kept of attention nor anything that another pass would stumble over."""
    part = subject("Wan")
    results = []

    class Noted(recompute._Attention):
        def __init__(self, *given):
            super().__init__(*given)
            results.extend(weakref.ref(result.untyped_storage()) for _, result, _ in self._groups)

    monkeypatch.setattr(recompute, "_Attention", Noted)
    output = recomputed(part.block, part.x.clone().requires_grad_(), part.at, keep_attention=True)
    assert all(result() is not None for result in results)
    del output
    gc.collect()
    assert results
    assert not any(result() is not None for result in results)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        recomputed(part.block, part.x.clone().requires_grad_(), part.at, keep_attention=True)
    assert gradients(part, recomputed).keys() == gradients(part, PLAIN).keys()


def test_8_bit_weights_are_upcast_once_for_all_pieces(monkeypatch):
    """Once in a pass forward, once in a pass back, and let go of behind it."""
    part = subject("Wan", Storage(torch.float32, torch.float8_e4m3fn))
    replaced = [module for module in part.block.modules() if isinstance(module, EightBitLinear)]
    calls = []
    real = eight_bit.dequantise
    monkeypatch.setattr(eight_bit, "dequantise", lambda *given: calls.append(1) or real(*given))
    whole = gradients(part, recomputed)
    monkeypatch.setattr(blocks, "PIECE", 7)
    calls.clear()
    output = recomputed(part.block, part.x.clone().requires_grad_(), part.at)
    assert len(calls) == len(replaced) == 12
    output.square().mean().backward()
    assert len(calls) == 2 * 12
    assert all(linear.upcast is None for linear in replaced)
    agree(gradients(part, recomputed), whole, 1e-5)


def test_kept_attention_trains_the_same(edit_folder):
    for value in (True, "attention"):
        launch.train(load_config(edit_folder.config, [f"activation_checkpointing={value}"]))
    assert edit_folder.losses(0) == edit_folder.losses(1)


def traced(monkeypatch, backend: str) -> list:
    """What is compiled from now on, by torch.compile without the C++ compiler, which takes half a minute."""
    calls = []
    real = torch.compile

    def compiled(function, **given):
        calls.append(function)
        return real(function, backend=backend, **given)

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo, single"])
def test_compiled_pieces_compute_the_same(monkeypatch, name):
    """Traced and differentiated as always."""
    monkeypatch.setattr(blocks, "PIECE", 30)
    calls = traced(monkeypatch, "aot_eager")
    part = subject(name)
    expected, kept = gradients(part, recomputed), gradients(part, PLAIN)
    with torch.no_grad():
        sampled = part.block(part.x, part.at)
    part.block.compile_pieces()
    assert len(calls) == 4
    agree(gradients(part, recomputed), expected, 1e-5)
    agree(gradients(part, PLAIN), kept, 1e-5)
    with torch.no_grad():
        assert torch.allclose(part.block(part.x, part.at), sampled, atol=1e-5)


@pytest.mark.parametrize("name", ["Wan"])
def test_programs_serve_clips_of_any_length(monkeypatch, name):
    """Whole graphs, few enough that torch does not give up and run the rest without them."""
    monkeypatch.setattr(blocks, "PIECE", 30)
    traced(monkeypatch, "eager")
    torch._dynamo.reset()
    counters.clear()
    compiled = subject(name).block
    compiled.compile_pieces()
    for grid in (GRID, (3, 7, 11), (1, 4, 7), (3, 5, 9)):
        part = replace(SUBJECTS[name](grid, EXACT), block=compiled)
        with torch.no_grad(), computing(compiled, part.x, resident):
            compiled(part.x, part.at)
        for keeps in (False, True):
            gradients(part, partial(recomputed, keep_attention=keeps))
    assert counters["stats"]["unique_graphs"] <= 20
    assert not counters["graph_break"]
    assert not counters["unimplemented"]
    torch._dynamo.reset()


def test_a_compiled_run_is_that_without(edit_folder, monkeypatch):
    """With 8-bit weights that are upcast for several pieces."""
    monkeypatch.setattr(blocks, "PIECE", 30)
    calls = traced(monkeypatch, "eager")
    for values in ([], ["compile=true", "model.transformer_dtype=float8"], ["model.transformer_dtype=float8"]):
        launch.train(load_config(edit_folder.config, values))
    assert edit_folder.losses(1) == pytest.approx(edit_folder.losses(2), rel=1e-6)
    assert edit_folder.losses(0) != edit_folder.losses(1)
    assert len(calls) == 1 + 4 * 4  # blocks


def test_a_machine_that_cannot_compile_is_told_at_once(monkeypatch):
    def broken(_function, **_given):
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"compile = true: .*no C\+\+ compiler found\. It needs a C\+\+ compiler"):
        compile_blocks([], torch.device("cpu"))


def test_integer_weights_train_and_edit_and_resume(edit_folder):
    """With products of integers too: near the run in fp32, and the same when continued."""
    integers = ["model.transformer_dtype=int8", "model.int8_matmul=true", "checkpoint_every_n_steps=2"]
    for values in ([], ["model.transformer_dtype=int8"], integers):
        launch.train(load_config(edit_folder.config, values))
    exact, stored, multiplied = (edit_folder.losses(index) for index in range(3))
    assert exact != stored != multiplied
    assert stored == pytest.approx(exact, rel=0.01)
    assert multiplied == pytest.approx(exact, rel=0.01)
    run = edit_folder.runs()[2]
    (run / "latest").write_text("global_step2\n")
    launch.train(load_config(edit_folder.config, [*integers, f"resume_from_checkpoint={run.name}"]))
    assert edit_folder.losses(2) == multiplied
    launch.edit(load_config(edit_folder.config, [*integers, "edit.steps=2"]), None, None)


def test_integer_products_need_integer_weights(edit_folder):
    with pytest.raises(UserError, match="int8_matmul needs transformer_dtype = 'int8', found 'float8'"):
        load_config(edit_folder.config, ["model.int8_matmul=true", "model.transformer_dtype=float8"])
