"""A transformer is made once for all pieces of an edit if host memory has room, and is off the device while encoders work."""

from __future__ import annotations

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import inference
from dataset.images import write_png
from loraedit_ext import launch, lora
from loraedit_ext import run as runs
from loraedit_ext.config import load_config
from loraedit_ext.editing import experts
from loraedit_ext.editing.editor import Editor
from loraedit_ext.editing.experts import Expert, Transformers
from loraedit_ext.editing.results import RECORD
from loraedit_ext.pipeline import World, alone
from models import parking
from models.base import I2VModel
from models.wan.checkpoint import WanCheckpoint
from tests.conftest import write_edit_folder
from tests.loraedit_ext.editing.test_editor import frames_of
from tests.loraedit_ext.test_wan22 import lora_file, model_of
from tests.models.test_blocks import traced
from tests.models.test_parking import Moves, memory_of, unmapped

CPU = torch.device("cpu")
GB = 10**9
PLENTY = 1000 * GB
IN_THREE = ["edit.clip_frames=5", "edit.composite=false"]


def lengthened(folder):
    """13 frames: three pieces of five."""
    for name in ("source", "mask"):
        for index in range(9, 13):
            shutil.copy(folder.path / name / "008.png", folder.path / name / f"{index:03d}.png")
    return folder


@pytest.fixture
def trained(edit_folder):
    launch.train(load_config(edit_folder.config))
    return lengthened(edit_folder)


@pytest.fixture
def hunyuan(tmp_path, tiny_hunyuan):
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])
    launch.train(load_config(folder.config))
    return lengthened(folder)


@pytest.fixture
def wan22(tmp_path, tiny_wan22):
    return lengthened(write_edit_folder(tmp_path, "wan", tiny_wan22))


@pytest.fixture
def host(monkeypatch):
    """Sets how much host memory is available; moves copy, as between two devices."""
    for function in (parking.park, parking.unpark):

        def moved(*arguments, function=function):
            with Moves():
                function(*arguments)

        monkeypatch.setattr(experts, function.__name__, moved)
    return lambda available: monkeypatch.setattr(experts, "ram", lambda: (available, 0))


@pytest.fixture
def loads(monkeypatch):
    """What is loaded from files, in order."""
    found = []

    def counting(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given: found.append(what) or real(self, *given))

    counting(I2VModel, "load_weights", "transformer")
    counting(WanCheckpoint, "load_vae", "vae")
    return found


class Device:
    """What transformers have on it, as an edit goes on."""

    def __init__(self, monkeypatch) -> None:
        self.sampled, self.encoded = 0, 0
        self._memory, self._rings = {}, weakref.WeakSet()
        load, layers_at, run_encoder = Transformers._load, Transformers._layers_at, I2VModel.run_encoder

        def loading(transformers, expert):
            layers = load(transformers, expert)
            unmapped(layers)
            return layers

        def sampling(transformers, timestep):
            layers = layers_at(transformers, timestep)
            self._memory[transformers._here] = memory_of(layers)
            self._rings |= {layer.streamed.ring for layer in layers if layer.streamed}
            self.sampled += 1
            assert self.holds() == {transformers._here}, "one at a time"
            return layers

        def encoding(model, *arguments):
            self.encoded += 1
            assert not self.holds()
            return run_encoder(model, *arguments)

        monkeypatch.setattr(Transformers, "_load", loading)
        monkeypatch.setattr(Transformers, "_layers_at", sampling)
        monkeypatch.setattr(I2VModel, "run_encoder", encoding)

    def holds(self):
        """The experts any of whose memory is there; buffers of streamed blocks are everybody's."""
        found = {number for number, memory in self._memory.items() if not all(each.expired() for each in memory)}
        full = any(buffer.bytes.untyped_storage().nbytes() for ring in self._rings for buffer in ring.buffers)
        assert found or not full
        return found


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def editor_of(folder, *overrides):
    config = load_config(folder.config, [*IN_THREE, *overrides])
    model = launch.build_model(config, CPU)
    other = None
    if config.model.expert:
        other = launch._other_expert(config, launch.open_job(config, model), CPU, lambda line: None)
        adapter = lora.read(lora_file(folder, "low", 1), model)
    else:
        adapter = lora.read(runs.newest_lora(config.output_dir), model)
    return Editor(config, model, adapter, alone(CPU), launch.cache_of(config), (), other)


def generated(editor):
    return editor.edit(launch.open_job(editor.config, editor.model)).generated


STORAGES = [
    [], ["model.transformer_dtype=int8", "model.int8_matmul=true"], ["blocks_to_swap=2", "model.transformer_dtype=float8"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", STORAGES, ids=" ".join)
def test_made_once_an_edit_is_to_the_bit_that_of_loading_for_each_piece(trained, host, loads, device, overrides):
    overrides = [*overrides, "edit.steps=3", "edit.guidance=2"]
    host(0)
    expected = generated(editor_of(trained, *overrides))
    assert loads.count("transformer") == 3
    shutil.rmtree(trained.path / "cache")
    loads.clear()
    host(PLENTY)
    assert (generated(editor_of(trained, *overrides)) == expected).all()
    assert loads.count("transformer") == 1
    assert loads.count("vae") == 4, "what decodes a piece encodes the next"
    assert device.sampled
    assert device.encoded


def test_it_is_made_once_for_hunyuanvideo(hunyuan, host, loads, device):
    host(0)
    expected = generated(editor_of(hunyuan))
    loads.clear()
    host(PLENTY)
    assert (generated(editor_of(hunyuan, f"cache_dir={hunyuan.path / 'other'}")) == expected).all()
    assert loads.count("transformer") == 1
    assert device.encoded


@pytest.mark.parametrize("overrides", [[], ["blocks_to_swap=1"], ["model.transformer_dtype=float8"]], ids=" ".join)
def test_two_experts_are_made_once_and_never_both_on_the_device(wan22, host, loads, device, overrides):
    overrides = [*overrides, "model.expert=low", f"edit.other_lora={lora_file(wan22, 'high', 0)}", "edit.steps=4"]
    host(0)
    expected = generated(editor_of(wan22, *overrides))
    assert loads.count("transformer") == 6
    loads.clear()
    host(PLENTY)
    assert (generated(editor_of(wan22, *overrides)) == expected).all()
    assert loads.count("transformer") == 2
    assert not device.holds()


def test_nothing_is_left_after_an_edit(trained, host, device, monkeypatch):
    """Also where the last piece, for which the transformer was to wait, is none in which anything is marked."""
    host(PLENTY)
    for index in range(9, 13):
        write_png(trained.path / "mask" / f"{index:03d}.png", np.zeros((64, 64), np.uint8))
    editor, parked, park = editor_of(trained), [], experts.park
    monkeypatch.setattr(experts, "park", lambda layers: park(layers) or parked.extend(map(weakref.ref, layers)))
    generated(editor)
    assert len(parked) == 2 * 6
    assert all(reference() is None for reference in parked)
    assert not device.holds()
    assert not editor.model._encoders


def test_an_edit_in_one_piece_moves_nothing(trained, host, monkeypatch):
    host(PLENTY)
    monkeypatch.setattr(experts, "park", None)
    generated(editor_of(trained, "edit.clip_frames=13"))


def test_compiled_programs_are_kept(trained, host, monkeypatch):
    """Dynamo's, that is; the C++ compiler behind it takes a minute and is left out."""
    traced(monkeypatch, "eager")
    torch._dynamo.reset()
    counters.clear()
    host(PLENTY)
    editor, graphs = editor_of(trained, "compile=true"), []
    end = editor.transformers.end
    editor.transformers.end = lambda: graphs.append(counters["stats"]["unique_graphs"]) or end()
    generated(editor)
    assert len(graphs) == 3
    assert graphs[0] > 0
    assert len(set(graphs)) == 1


@pytest.fixture
def both(wan22, monkeypatch):
    """Makes Wan2.2's transformers: of each 7 GB would move to host memory, where 3 are."""

    def make(world, available):
        config = load_config(wan22.config, ["model.expert=low"])
        monkeypatch.setattr(experts, "sizes", lambda layers: (7 * GB, 3 * GB))
        monkeypatch.setattr(experts, "ram", lambda: (available, 0))
        return Transformers(config, [Expert(model_of(wan22, f"model.expert={name}"), []) for name in ("high", "low")], world)

    return make


def sample(transformers, again):
    """Which experts there are beside the one on the device: in the middle of a sampling, and behind it."""
    transformers.begin(again)
    transformers._layers_at(torch.tensor(0.0))
    middle = transformers._made.keys() - {transformers._here}
    transformers.end()
    return middle, transformers._made.keys() - {transformers._here}


@pytest.mark.parametrize(("available", "processes", "expected"), [
    (18 * GB, 1, ({0}, {0, 1})), (18 * GB - 1, 1, (set(), set())), (18 * GB, 2, (set(), set())), (36 * GB, 2, ({0}, {0, 1})),
    (None, 1, (set(), set())),
])  # fmt: skip
def test_host_memory_must_have_room_for_what_waits_for_encoders_and_for_what_is_to_be_loaded(
    both, caplog, available, processes, expected
):
    """7 + 3 + 8 GB for each process of the host, until both are made."""
    caplog.set_level("INFO")
    assert sample(both(World(0, 0, processes, CPU, processes), available), True) == expected
    assert ("18.0 GB of host memory are needed" in caplog.text) == (expected[1] == set())


def test_with_both_made_one_waits_in_less_and_the_other_is_loaded_again_where_that_is_lacking(both, monkeypatch):
    transformers = both(alone(CPU), 18 * GB)
    sample(transformers, True)
    monkeypatch.setattr(experts, "ram", lambda: (15 * GB, 0))
    assert sample(transformers, True) == ({0}, {0, 1})
    monkeypatch.setattr(experts, "ram", lambda: (15 * GB - 1, 0))
    assert sample(transformers, True) == (set(), set())


def test_a_process_without_encoders_keeps_on_the_device_what_it_sampled_with_last(both, loads):
    transformers = both(World(1, 1, 2, CPU, 2), PLENTY)
    sample(transformers, True)
    assert transformers._here == 1
    sample(transformers, False)
    assert transformers._made == {}
    assert loads.count("transformer") == 2


def test_several_seeds_are_edits_of_their_own_with_one_transformer(trained, host, loads, device, tmp_path):
    host(PLENTY)
    settings = ["edit.steps=3", "edit.output=png"]
    apart = [launch.edit(load_config(trained.config, [*settings, f"edit.seed={seed}"]), None, tmp_path / f"{seed}")
             for seed in (1, 2)]  # fmt: skip
    assert loads.count("transformer") == 2
    loads.clear()
    config = load_config(trained.config, settings)
    together = launch.edit_with_seeds(config, None, tmp_path / "all", [1, 2])
    assert loads.count("transformer") == 1
    assert [folder.name for folder in together] == ["seed_1", "seed_2"]
    for one, other in zip(apart, together, strict=True):
        assert (frames_of(one) == frames_of(other)).all()
        assert json.loads((other / RECORD).read_text())["config"]["edit"]["seed"] == int(one.name)
    assert (frames_of(apart[0]) != frames_of(apart[1])).any()
    beside = launch.edit_with_seeds(config, None, None, [1, 2])
    assert [folder.name for folder in beside] == ["edit", "edit_2"]
    assert launch.edit_with_seeds(config, None, None, [2, 1]) == beside[::-1]
    assert not device.holds()


def test_seeds_on_the_command_line(trained, capsys):
    assert inference.main(["--config", str(trained.config), "--seeds", "3,5,3", "edit.steps=1"]) == 0
    out = capsys.readouterr().out
    assert "seed      3, 1 of 2" in out
    assert "seed      5, 2 of 2" in out
    with pytest.raises(SystemExit):
        inference.main(["--config", str(trained.config), "--seeds", "3,x"])
    assert "--seeds: invalid integers value: '3,x'" in capsys.readouterr().err
