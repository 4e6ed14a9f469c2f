"""Offloaded block inputs: equal to the bit, whatever the copies' timing; what stays on the device, what is lent."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.errors import UserError
from loraedit_ext import launch, lora, plan
from loraedit_ext.config import ATTENTION, OFFLOAD, load_config
from models import offload
from models.blocks import TransformerBlock, slices
from models.offload import ON_DEVICE, HostInputs
from models.recompute import recomputed
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V
from tests.conftest import write_edit_folder
from tests.loraedit_ext.training.test_processes import numbers
from tests.loraedit_ext.training.test_streaming import (
    CPU,
    STORAGES,
    Clock,
    Moment,
    assert_equal,
    build,
    inputs_of,
    plan_of,
    run,
    train_and_sample,
    without_collector,
)
from tests.loraedit_ext.training.test_trainer import assert_same, lora_of
from tests.processes import launch as launch_processes

SETTING = "activation_checkpointing=offload"
TOKENS = 2 * 4 * 4
"""Of `inputs_of` a Wan."""
ONE_INPUT = TOKENS * 96 * 4
"""Its bytes: fp32."""


def offloaded(layers):
    """The chain with its inputs offloaded, and where to."""
    inputs = HostInputs(CPU)
    for layer in layers:
        layer.inputs = inputs
    return inputs


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """An input takes several pieces, the last of them in part, as at full size."""
    monkeypatch.setattr(offload, "_PIECE", 3000)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["wan", "token_replace", "latent_concat"])
def test_offloaded_equals_kept_to_the_bit(open_model, family, storage):
    model, dtype = open_model(family), STORAGES[storage][0]
    kept = train_and_sample(model, build(model, 0, storage), dtype)
    assert all(value.abs().max() > 0 for value in kept)
    for swapped in (0, 1, 2):
        layers = build(model, swapped, storage)
        inputs = offloaded(layers)
        assert_equal(train_and_sample(model, layers, dtype), kept)
        assert inputs.copied > 0
        assert inputs.lent == 0


ORDERS = {
    "one by one": "F0 B0 F1 B1 F2 B2 F3 B3", "1F1B": "F0 F1 B0 F2 B1 F3 B2 B3", "all forward": "F0 F1 F2 F3 B0 B1 B2 B3",
    "last first": "F0 F1 F2 F3 B3 B2 B1 B0",
}  # fmt: skip


def in_flight(model, layers, order):
    """Losses and gradients of four micro-batches of two sizes, in the order in which pipelines run them."""
    noisy, *rest = inputs_of(model)
    losses, found = {}, []
    for turn in order.split():
        number = int(turn[1])
        if turn[0] == "F":
            wide = torch.cat([noisy] * (1 + number % 2), dim=3)
            known = torch.cat([rest[1]] * (1 + number % 2), dim=3)
            losses[number] = run(layers, (wide * (number + 1), rest[0], known, *rest[2:])).square().mean()
            found.append(losses[number].detach())
        else:
            losses.pop(number).backward()
    return [*found, *(weight.grad for weight in lora.trainable(layers).values())]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_several_micro_batches_in_flight(open_model, order):
    model = open_model("wan")
    kept = in_flight(model, build(model, 0), order)
    layers = build(model, 0)
    inputs = offloaded(layers)
    assert_equal(in_flight(model, layers, order), kept)
    assert inputs.lent == 0


def in_two_stages(model, layers):
    """Losses and gradients of three micro-batches through a chain that is cut in two, the first stage one ahead."""
    noisy, *rest = inputs_of(model)
    sent, losses = {}, []

    def forward(number):
        stream = run(layers[:3], (noisy * (number + 1), *rest))
        sent[number] = stream[0]
        return (stream[0].detach().requires_grad_(), *stream[1:])

    def second_stage_and_back(number, received):
        losses.append(run(layers[3:], received).square().mean())
        losses[-1].backward()
        sent.pop(number).backward(received[0].grad)

    ahead = forward(0)
    for number in (1, 2, 3):
        received, ahead = ahead, forward(number)
        second_stage_and_back(number - 1, received)
    return [*(loss.detach() for loss in losses), *(weight.grad for weight in lora.trainable(layers).values())]


@pytest.mark.parametrize("family", ["wan", "token_replace", "latent_concat"])
def test_two_stages(open_model, family):
    model = open_model(family)
    kept = in_two_stages(model, build(model, 0))
    layers = build(model, 0)
    inputs = offloaded(layers[:3]), offloaded(layers[3:])
    assert_equal(in_two_stages(model, layers), kept)
    assert [each.lent for each in inputs] == [0, 0]
    assert all(each.copied > 0 for each in inputs)


@pytest.fixture
def late_and_spoiled(monkeypatch):
    """Copies as late as they may be, when computing waits for them; until then, and in memory that came back, NaN."""
    late = {}
    real_copy, real_leave, real_forget = HostInputs._copy, HostInputs._leave, HostInputs.forget

    def copy(self, kept, tensor, back):
        for target in [tensor] if back else kept.pieces:
            target.view(torch.uint8).fill_(0xFF)
        late[kept.number] = lambda: real_copy(self, kept, tensor, back)
        self._here[kept.number] = tensor, None

    def leave(self, number):
        late.pop(number)()
        return real_leave(self, number)

    def forget(self, kept):
        real_forget(self, kept)
        for piece in kept.pieces:
            piece.fill_(0xFF)

    for name, wrapped in (("_copy", copy), ("_leave", leave), ("forget", forget)):
        monkeypatch.setattr(HostInputs, name, wrapped)
    return late


@pytest.mark.parametrize("swapped", [0, 2])
@pytest.mark.parametrize("family", ["wan", "token_replace"])
def test_nothing_is_read_before_it_is_there_or_after_it_came_back(open_model, late_and_spoiled, family, swapped):
    """As early as possible is how a CPU copies; here is the other extreme, with NaN in between."""
    model = open_model(family)
    kept = train_and_sample(model, build(model, 0))
    layers = build(model, swapped)
    offloaded(layers)
    assert_equal(train_and_sample(model, layers), kept)
    assert not late_and_spoiled


def test_the_test_for_early_reads_can_fail(open_model, late_and_spoiled, monkeypatch):
    """An input that is used without waiting for its copy: NaN."""
    monkeypatch.setattr(HostInputs, "_leave", lambda self, number: self._here.pop(number)[0])
    model = open_model("wan")
    layers = build(model, 0)
    offloaded(layers)
    run(layers, inputs_of(model)).square().mean().backward()
    assert any(weight.grad.isnan().any() for weight in lora.trainable(layers).values())


class Stream(Clock):
    """A CUDA stream, with the rest of what is used here."""

    def wait_stream(self, other):
        other.tick()
        self.seen |= other.seen

    def record_event(self):
        event = Moment()
        event.record(self)
        return event


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a check that failed fails again at clean-up
@pytest.mark.parametrize("broken", ["", "computing does not wait", "copies do not wait"])
def test_events_order_copies_and_computing(open_model, monkeypatch, broken):
    """The code for GPUs on a model of streams and events: each copy comes after all that computed with the memory on the
    device before, and computing, which then uses or frees that memory, after the copy. Without the one or the other wait
    it does not, so the check can fail."""
    computing, copies, over = Stream("computing"), Stream("copies"), {}
    real_copy, real_leave = HostInputs._copy, HostInputs._leave

    def copy(self, kept, tensor, back):
        before = computing.tick()
        real_copy(self, kept, tensor, back)
        assert copies.seen["computing"] >= before
        over[kept.number] = copies.seen["copies"]

    def leave(self, number):
        tensor = real_leave(self, number)
        assert computing.seen["copies"] >= over.pop(number)
        return tensor

    for name, wrapped in (("_copy", copy), ("_leave", leave)):
        monkeypatch.setattr(HostInputs, name, wrapped)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    monkeypatch.setattr(torch.cuda, "stream", {copies: nullcontext()}.get)
    if broken == "computing does not wait":
        monkeypatch.setattr(computing, "wait_event", lambda _event: None)
    if broken == "copies do not wait":
        monkeypatch.setattr(copies, "wait_stream", lambda _other: None)
    model = open_model("wan")
    layers = build(model, 0)
    offloaded(layers)._copies = copies
    with pytest.raises(AssertionError, match=">=") if broken else nullcontext():
        in_flight(model, layers, ORDERS["1F1B"])
    assert broken or (copies.seen["copies"] > 20 and not over)


class Live(TorchDispatchMode):
    """Bytes of memory under floating-point tensors that were made in this context and still live."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        viewed = {storage._cdata for storage in self.storages((args, kwargs))}
        for storage in self.storages(out):
            if storage._cdata not in viewed and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        return out

    def storages(self, values):
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point()]

    @property
    def total(self):
        return sum(self.sizes.values())


@pytest.mark.parametrize("swapped", [0, 2])
def test_two_inputs_stay_on_the_device_and_no_more(seven_blocks, swapped):
    """Counted before each block's forward and backward. Without offloading each block adds its input."""
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    layers = build(model, swapped)
    counts = []

    def measure(inputs):
        with Live() as live:
            counts.clear()
            for layer in layers:
                layer.inputs = inputs
            before = [layer.register_forward_pre_hook(lambda *_: counts.append(live.total)) for layer in layers[1:-1]]
            out = run(layers, inputs_of(model)).mean()
            forward, between = counts.copy(), live.total
            for handle in before:
                handle.remove()
            out.backward()
        return forward, between

    measure(None)  # gradients of the LoRA exist from here on
    kept, kept_between = measure(None)
    assert [b - a for a, b in itertools.pairwise(kept)] == [ONE_INPUT] * 6
    inputs = HostInputs(CPU)
    forward, between = measure(inputs)
    assert [b - a for a, b in itertools.pairwise(forward)] == [ONE_INPUT] * ON_DEVICE + [0] * (6 - ON_DEVICE)
    assert kept_between - between == (7 - ON_DEVICE) * ONE_INPUT
    assert inputs.allocated == 7 * math.ceil(ONE_INPUT / 3000) * 3000


def test_no_more_than_two_are_on_the_device_in_the_backward_pass(seven_blocks, monkeypatch):
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    layers = build(model, 0)
    inputs = offloaded(layers)
    here, real = [], HostInputs._copy
    monkeypatch.setattr(HostInputs, "_copy", lambda *args, **kw: real(*args, **kw) or here.append(len(inputs._here)))
    in_flight(model, layers, ORDERS["1F1B"])
    assert max(here) == ON_DEVICE
    assert not inputs._here


def test_the_copies_are_those_of_the_documentation(seven_blocks, monkeypatch):
    """Each input goes out; all but the last two, which are still there, come back, each while the block after it computes."""
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    layers = build(model, 0)
    offloaded(layers)
    events, real_copy, real_unpack = [], HostInputs._copy, HostInputs._unpack

    def copy(self, kept, tensor, back):
        events.append(f"{'in' if back else 'out'} {kept.number % 7}")
        real_copy(self, kept, tensor, back)

    def unpack(self, kept):
        found = real_unpack(self, kept)
        events.append(f"use {kept.number % 7}")
        return found

    monkeypatch.setattr(HostInputs, "_copy", copy)
    monkeypatch.setattr(HostInputs, "_unpack", unpack)
    for _ in range(2):
        events.clear()
        run(layers, inputs_of(model)).mean().backward()
        assert events[:7] == [f"out {number}" for number in range(7)]
        assert ", ".join(events[7:]) == "use 6, in 4, use 5, in 3, use 4, in 2, use 3, in 1, use 2, in 0, use 1, use 0"


def test_passes_without_gradient_copy_nothing(open_model):
    for swapped in (0, 2):
        model = open_model("wan")
        layers = build(model, swapped)
        inputs = offloaded(layers)
        with torch.no_grad():
            run(layers, inputs_of(model))
        assert (inputs.copied, inputs.allocated) == (0, 0)


def test_host_memory_does_not_grow(open_model):
    """Over steps and over sizes: what the largest micro-batch needs serves all others."""
    model = open_model("wan")
    layers = build(model, 0)
    inputs = offloaded(layers)
    in_flight(model, layers, ORDERS["1F1B"])
    first, copied = inputs.allocated, inputs.copied
    for _ in range(3):
        in_flight(model, layers, ORDERS["1F1B"])
    assert (inputs.allocated, inputs.lent) == (first, 0)
    assert inputs.copied == 4 * copied


def fail(*_):
    raise ValueError("broken on purpose")


@pytest.mark.parametrize("swapped", [0, 2])
def test_an_error_in_a_block_and_a_graph_that_is_dropped_leave_nothing_lent(open_model, swapped):
    model = open_model("wan")
    kept = train_and_sample(model, build(model, 0))
    layers = build(model, swapped)
    inputs = offloaded(layers)
    handle = layers[3].block.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken on purpose"):
        run(layers, inputs_of(model))
    handle.remove()
    gc.collect()  # the error's frames may be part of a cycle
    assert inputs.copied > 0
    assert (inputs.lent, inputs._here) == (0, {})
    out = run(layers, inputs_of(model))
    assert inputs.lent > 0
    del out
    assert (inputs.lent, inputs._here) == (0, {})
    assert_equal(train_and_sample(model, layers), kept)


def test_an_error_in_a_recomputation_leaves_nothing_lent(open_model):
    model = open_model("wan")
    layers = build(model, 0)
    inputs = offloaded(layers)
    out = run(layers, inputs_of(model)).mean()
    layers[2].block.ffn.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken on purpose"):
        out.backward()
    assert inputs.lent > 0
    del out
    gc.collect()
    assert (inputs.lent, inputs._here) == (0, {})


def test_the_memory_is_free_when_the_transformer_is_dropped(open_model):
    model = open_model("wan")
    layers = build(model, 0)
    memory = weakref.ref(offloaded(layers))
    train_and_sample(model, layers)
    with without_collector():
        del layers
        assert memory() is None


def test_dropout_is_recomputed_with_the_same_chance():
    class Dropping(TransformerBlock):
        def __init__(self):
            super().__init__()
            self.drop, self.scale = torch.nn.Dropout(0.5), torch.nn.Parameter(torch.tensor(2.0))

        def pieces(self, x, at, most):
            return [(where, None) for where in slices(0, x.shape[1], 3)]

        def shared(self, at):
            return ()

        def normalise(self, x, shared, at):
            return x

        def project(self, normalised, shared, at):
            return (self.drop(normalised * self.scale).unsqueeze(2),) * 3

        def turn(self, q, k, at):
            return q * 1, k * 1

        def attend(self, q, k, v, at):
            return (q + k + v).flatten(2)

        def finish(self, x, attended, shared, at):
            return self.drop(x) + self.drop(attended)

    results = []
    for inputs in (None, HostInputs(CPU)):
        torch.manual_seed(0)
        block, x = Dropping(), torch.ones(1, 7, 5, requires_grad=True)
        out = recomputed(block, x, None, inputs=inputs)
        out.sum().backward()
        results += [out.detach(), x.grad, block.scale.grad]
        assert torch.equal(x.grad, out)  # every element is linear in its input
    assert_equal(results[:3], results[3:])
    assert len(results[0].unique()) > 3


def test_a_graph_that_is_kept_can_be_used_again(open_model):
    model = open_model("wan")
    gradients = []
    for offloads in (False, True):
        layers = build(model, 0)
        if offloads:
            offloaded(layers)
        out = run(layers, inputs_of(model)).square().mean()
        out.backward(retain_graph=True)
        out.backward()
        gradients.append([weight.grad for weight in lora.trainable(layers).values()])
    assert_equal(*gradients)


def test_the_plan_counts_what_is_offloaded(edit_folder, seven_blocks, monkeypatch):
    """Against what the same model really keeps and copies."""
    config, predict_of = plan_of(seven_blocks, edit_folder, tokens=TOKENS)
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)

    def predict(**changes):
        return predict_of(config.model_copy(update=changes))

    kept, found = predict(), predict(activation_checkpointing=OFFLOAD)
    monkeypatch.setattr(offload, "_PIECE", ONE_INPUT // 4)
    layers = build(model, 0)
    inputs = offloaded(layers)
    run(layers, inputs_of(model)).mean().backward()
    assert (kept.inputs, kept.offloaded, kept.on_host) == (0, 0, 0)
    assert found.inputs == found.on_host == inputs.allocated
    assert 2 * found.offloaded - ON_DEVICE * ONE_INPUT == inputs.copied
    assert kept.activations - found.activations == (7 - ON_DEVICE) * ONE_INPUT
    assert (found.weights, found.adapter) == (kept.weights, kept.adapter)
    both = predict(activation_checkpointing=OFFLOAD, blocks_to_swap=3)
    assert both.on_host == found.inputs + predict(blocks_to_swap=3).host
    stages = predict(activation_checkpointing=OFFLOAD, pipeline_stages=2, gradient_accumulation_steps=4)
    assert stages.inputs == 2 * found.inputs / 2
    assert stages.activations - found.activations == 4 * ONE_INPUT


def test_a_run_that_will_not_fit_is_told_of_offloading_first(edit_folder, seven_blocks):
    config, predict = plan_of(seven_blocks, edit_folder)
    offloads = config.model_copy(update={"activation_checkpointing": OFFLOAD})

    def advice(changed, device, host=None):
        return list(plan.advice(changed, predict, 7, plan.Machine(device, host)))

    def fits(**changes):
        return predict(config.model_copy(update=changes)).total / plan.HEADROOM + 1

    lines = advice(config, fits(blocks_to_swap=3))
    assert [line[:20] for line in lines[1:3]] == ["- activation_checkpo", "- blocks_to_swap = 3"]
    assert "'offload': about 0.0 GB, and 0.0 GB of host memory" in lines[1]
    smallest = advice(config, fits(blocks_to_swap=5, activation_checkpointing=OFFLOAD))
    assert "- blocks_to_swap = 5 with activation_checkpointing = 'offload': about" in smallest[2]
    assert "with" not in advice(offloads, fits(blocks_to_swap=5, activation_checkpointing=OFFLOAD))[1]
    assert "not alone: 5, the most" in advice(config, 1000)[2]
    assert "activation_checkpointing = 'offload'" in advice(config.model_copy(update={"pipeline_stages": 2}), 1000)[1]
    without = advice(config.model_copy(update={"activation_checkpointing": False}), 1000)
    assert [line.split(":")[0] for line in without[1:3]] == [
        "- activation_checkpointing = true", "- activation_checkpointing = 'offload'"]
    (text,) = advice(offloads.model_copy(update={"blocks_to_swap": 5}), None, host=1000)
    assert "activation_checkpointing = 'offload' (0.0 GB) and blocks_to_swap = 5 (0.0 GB) needs" in text
    assert advice(offloads, None, host=1e9) == []


def test_room_for_attention_is_told_of(edit_folder, seven_blocks):
    config, predict = plan_of(seven_blocks, edit_folder)
    keeps = predict(config.model_copy(update={"activation_checkpointing": ATTENTION}))
    row = 2000 * 96 * 4
    assert keeps.activations - predict(config).activations == pytest.approx(7 * row, rel=0.03)

    def room(device, **changes):
        return list(plan.room(config.model_copy(update=changes), predict, plan.Machine(device, None)))

    enough = keeps.total / plan.HEADROOM + 1
    assert "there is room for activation_checkpointing = 'attention', which is faster: about 0.0 GB" in room(enough)[0]
    assert room(enough - 2) == room(None) == room(enough, blocks_to_swap=1) == []
    assert room(enough, activation_checkpointing=OFFLOAD) == room(enough, activation_checkpointing=ATTENTION) == []
    short = config.model_copy(update={"activation_checkpointing": ATTENTION})
    assert "- activation_checkpointing = true: about" in list(plan.advice(short, predict, 7, plan.Machine(1000, None)))[1]


def test_the_plan_says_what_is_offloaded(edit_folder, capsys):
    launch.train(load_config(edit_folder.config, [SETTING]), dry_run=True)
    assert "offloaded the blocks' inputs wait in host memory: 0.00 GB a process" in capsys.readouterr().out


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
def test_a_run_is_that_without_offloading(tmp_path, tiny_wan, tiny_hunyuan, family):
    """With accumulation, dropout, 8-bit storage, evaluations, previews and swapped blocks; resumed with the other setting."""
    folder = write_edit_folder(tmp_path, family, tiny_wan if family == "wan" else tiny_hunyuan["token_replace"])
    common = ["gradient_accumulation_steps=2", "eval_every_n_steps=3", "adapter.dropout=0.1",
              "model.transformer_dtype=float8", "checkpoint_every_n_steps=2"]
    train(folder, *common)
    train(folder, *common, SETTING, "sample_every_n_steps=3", "preview.steps=1")
    kept, offloads = folder.runs()
    weights, rows = lora_of(kept, 6), numbers(folder.metrics(0))

    def assert_equal_runs():
        assert numbers(folder.metrics(1)) == numbers(folder.metrics(0)) == rows
        for run_ in (kept, offloads):
            assert_same(lora_of(run_, 6), weights)

    assert_equal_runs()
    for run_, settings in ((kept, [SETTING, "blocks_to_swap=2"]), (offloads, [])):
        (run_ / "latest").write_text("global_step2\n")
        (run_ / "step6" / lora.EXPORT_NAME).unlink()
        train(folder, *common, *settings, f"resume_from_checkpoint={run_.name}")
    assert_equal_runs()


@pytest.mark.slow
@pytest.mark.parametrize("setting", [SETTING, f"activation_checkpointing={ATTENTION}"])
def test_two_processes_keep_each_for_itself(edit_folder, setting):
    """To the bit what the same stages keep on the device, with more micro-batches than stages."""
    common = ["pipeline_stages=2", "gradient_accumulation_steps=4", "adapter.dropout=0.1", "eval_every_n_steps=3"]
    launch_processes(edit_folder, *common, processes=2)
    launch_processes(edit_folder, *common, setting, processes=2)
    kept, other = edit_folder.runs()
    assert numbers(edit_folder.metrics(0)) == numbers(edit_folder.metrics(1))
    assert_same(lora_of(kept, 6), lora_of(other, 6))


@pytest.mark.parametrize("word", ["offload", "unsloth"])
def test_diffusion_pipes_word_means_the_same(edit_folder, word):
    assert load_config(edit_folder.config, [f"activation_checkpointing={word}"]).activation_checkpointing == OFFLOAD


def test_other_words_are_refused(edit_folder):
    with pytest.raises(UserError, match=r"`activation_checkpointing` = 'cpu': expected true, false, 'attention' or 'offload'"):
        load_config(edit_folder.config, ["activation_checkpointing=cpu"])
