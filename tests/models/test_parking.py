"""A parked transformer leaves nothing on the device and comes back the same.

On a CPU both places are the same memory; here a move copies all the same, so that what stays behind can be told from what
has moved.
"""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from models.parking import park, sizes, unpark
from tests.loraedit_ext.training.test_streaming import CPU, STORAGES, build, inputs_of, ring_of, run


class Moves(TorchFunctionMode):
    """`Tensor.to` copies, as between two devices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


def tensors_of(layers):
    return [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]


def resident(layers):
    """What of a transformer is not in the buffers of streamed blocks."""
    rings = {layer.streamed.ring for layer in layers if layer.streamed}
    buffers = {buffer.bytes.data_ptr() for ring in rings for buffer in ring.buffers}
    return [tensor for tensor in tensors_of(layers) if tensor.untyped_storage().data_ptr() not in buffers]


def unmapped(layers):
    """Copy what a CPU leaves in the file's pages."""
    for tensor in resident(layers):
        tensor.data = tensor.clone()


def memory_of(layers):
    """References to the memory of what is resident."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in resident(layers)]


@pytest.mark.parametrize("swapped", [0, 1])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", ["wan", "token_replace"])
def test_what_was_parked_comes_back_the_same(open_model, family, storage, swapped):
    model, dtype = open_model(family), STORAGES[storage][0]
    layers = build(model, swapped, storage)
    unmapped(layers)
    inputs, before, expected = inputs_of(model), tensors_of(layers), sizes(layers)
    with torch.no_grad():
        out = run(layers, inputs, dtype)
    for _ in range(2):
        left = memory_of(layers)
        assert left
        with Moves():
            park(layers)
        assert all(reference.expired() for reference in left), "all of it was moved: weights, scales, LoRA"
        buffers = [buffer.bytes for buffer in ring_of(layers).buffers] if swapped else []
        assert not any(buffer.untyped_storage().nbytes() for buffer in buffers)
        with Moves():
            unpark(layers, CPU)
        for buffer in buffers:
            buffer.fill_(255)  # NaN: what new memory may hold
        assert all(tensor is same for tensor, same in zip(tensors_of(layers), before, strict=True))
        assert sizes(layers) == expected
        with torch.no_grad():
            assert torch.equal(run(layers, inputs, dtype), out)


def test_the_streamed_blocks_count_as_what_is_in_host_memory(open_model):
    """The same sum; the buffers, which are freed, are no part of it."""
    model = open_model("wan")
    (moved, resident), (_, streamed) = (sizes(build(model, swapped, "fp8")) for swapped in (0, 2))
    assert moved == 0  # from a CPU
    assert streamed == pytest.approx(resident, rel=0.02)
    meta = [layer.to("meta") for layer in build(model, 0, "fp8")]
    assert sizes(meta) == (resident, 0)
