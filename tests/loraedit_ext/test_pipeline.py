"""The processes of a run, and the split of layers over stages."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from common.errors import UserError
from loraedit_ext import launch
from loraedit_ext.pipeline import World, check_world, distributed, planned_world, split, stage_of
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer


@pytest.fixture
def layers():
    with torch.device("meta"):
        config = WanConfig(dim=96, ffn_dim=192, num_heads=3, num_layers=6, text_dim=8, image_dim=8)
        return WanTransformer(config).layers()


@pytest.mark.parametrize("method", ["parameters", "uniform"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_layer_belongs_to_one_stage_and_every_stage_trains(layers, method, stages):
    bounds = split(layers, stages, method, [])
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(layers), stages + 1)
    assert bounds == sorted(set(bounds))


def test_manual_cuts_are_taken_as_they_are(layers):
    assert split(layers, 3, "manual", [2, 5]) == [0, 2, 5, 8]


@pytest.mark.parametrize("cuts", [[1], [7], [8]])
def test_a_stage_without_a_block_is_refused(layers, cuts):
    with pytest.raises(UserError, match=r"no transformer block.*6 blocks"):
        split(layers, 2, "manual", cuts)


def test_ranks_map_to_stages_as_deepspeed_lays_them_out():
    """The data axis varies fastest: with 2 stages of 2 replicas, ranks 0 and 1 are stage 0."""
    worlds = [World(rank, rank, 4, torch.device("cpu")) for rank in range(4)]
    assert [stage_of(world, 2) for world in worlds] == [0, 0, 1, 1]
    assert check_world(worlds[0], 2) == 2
    with pytest.raises(UserError, match="does not divide the 4 processes"):
        check_world(worlds[0], 3)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def launched(monkeypatch):
    """The environment that a launcher gives the only process."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.usefixtures("launched")
def test_processes_wait_for_hours_while_the_main_one_encodes():
    with distributed():
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=3)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_either_launcher_tells_how_many_processes_share_this_host(launched, name):
    launched.setenv(name, "4")
    launched.setenv("WORLD_SIZE", "8")
    launched.setenv("RANK", "5")
    world = planned_world(2)
    assert (world.rank, world.size, world.local_size) == (5, 8, 4)


def test_without_a_launcher_a_planned_world_has_a_process_for_each_stage():
    world = planned_world(3)
    assert (world.rank, world.size, world.local_size) == (0, 3, 3)
    assert check_world(world, 3) == 1


def test_processes_on_one_host_share_its_memory():
    alone, one_of_four = (World(0, 0, size, torch.device("cpu"), size) for size in (1, 4))
    assert 4 * launch.this_machine(one_of_four).host == pytest.approx(launch.this_machine(alone).host, rel=0.1)
