"""Who comes from diffusion-pipe is told where each of its keys went."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import UserError
from dataset.schema import load_job_settings
from loraedit_ext import diffusion_pipe
from loraedit_ext.config import (
    AdapterSettings,
    ModelSettings,
    MonitoringSettings,
    OptimizerSettings,
    RunConfig,
    load_config,
)
from loraedit_ext.training.optim import find_optimizer

PAGE = Path(__file__).parents[2] / "docs" / "diffusion-pipe.md"
TABLES = {"": (RunConfig, diffusion_pipe.RUN), "model.": (ModelSettings, diffusion_pipe.MODEL),
          "adapter.": (AdapterSettings, diffusion_pipe.ADAPTER)}
USUAL = """
output_dir = '/data/runs'
dataset = 'examples/dataset.toml'
epochs = 1000
gradient_clipping = 1.0
eval_every_n_epochs = 1
eval_micro_batch_size_per_gpu = 1
caching_batch_size = 1
activation_checkpointing = 'unsloth'
partition_method = 'parameters'
steps_per_print = 1
video_clip_mode = 'single_beginning'
[model]
type = 'wan'
ckpt_path = '/data/Wan2.1-I2V-14B-480P'
dtype = 'bfloat16'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw'
betas = [0.9, 0.99]
[monitoring]
enable_wandb = false
wandb_api_key = ''
"""


def test_a_usual_configuration_is_refused_key_by_key_with_what_to_do(tmp_path):
    (tmp_path / "wan.toml").write_text(USUAL)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "wan.toml")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("7 problems")
    assert any("unknown key `epochs`; a run is counted in steps" in line for line in lines)
    assert any("`steps_per_print`; use `logging_steps`" in line for line in lines)
    assert any("`adapter.dtype`; remove it: a LoRA trains in float32" in line for line in lines)
    assert not any("known keys" in line for line in lines)


@pytest.mark.parametrize("prefix", TABLES)
def test_no_listed_key_is_one_of_ours_and_every_named_one_is(prefix):
    table, listed = TABLES[prefix]
    assert not set(listed) & set(table.model_fields)
    ours = set(RunConfig.model_fields) | set(table.model_fields) | {"start", "frames", "clip_frames", "source", "steps"}
    for advice in listed.values():
        assert set(re.findall(r"`(\w+)`", advice)) <= ours


def test_the_page_lists_every_key():
    text = PAGE.read_text(encoding="utf-8")
    listed = [*diffusion_pipe.RUN, *diffusion_pipe.MODEL, *diffusion_pipe.ADAPTER]
    assert [key for key in listed if f"`{key}`" not in text] == []


def test_its_own_optimizers_are_refused_with_a_substitute_that_there_is():
    for name, advice in diffusion_pipe.OPTIMIZERS.items():
        with pytest.raises(UserError, match="is diffusion-pipe's own; use"):
            find_optimizer(name)
        (substitute,) = re.findall(r"use '(\w+)'", advice)
        if substitute != "adamw8bit":  # needs a package that is not required
            assert issubclass(find_optimizer(substitute), object)


def test_an_empty_key_of_wandb_is_none():
    assert MonitoringSettings(wandb_api_key="").wandb_api_key is None
    assert OptimizerSettings().type == "adamw"


def test_its_dataset_is_told_from_an_edit_job(tmp_path):
    (tmp_path / "dataset.toml").write_text("resolutions = [512]\n[[directory]]\npath = '/data'\n")
    with pytest.raises(UserError, match=r"`directory`; this is a key of diffusion-pipe's datasets"):
        load_job_settings(tmp_path / "dataset.toml")
