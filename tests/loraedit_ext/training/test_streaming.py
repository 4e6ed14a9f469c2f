"""blocks_to_swap: streamed equals resident to the bit, whatever the copies' timing; what is copied, when, what stays."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from loraedit_ext import launch, lora, plan
from loraedit_ext.config import AdapterSettings, load_config
from loraedit_ext.pipeline import autocast
from models import base, checkpoint, streaming
from models.hunyuan.random_weights import tiny_config as tiny_hunyuan_config
from models.streaming import BUFFERS, Ring, StreamedBlock, block_bytes
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V
from tests.conftest import write_edit_folder
from tests.loraedit_ext.editing.test_editor import frames_of
from tests.loraedit_ext.training.test_processes import assert_close, numbers
from tests.loraedit_ext.training.test_trainer import assert_same, lora_of
from tests.processes import launch as launch_processes

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
STORAGES = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "fp8": (torch.bfloat16, E4M3),
            "int8": (torch.bfloat16, torch.int8)}


def build(model, swapped, storage="fp32"):
    """A transformer's chain with a LoRA none of whose gradients is zero, ready to train."""
    dtype, linears = STORAGES[storage]
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, dtype, CPU, linears, swapped)
    lora.inject(transformer, model, AdapterSettings(rank=2))
    lora.initialise(layers, 1, CPU)
    for name, weight in lora.trainable(layers).items():
        weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    for layer in layers:
        layer.recompute = True
    return layers


def ring_of(layers):
    (ring,) = {layer.streamed.ring for layer in layers if layer.streamed}
    return ring


def inputs_of(model):
    def random(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    t = torch.tensor([300.0])
    if isinstance(model, WanI2V):
        return random(1, 16, 2, 8, 8), t, random(1, 20, 2, 8, 8), random(1, 512, 64), random(1, 257, 80)
    config = tiny_hunyuan_config(model.variant)
    preserved = torch.zeros(1, 1, 2, 8, 8)
    preserved[:, :, 0] = 1
    return (random(1, config.in_channels, 2, 8, 8), t, random(1, 20, 64), torch.tensor([17]), random(1, 48),
            torch.tensor([6000.0]), preserved)


def run(layers, stream, dtype=torch.float32):
    with autocast(CPU, dtype):
        for layer in layers:
            stream = layer(stream)
    return stream


def train_and_sample(model, layers, dtype=torch.float32):
    """Outputs and gradients of two steps of two micro-batches each, with passes without gradient between them."""
    weights, found, inputs = lora.trainable(layers), [], inputs_of(model)
    for step in (1, 2):
        for micro in (1, 2):
            out = run(layers, (inputs[0] * micro, *inputs[1:]), dtype)
            out.square().mean().backward()
            found.append(out.detach())
        found += [weight.grad.clone() for weight in weights.values()]
        with torch.no_grad():
            found += [run(layers, (inputs[0] * 3, *inputs[1:]), dtype) for _ in range(2)]
            for weight in weights.values():
                weight -= 0.1 * step * weight.grad
                weight.grad = None
    return found


@contextmanager
def without_collector():
    """Memory that is free in here was freed at once, by nothing but its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def assert_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["wan", "token_replace", "latent_concat"])
def test_streamed_equals_resident_to_the_bit(open_model, family, storage):
    model, dtype = open_model(family), STORAGES[storage][0]
    resident = train_and_sample(model, build(model, 0, storage), dtype)
    assert all(value.abs().max() > 0 for value in resident)
    for swapped in (1, 2):
        layers = build(model, swapped, storage)
        assert sum(layer.streamed is not None for layer in layers) == swapped + BUFFERS
        assert_equal(train_and_sample(model, layers, dtype), resident)


def spoil(buffer):
    """All bits set: NaN in fp32, bf16 and e4m3."""
    buffer.bytes.fill_(0xFF)
    buffer.holds = None


@pytest.fixture
def late_and_spoiled(monkeypatch):
    """Copies as late as they may be, and buffers that hold NaN whenever no block may read them."""
    real_release, real_init = Ring.release, Ring.__init__

    def release(self, number, _following):
        real_release(self, number, -1)
        spoil(self.buffers[number % BUFFERS])

    def init(self, *arguments):
        real_init(self, *arguments)
        for buffer in self.buffers:
            spoil(buffer)

    monkeypatch.setattr(Ring, "release", release)
    monkeypatch.setattr(Ring, "__init__", init)
    monkeypatch.setattr(Ring, "_fill", lambda _self: None)


@pytest.mark.parametrize("storage", ["fp32", "fp8"])
@pytest.mark.parametrize("family", ["wan", "token_replace"])
def test_no_buffer_is_read_before_it_is_filled_or_after_it_came_back(open_model, late_and_spoiled, family, storage):
    """As early as possible is how a CPU copies; here is the other extreme, with NaN in between."""
    model, dtype = open_model(family), STORAGES[storage][0]
    resident = train_and_sample(model, build(model, 0, storage), dtype)
    assert_equal(train_and_sample(model, build(model, 2, storage), dtype), resident)


def test_the_test_for_early_reads_can_fail(open_model, late_and_spoiled, monkeypatch):
    """A buffer that comes back before the backward pass that reads it: NaN everywhere."""
    lent = StreamedBlock.lent

    @contextmanager
    def too_short(self, forward=True):
        with lent(self, forward):
            if forward:
                yield
        if not forward:
            yield

    monkeypatch.setattr(StreamedBlock, "lent", too_short)
    model = open_model("wan")
    layers = build(model, 2)
    run(layers, inputs_of(model)).square().mean().backward()
    gradients = [weight.grad for weight in lora.trainable(layers).values()]
    assert sum(gradient.isnan().any() for gradient in gradients) > len(gradients) / 2


def test_a_wrong_schedule_is_an_error_and_not_a_wrong_gradient(open_model, monkeypatch):
    model = open_model("wan")
    layers = build(model, 2)
    ring = ring_of(layers)
    ring.acquire(0)
    with pytest.raises(RuntimeError, match="block 2 would overwrite block 0 while it computes"):
        ring.acquire(2)
    with pytest.raises(RuntimeError, match="block 0 is already computing"):
        ring.acquire(0)
    with pytest.raises(RuntimeError, match="block 1 gives back a buffer that it was not lent"):
        ring.release(1, 3)
    ring.release(0, 2)
    ring.acquire(3)
    with pytest.raises(RuntimeError, match="block 1 would overwrite block 3 while it computes"):
        run(layers, inputs_of(model))


class Clock:
    """A CUDA stream as documented: its work runs in order, and after all that led to the events it waited for."""

    def __init__(self, name):
        self.name, self.seen = name, Counter()

    def tick(self):
        self.seen[self.name] += 1
        return self.seen[self.name]

    def wait_event(self, event):
        self.seen |= event.seen


class Moment:
    """A CUDA event: what its stream had done when it was recorded; waiting for one never recorded does nothing."""

    seen = Counter()

    def record(self, stream):
        stream.tick()
        self.seen = Counter(stream.seen)


@pytest.mark.parametrize("broken", ["", "computing does not wait", "copies do not wait"])
def test_events_order_copies_and_computing(open_model, monkeypatch, broken):
    """The code for GPUs on a model of streams and events: each copy comes after the last use of the bytes under it, each
    use after the copy. Without the one or the other wait it does not, so the check can fail."""
    computing, copies, current = Clock("computing"), Clock("copies"), []
    filled, used = [0] * BUFFERS, [0] * BUFFERS
    real_acquire, real_release, real_parts = Ring.acquire, Ring.release, Ring._parts

    def acquire(ring, number):
        real_acquire(ring, number)
        assert computing.seen["copies"] >= filled[number % BUFFERS] > 0

    def release(ring, number, following):
        used[number % BUFFERS] = computing.tick()
        real_release(ring, number, following)

    def parts(ring, number):
        assert current == [copies]
        assert copies.seen["computing"] >= used[number % BUFFERS]
        filled[number % BUFFERS] = copies.tick()
        return real_parts(ring, number)

    @contextmanager
    def stream(which):
        current.append(which)
        yield
        current.remove(which)

    for name, wrapped in (("acquire", acquire), ("release", release), ("_parts", parts)):
        monkeypatch.setattr(Ring, name, wrapped)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    if broken:
        monkeypatch.setattr(copies if "copies" in broken else computing, "wait_event", lambda _event: None)
    model = open_model("wan")
    layers = build(model, 2)
    ring = ring_of(layers)
    ring._copies = copies
    for buffer in ring.buffers:
        buffer.ready, buffer.free = Moment(), Moment()
    used[:] = [computing.tick()] * BUFFERS  # the memory's former user
    with pytest.raises(AssertionError, match=">=") if broken else nullcontext():
        train_and_sample(model, layers)
    assert broken or copies.seen["copies"] > 20


def test_the_copies_are_those_of_the_documentation(seven_blocks, monkeypatch):
    """blocks_to_swap = 3 of 7 streams five blocks: 3 forward and 3 backward for each micro-batch, 5 for a pass alone."""
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    layers = build(model, 3)
    ring, copies = ring_of(layers), []
    real = Ring._parts
    monkeypatch.setattr(Ring, "_parts", lambda self, number: copies.append(number) or real(self, number))
    one = block_bytes([tensor.nbytes for name, tensor in layers[1].original_parameters() if "lora" not in name])

    def copied(step):
        copies.clear()
        before = ring.copied
        step()
        assert ring.copied - before == len(copies) * one
        return copies.copy()

    def micro_batch():
        run(layers, inputs_of(model)).mean().backward()

    @torch.no_grad()
    def alone():
        run(layers, inputs_of(model))

    assert copied(micro_batch) == [0, 1, 2, 3, 4, 2, 1, 0]
    assert copied(micro_batch) == copied(micro_batch) == [2, 3, 4, 2, 1, 0]
    assert copied(alone) == [2, 3, 4]
    assert copied(alone) == copied(alone) == [0, 1, 2, 3, 4]
    assert copied(micro_batch) == [0, 1, 2, 3, 4, 2, 1, 0]


def test_so_many_blocks_fewer_stay_on_the_device(seven_blocks):
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)

    def on_device(layers):
        """Bytes of memory under all frozen weights, each address once."""
        frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
        return sum({p.data_ptr(): p.nbytes for p in frozen}.values())

    whole = build(model, 0)
    one = sum(p.nbytes for name, p in whole[1].original_parameters() if "lora" not in name)
    for swapped in (1, 3, 5):
        layers = build(model, swapped)
        ring = ring_of(layers)
        assert on_device(layers) == on_device(whole) - swapped * one
        assert sum(len(buffer.bytes) for buffer in ring.buffers) == pytest.approx(BUFFERS * one, rel=0.02)
        assert sum(len(piece) for pieces in ring.blocks for piece in pieces) == pytest.approx((swapped + 2) * one, rel=0.02)


def test_streamed_blocks_are_evenly_spread(seven_blocks):
    layers = WanI2V(WanCheckpoint.open(seven_blocks), CPU).build_transformer().layers()

    def chosen(count):
        return [layers.index(layer) - 1 for layer in streaming.streamed_blocks(layers, count)]

    assert chosen(0) == []
    assert chosen(1) == [2, 4, 6]
    assert chosen(5) == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"blocks_to_swap = 6: the model has 7 blocks.*expected at most 5"):
        streaming.streamed_blocks(layers, 6)


@pytest.mark.parametrize("storage", STORAGES)
def test_streamed_weights_never_take_room_on_the_device_while_they_load(seven_blocks, monkeypatch, storage):
    """Every tensor of a streamed block is made on the CPU, none of the others is; `meta` is the device here."""
    places = {}

    def spied(real):
        def spy(entry, dtype, device, *rest):
            places.setdefault(entry.source, set()).add(device.type)
            return real(entry, dtype, device, *rest)

        return spy

    monkeypatch.setattr(checkpoint, "materialise", spied(checkpoint.materialise))
    monkeypatch.setattr(base, "quantised", spied(base.quantised))
    model = WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    layers = model.build_transformer().layers()
    dtype, linears = STORAGES[storage]
    model.load_weights(layers, dtype, torch.device("meta"), linears, 1)
    streamed = {f"blocks.{index}." for index in (2, 4, 6)}
    assert len(places) > 200
    for source, kinds in places.items():
        assert kinds == ({"cpu"} if any(block in source for block in streamed) else {"meta"}), source


def test_the_whole_transformer_streams_as_its_layers_do(open_model):
    """Its chain of layers may be asked for again: the blocks know where their weights are."""
    model = open_model("wan")
    outputs = []
    for swapped in (0, 2):
        transformer = model.build_transformer()
        model.load_weights(transformer.layers(), torch.float32, CPU, None, swapped)
        with torch.no_grad():
            outputs.append(transformer(*inputs_of(model)))
    assert_equal(outputs[:1], outputs[1:])


def test_names_shapes_and_dtypes_are_those_without_streaming(open_model):
    for family in ("wan", "token_replace"):
        facts = [
            [(name, p.shape, p.dtype, p.requires_grad) for layer in build(open_model(family), swapped, "fp8")
             for name, p in layer.original_parameters()]
            for swapped in (0, 2)
        ]
        assert facts[0] == facts[1]


def test_the_memory_is_free_when_the_transformer_is_dropped(open_model):
    """At once, without waiting for the garbage collector: the VAE decodes next."""
    model = open_model("wan")
    layers = build(model, 2)
    train_and_sample(model, layers)
    memory = weakref.ref(ring_of(layers).buffers[0])
    with without_collector():
        del layers
        assert memory() is None


def test_blocks_larger_than_one_host_allocation(open_model, monkeypatch):
    monkeypatch.setattr(streaming, "_PIECE", 200 * 256)
    model = open_model("token_replace")
    layers = build(model, 2, "fp8")
    assert max(len(pieces) for pieces in ring_of(layers).blocks) > 2
    expected = train_and_sample(model, build(model, 0, "fp8"), torch.bfloat16)
    assert_equal(train_and_sample(model, layers, torch.bfloat16), expected)


def test_host_memory_that_cannot_be_page_locked_is_told_once(open_model, caplog):
    """Without a GPU nothing can be: the refusal is a warning, and the weights lie in ordinary memory."""
    model = open_model("wan")
    layers = model.build_transformer().layers()
    model.load_weights(layers, torch.float32, CPU)
    expected = torch.cat([parameter.flatten() for parameter in layers[1].parameters()])
    host = streaming.HostMemory(torch.device("cuda"))
    for layer in layers[1:4]:
        host.take(layer)
    assert [record.message[:14] for record in caplog.records] == ["blocks_to_swap"]
    assert "0.0 GB of host memory and no more" in caplog.text
    held = torch.cat(host.blocks[0]).view(torch.float32)
    assert set(expected.tolist()) <= set(held.tolist())
    assert all(parameter.is_meta for parameter in layers[1].parameters())


def test_a_lora_that_changes_norms_and_biases_reaches_the_host(open_model):
    """As step-distilled LoRAs do; both passes are equal, so the weights that come again have the change."""
    model = open_model("wan")
    names = ("blocks.0.norm3.weight", "blocks.3.ffn.2.bias", "blocks.2.self_attn.norm_q.weight")
    results = []
    for swapped in (0, 1, 2):
        transformer = model.build_transformer()
        layers = transformer.layers()
        model.load_weights(layers, torch.float32, CPU, None, swapped)
        with torch.no_grad():
            before = run(layers, inputs_of(model))
            shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
            differences = {name: torch.full(shapes[name], 0.25) for name in names}
            lora.attach(transformer, layers, lora.LoraFile(Path("distilled"), {}, {}, differences), CPU)
            results += [run(layers, inputs_of(model)), run(layers, inputs_of(model))]
        assert not torch.equal(before, results[-1])
    assert_equal(results[1:], results[:-1])


def plan_of(seven_blocks, folder, *overrides, tokens=2000):
    """Predicted memory with that configuration, and with any other."""
    config = load_config(folder.config, [f"model.ckpt_path={seven_blocks}", *overrides])
    model = launch.build_model(config, CPU)
    transformer = model.build_transformer()
    lora.inject(transformer, model, config.adapter)
    return config, lambda changed: plan.predict_memory(changed, model, transformer, tokens, 96, 7)


def test_the_plan_counts_what_is_streamed(edit_folder, seven_blocks):
    """Against what the streaming of the same model really holds and copies."""
    config, predict = plan_of(seven_blocks, edit_folder)
    resident, model = predict(config), WanI2V(WanCheckpoint.open(seven_blocks), CPU)
    assert (resident.host, resident.streamed, resident.copied) == (0, 0, 0)
    for swapped in (1, 3, 5):
        found = predict(config.model_copy(update={"blocks_to_swap": swapped}))
        layers = build(model, swapped)
        ring = ring_of(layers)
        assert found.host == pytest.approx(sum(len(piece) for pieces in ring.blocks for piece in pieces), rel=0.02)
        assert resident.weights - found.weights == pytest.approx(swapped * found.host / (swapped + 2))
        assert (found.streamed, found.adapter, found.activations) == (swapped + 2, resident.adapter, resident.activations)
        for _ in range(2):
            before = ring.copied
            run(layers, inputs_of(model)).mean().backward()
        assert found.copied == pytest.approx(ring.copied - before, rel=0.02)


def test_a_run_that_will_not_fit_is_told_what_helps(edit_folder, seven_blocks):
    config, predict = plan_of(seven_blocks, edit_folder)
    totals = [predict(config.model_copy(update={"blocks_to_swap": n})).total for n in range(6)]
    assert totals == sorted(totals, reverse=True)

    def advice(changed, device, host=None):
        return "\n".join(plan.advice(changed, predict, 7, plan.Machine(device, host)))

    assert advice(config, None) == advice(config, totals[0] / 0.9) == ""
    text = advice(config, (totals[3] + totals[2]) / 2 / plan.HEADROOM)
    assert "will not fit" in text
    assert "blocks_to_swap = 3: about" in text
    assert "- model.transformer_dtype = 'float8': about" in text
    eight = config.model_copy(update={"model": config.model.model_copy(update={"transformer_dtype": "float8"})})
    swapped = predict(eight.model_copy(update={"blocks_to_swap": 2})).total
    assert "'float8', blocks_to_swap = 2: about" in advice(config, swapped / plan.HEADROOM + 1)
    assert "not alone: 5, the most, are not enough" in advice(config, totals[5] / 2)
    split = config.model_copy(update={"pipeline_stages": 2})
    assert "more pipeline_stages" in advice(split, totals[5] / 4)
    assert "activation_checkpointing = true" in advice(config.model_copy(update={"activation_checkpointing": False}), totals[5])
    swapped = config.model_copy(update={"blocks_to_swap": 5})
    assert "GB of host memory a process" in advice(swapped, None, host=1000)
    assert advice(swapped, totals[5] / 0.9, host=1e9) == ""


def test_the_plan_says_what_is_swapped(edit_folder, capsys):
    launch.train(load_config(edit_folder.config, ["blocks_to_swap=1"]), dry_run=True)
    assert "swapped   3 of 4 blocks take turns in two buffers on the device" in capsys.readouterr().out


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


def edited(folder, run_, *overrides):
    config = load_config(folder.config, ["edit.output=png", "edit.composite=false", *overrides])
    return frames_of(launch.edit(config, run_ / "step6", folder.path / "out"))


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
def test_a_run_and_its_edit_are_those_without_swapping(tmp_path, tiny_wan, tiny_hunyuan, family):
    """With accumulation, evaluations, previews and a resume in the middle: losses, LoRA and frames to the bit."""
    folder = write_edit_folder(tmp_path, family, tiny_wan if family == "wan" else tiny_hunyuan["token_replace"])
    common = ["gradient_accumulation_steps=2", "eval_every_n_steps=3", "adapter.dropout=0.1", "model.transformer_dtype=float8"]
    train(folder, *common)
    swapped = [*common, "blocks_to_swap=2", "sample_every_n_steps=3", "preview.steps=1", "checkpoint_every_n_steps=2"]
    train(folder, *swapped)
    whole, second = folder.runs()
    assert folder.losses(1) == folder.losses(0)
    assert_same(lora_of(whole, 6), lora_of(second, 6))
    (second / "latest").write_text("global_step2\n")
    train(folder, *swapped, f"resume_from_checkpoint={second.name}")
    assert folder.losses(1) == folder.losses(0)
    assert_same(lora_of(whole, 6), lora_of(second, 6))
    resident = edited(folder, whole)
    assert (edited(folder, second, "blocks_to_swap=1") == resident).all()
    assert (edited(folder, second, "blocks_to_swap=2") == resident).all()


@pytest.mark.slow
def test_two_replicas_swap_each_for_itself(edit_folder):
    launch_processes(edit_folder, "gradient_accumulation_steps=2")
    launch_processes(edit_folder, "blocks_to_swap=2", processes=2)
    assert_close(numbers(edit_folder.metrics(0)), numbers(edit_folder.metrics(1)), 1e-6)


@pytest.mark.parametrize(("overrides", "words"), [
    (["blocks_to_swap=-1"], r"`blocks_to_swap` = -1: Input should be greater than or equal to 0"),
    (["blocks_to_swap=2", "pipeline_stages=2"], r"blocks_to_swap = 2 needs pipeline_stages = 1, found 2"),
    (["blocks_to_swap=2", "activation_checkpointing=false"], r"blocks_to_swap = 2 needs activation_checkpointing, not false"),
])
def test_what_does_not_go_together_is_refused(edit_folder, overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(edit_folder.config, overrides)


def test_too_many_blocks_are_told_before_anything_is_encoded_or_read(edit_folder):
    config = load_config(edit_folder.config, ["blocks_to_swap=3"])
    for verb in (launch.train, lambda config: launch.edit(config, None, None)):
        with pytest.raises(UserError, match=r"blocks_to_swap = 3: the model has 4 blocks.*expected at most 2"):
            verb(config)
    assert not edit_folder.runs()
    assert not (edit_folder.path / "cache").exists()
