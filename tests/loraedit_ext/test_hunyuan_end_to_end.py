"""HunyuanVideo through the same verbs as Wan: cache, both regimes, resume, pipeline stages, export, edit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from dataset.images import read_image
from loraedit_ext import launch
from loraedit_ext.config import load_config
from tests.conftest import write_edit_folder
from tests.loraedit_ext.training.test_processes import assert_close, numbers
from tests.processes import launch as launch_processes


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


def test_train_then_edit(hunyuan_folder):
    train(hunyuan_folder)
    (run,) = hunyuan_folder.runs()
    assert len(hunyuan_folder.losses()) == 6
    assert np.isfinite(hunyuan_folder.losses()).all()
    weights = load_file(run / "step6" / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "txt" not in name)
    out = launch.edit(load_config(hunyuan_folder.config, ["edit.output=png"]), None, None)
    frames = np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))])
    source = np.stack([read_image(path) for path in sorted((hunyuan_folder.path / "source").glob("*.png"))])
    mask = np.stack([read_image(path)[..., 0] for path in sorted((hunyuan_folder.path / "mask").glob("*.png"))])
    assert (frames[0] == read_image(hunyuan_folder.path / "edited_0.png")).all()
    assert (frames[1:][mask[1:] == 0] == source[1:][mask[1:] == 0]).all()
    assert (frames[1:][mask[1:] > 0] != source[1:][mask[1:] > 0]).any()
    record = json.loads((out / "edited.json").read_text())["config"]
    assert record["model"]["guidance"] == 1
    assert (record["edit"]["embedded_guidance"], record["edit"]["guidance"], record["edit"]["shift"]) == (6, 1, 7)
    assert record["edit"]["sampler"] == "euler"


def test_loss_falls_on_one_sample(hunyuan_folder):
    train(hunyuan_folder, "stage=[{name='motion', steps=25, mix={motion=1}}]", "optimizer.lr=5e-3")
    losses = hunyuan_folder.losses()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_resumed_run_equals_the_uninterrupted_one(hunyuan_folder):
    train(hunyuan_folder, "adapter.dropout=0.1")
    train(hunyuan_folder, "adapter.dropout=0.1", "checkpoint_every_n_steps=2")
    whole, second = hunyuan_folder.runs()
    (second / "latest").write_text("global_step2\n")
    train(hunyuan_folder, "adapter.dropout=0.1", f"resume_from_checkpoint={second.name}")
    assert hunyuan_folder.losses(1) == hunyuan_folder.losses(0)
    first, last = (load_file(run / "step6" / "adapter_model.safetensors") for run in (whole, second))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_embedded_guidance_and_classifier_free_guidance_change_the_edit(tmp_path, tiny_hunyuan):
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])
    train(folder)
    results = []
    for index, override in enumerate(["edit.seed=42", "edit.embedded_guidance=1", "edit.guidance=3"]):
        config = load_config(folder.config, ["edit.output=png", "edit.composite=false", override])
        out = launch.edit(config, None, tmp_path / str(index))
        results.append(np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))]))
    assert (results[0] != results[1]).any()
    assert (results[0] != results[2]).any()


@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
def test_skipped_steps_stay_near_the_result_of_all(tmp_path, tiny_hunyuan, variant):
    """And nearer than the same number of plain steps; the first latents, which token replace keeps clean, included."""
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan[variant])
    train(folder)
    made = {}
    ways = {"all": ["edit.steps=12"], "line": ["edit.steps=12", "edit.compute_every=3"], "few": ["edit.steps=7"]}
    for name, overrides in ways.items():
        config = load_config(folder.config, ["edit.output=png", "edit.composite=false", *overrides])
        out = launch.edit(config, None, tmp_path / name)
        made[name] = np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))]).astype(int)
    line, few = (np.abs(made[name] - made["all"])[1:].mean() for name in ("line", "few"))
    assert 0 < line < 0.5 * few


@pytest.mark.slow
def test_two_pipeline_stages_equal_one_process(tmp_path, tiny_hunyuan):
    """With clipping, regimes of different shape, and a stage that begins within the double blocks."""
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])
    common = ["gradient_accumulation_steps=2", "gradient_clipping=0.05"]
    launch_processes(folder, *common)
    launch_processes(folder, *common, "pipeline_stages=2", "partition_method=manual", "partition_split=[2]",
                     processes=2)
    assert_close(numbers(folder.metrics(0)), numbers(folder.metrics(1)), 1e-6)
    first, second = (load_file(run / "step6" / "adapter_model.safetensors") for run in folder.runs())
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)


def test_a_lora_of_the_other_variant_is_refused(tmp_path, tiny_hunyuan):
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])
    train(folder)
    with pytest.raises(UserError, match=r"hunyuan-i2v-token_replace.*hunyuan-i2v-latent_concat"):
        launch.edit(load_config(folder.config, [f"model.ckpt_path={tiny_hunyuan['latent_concat']}"]), None, None)


def test_families_defaults_are_filled_in_and_can_be_overridden(tmp_path, tiny_hunyuan):
    folder = write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])
    config = load_config(folder.config)
    assert (config.model.shift, config.model.guidance, config.edit.steps) == (7, 1, 2)
    config = load_config(folder.config, ["edit.shift=5", "edit.embedded_guidance=4", "model.guidance=6"])
    assert (config.edit.shift, config.edit.embedded_guidance, config.model.guidance) == (5, 4, 6)


def test_wan_has_no_embedded_guidance(edit_folder):
    assert load_config(edit_folder.config).edit.shift == 5
    with pytest.raises(UserError, match=r"model\.guidance = 1: Wan embeds no guidance"):
        load_config(edit_folder.config, ["model.guidance=1"])
