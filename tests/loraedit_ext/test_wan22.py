"""Wan2.2-I2V: a run trains one expert on its noise levels; its LoRA goes with that expert alone."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

import train
from common.errors import UserError
from loraedit_ext import inspect, launch, lora, merge_lora, plan
from loraedit_ext import run as runs
from loraedit_ext.config import load_config
from loraedit_ext.encode import identity
from loraedit_ext.flow import TimestepSampler
from loraedit_ext.wan import MaskedWan
from models.wan.checkpoint import WanCheckpoint
from models.wan.random_weights import tiny_config, write_random_checkpoint
from tests.conftest import write_edit_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_wan22(tmp_path_factory):
    """A random checkpoint with two experts in the original Wan2.2-I2V layout."""
    folder = tmp_path_factory.mktemp("wan22") / "checkpoint"
    write_random_checkpoint(folder, tiny_config("wan2.2"))
    return folder


@pytest.fixture
def folder(tmp_path, tiny_wan22):
    return write_edit_folder(tmp_path, "wan", tiny_wan22)


def model_of(folder, *overrides):
    return launch.build_model(load_config(folder.config, [*overrides]), CPU)


@pytest.mark.parametrize(("expert", "levels"), [("high", (0.9, 1.0)), ("low", (0.0, 0.9))])
def test_an_expert_is_trained_on_its_noise_levels(folder, expert, levels):
    settings = load_config(folder.config, [f"model.expert={expert}"]).model
    assert (settings.min_t, settings.max_t) == levels
    t = TimestepSampler(min_t=settings.min_t, max_t=settings.max_t).quantile(torch.linspace(0.001, 0.999, 999))
    assert t.min() >= levels[0]
    assert t.max() <= levels[1]
    assert t.max() - t.min() > 0.08


def test_levels_that_are_given_stay(folder):
    settings = load_config(folder.config, ["model.expert=high", "model.min_t=0.875"]).model
    assert (settings.min_t, settings.max_t) == (0.875, 1.0)
    with pytest.raises(UserError, match=r"min_t = 0\.9 must be below max_t = 0\.5"):
        load_config(folder.config, ["model.expert=high", "model.max_t=0.5"])


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.expert=middle"], r"`model\.expert` = 'middle'.*'high' or 'low'"),
    (["model.type=hunyuan-video", "model.expert=low"], r"model\.expert = 'low': HunyuanVideo has no experts"),
    (["model.expert=low", "sample_every_n_steps=2"], r"sample_every_n_steps = 2: a preview of Wan2\.2 needs both experts"),
])
def test_what_does_not_go_with_an_expert_is_refused(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(folder.config, overrides)


def test_the_expert_must_be_chosen_and_wan21_has_none(folder, capsys, tiny_wan):
    assert train.main(["--config", str(folder.config), "--dry_run"]) == 2
    assert 'model.expert = "high" or "low"' in capsys.readouterr().err
    command = ["--config", str(folder.config), "--dry_run", "model.expert=low", f"model.ckpt_path={tiny_wan}"]
    assert train.main(command) == 2
    assert "this is Wan2.1" not in (said := capsys.readouterr().err)
    assert "Wan2.1 has one for all noise levels: for it remove the key" in said


def test_training_needs_no_clip_and_the_lora_tells_its_expert(folder, capsys):
    launch.train(load_config(folder.config, ["model.expert=high", "eval_every_n_steps=3"]))
    out = capsys.readouterr().out
    assert "variant wan2.2-i2v" in out
    assert "levels    noise levels from 0.9 to 1" in out
    found = lora.read_of(runs.newest_lora(folder.path / "runs"))
    assert len(found.ranks) == 40  # as of Wan2.1: nothing of the image branch was ever a target
    assert found.metadata["model"] == {
        "family": "wan", "variant": "wan2.2-i2v", "dim": 96, "layers": 4, "ffn_dim": 192, "in_dim": 36, "expert": "high",
    }  # fmt: skip
    lora.check_model(found, model_of(folder, "model.expert=high"))
    with pytest.raises(UserError, match=r"another model \(expert: LoRA 'high', checkpoint 'low'\)"):
        lora.check_model(found, model_of(folder, "model.expert=low"))
    with safe_open(found.path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_loras_of_wan21_and_wan22_are_refused_by_each_other(folder, tiny_wan):
    wan21, wan22 = MaskedWan(WanCheckpoint.open(tiny_wan), CPU), model_of(folder, "model.expert=low")
    weights = {f"blocks.0.ffn.0.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (2, 96)), ("B", (192, 2)))}
    for one, other in ((wan21, wan22), (wan22, wan21)):
        found = lora.LoraFile(folder.path / "lora.safetensors", weights, {"model": one.describe()})
        lora.check_model(found, one)
        with pytest.raises(UserError, match=r"another model .*variant: LoRA 'wan2\.\d-i2v', checkpoint 'wan2\.\d-i2v'"):
            lora.check_model(found, other)
    image = {name.replace("ffn.0", "cross_attn.k_img"): torch.ones(2, 96).mT if ".lora_B." in name else torch.ones(2, 96)
             for name in weights}
    with pytest.raises(UserError, match=r"1 weights that the model lacks.*k_img"):
        lora.check_model(lora.LoraFile(folder.path / "lora.safetensors", image, {}), wan22)


def test_one_expert_is_not_edited_with(folder):
    with pytest.raises(UserError, match=r"model\.expert = \"high\": editing needs both experts"):
        launch.edit(load_config(folder.config, ["model.expert=high"]), None, None)


def test_both_experts_share_the_cache(folder):
    high, low = (model_of(folder, f"model.expert={expert}") for expert in ("high", "low"))
    job = launch.open_job(load_config(folder.config), high)
    (triple,) = plan.triples(job, plan.stages(load_config(folder.config), job))["motion"]
    assert identity(high, triple, "all") == identity(low, triple, "all")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_inspect_tells_both_experts(tmp_path, layout):
    write_random_checkpoint(tmp_path / "wan", tiny_config("wan2.2"), layout=layout)
    text = "\n".join(inspect.describe(tmp_path / "wan"))
    assert text.count(f"wan transformer, wan2.2-i2v, {layout} names") == 2
    assert text.count("complete    yes, all 123 tensors") == 2
    assert "parts       transformer" in text
    (tmp_path / "wan" / ("Wan2.1_VAE.pth" if layout == "original" else "vae/diffusion_pytorch_model.safetensors")).unlink()
    assert "incomplete" in "\n".join(inspect.describe(tmp_path / "wan"))


def test_a_lora_is_merged_into_one_expert(folder, tiny_wan22, tmp_path):
    launch.train(load_config(folder.config, ["model.expert=low", "stage=[{name='motion', steps=1, mix={motion=1}}]"]))
    adapter = runs.newest_lora(folder.path / "runs")
    with pytest.raises(UserError, match=r"two transformers; name one of them: .*high_noise_model or .*low_noise_model"):
        merge_lora.merge(tiny_wan22, [(adapter, 1.0)], tmp_path / "merged")
    merge_lora.merge(tiny_wan22 / "low_noise_model", [(adapter, 1.0)], tmp_path / "merged")
    merged = WanCheckpoint.open(tiny_wan22, transformer_path=tmp_path / "merged", expert="low")
    assert merged.config == tiny_config("wan2.2")
    assert len(merged.transformer_tensors()) == 123
