"""Wan2.2-I2V: a run trains one expert on its noise levels; its LoRA goes with that expert alone."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train
from common.errors import UserError
from loraedit_ext import inspect, launch, lora, plan, regimes
from loraedit_ext import run as runs
from loraedit_ext.config import load_config
from loraedit_ext.editing import guidance
from loraedit_ext.editing.editor import Editor, Expert
from loraedit_ext.encode import encode_all, identity
from loraedit_ext.evaluation.suite.settings import load_suite
from loraedit_ext.flow import TimestepSampler
from loraedit_ext.lora import merge
from loraedit_ext.pipeline import alone
from loraedit_ext.wan import MaskedWan
from models.base import I2VModel
from models.wan.checkpoint import WanCheckpoint
from models.wan.random_weights import tiny_config, write_random_checkpoint
from tests.conftest import write_edit_folder

CPU = torch.device("cpu")


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
        merge.merge(tiny_wan22, [(adapter, 1.0)], tmp_path / "merged")
    merge.merge(tiny_wan22 / "low_noise_model", [(adapter, 1.0)], tmp_path / "merged")
    merged = WanCheckpoint.open(tiny_wan22, transformer_path=tmp_path / "merged", expert="low")
    assert merged.config == tiny_config("wan2.2")
    assert len(merged.transformer_tensors()) == 123


def lora_file(folder, expert, seed):
    """A LoRA on one linear, strong enough to be seen."""
    g = torch.Generator().manual_seed(seed)
    key = "diffusion_model.blocks.0.ffn.0.lora_"
    path = folder.path / f"{expert}.safetensors"
    save_file({f"{key}A.weight": torch.randn(2, 96, generator=g), f"{key}B.weight": torch.randn(192, 2, generator=g)}, path)
    return path


@pytest.fixture
def experts(folder):
    """Both experts with a LoRA each."""
    made = {}
    for seed, name in enumerate(("high", "low")):
        model = model_of(folder, f"model.expert={name}")
        made[name] = Expert(model, [(lora.read(lora_file(folder, name, seed), model), 1.0)])
    return made


def editor_of(folder, experts, own, other, *overrides):
    config = load_config(folder.config, [f"model.expert={own}", "edit.guidance=1", *overrides])
    model, ((adapter, _),) = experts[own].model, experts[own].stack
    return Editor(config, model, adapter, alone(CPU), launch.cache_of(config), (), experts.get(other))


def generated(folder, *arguments):
    editor = editor_of(folder, *arguments)
    return editor.edit(launch.open_job(editor.config, editor.model)).generated


def test_beyond_the_boundary_an_edit_is_that_of_one_expert(folder, experts):
    high, low = generated(folder, experts, "high", None), generated(folder, experts, "low", None)
    assert (generated(folder, experts, "low", "high", "edit.boundary=0") == high).all()
    assert (generated(folder, experts, "high", "low", "edit.boundary=1") == low).all()  # UniPC begins just below 1
    both = generated(folder, experts, "high", "low")
    assert (both == generated(folder, experts, "low", "high")).all()
    assert all((both != alone).any() for alone in (high, low))


def test_both_experts_make_what_a_loop_by_hand_makes(folder, experts):
    settings = ["edit.steps=4", "edit.sampler=euler"]
    found = generated(folder, experts, "low", "high", *settings)
    config = load_config(folder.config, ["model.expert=low", "edit.guidance=1", *settings])
    model = experts["low"].model
    job = launch.open_job(config, model)
    passes = guidance.passes(job, config.edit, "all")
    encoded = encode_all(model, [each.sample for each in passes], launch.cache_of(config), "all", alone(CPU))
    ((condition, _),) = guidance.told(passes, encoded)
    transformers = {}
    for name, expert in experts.items():
        transformers[name] = expert.model.build_transformer()
        expert.model.load_weights(transformers[name].layers(), torch.float32, CPU)
        lora.attach(transformers[name], transformers[name].layers(), expert.stack[0][0], CPU)
    sigmas = [5 * t / (1 + 4 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    x = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(42))
    used = []
    for t, following in pairwise(sigmas):
        used.append("high" if t >= 0.9 else "low")
        with torch.no_grad():
            v = transformers[used[-1]](x, torch.tensor([1000 * t]), condition["y"][None], condition["text"][None])
        x = x + (following - t) * v
    assert used == ["high", "high", "low", "low"]
    expected = regimes.to_pixels(model.decode_video(x[0]))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_first_expert_is_freed_before_the_second_is_loaded(folder, experts, monkeypatch):
    weights, alive = [], []
    real = I2VModel.load_weights

    def load_weights(model, layers, *arguments):
        alive.append([reference() is not None for reference in weights])
        real(model, layers, *arguments)
        weights.append(weakref.ref(layers[1].block.ffn[0].weight))

    monkeypatch.setattr(I2VModel, "load_weights", load_weights)
    generated(folder, experts, "high", "low")
    assert alive == [[], [False]]
    alive.clear()
    weights.clear()
    generated(folder, experts, "high", "low", "edit.boundary=1")
    assert alive == [[]], "an expert that no step is for is not loaded"


def test_an_edit_uses_and_records_both_loras(folder, experts, capsys):
    high, low = (experts[name].stack[0][0].path for name in ("high", "low"))
    stacked = f"edit.lora=[{{path='{high}', strength=0.5, expert='low'}}]"
    config = load_config(folder.config, ["model.expert=low", "edit.output=png", f"edit.other_lora={high}", stacked])
    assert (config.edit.boundary, config.edit.guidance) == (0.9, 3.5)
    out = launch.edit(config, low, None)
    record = json.loads((out / "edited.json").read_text())
    assert [(each["expert"], each["path"], each["strength"]) for each in record["facts"]["loras"]] == [
        ("high", str(high), 1.0), ("low", str(low), 1.0), ("low", str(high), 0.5)]
    assert record["config"]["edit"]["other_lora"] == str(high)
    said = capsys.readouterr().out
    assert said.count("stacked   ") == said.count("of the expert for low noise, strength 0.5") == 1
    assert f"editing   the expert for high noise with {high}" in said
    other = launch.edit(load_config(folder.config, ["model.expert=low", "edit.output=png"]), low, None)
    assert other.name == "edit_2"
    assert "the expert for high noise goes without a trained LoRA: edit.other_lora names one" in capsys.readouterr().out


def test_the_releases_values_are_the_defaults(folder):
    edit = load_config(folder.config, ["model.expert=high", "edit=None"]).edit
    assert (edit.steps, edit.guidance, edit.shift, edit.boundary) == (40, 3.5, 5.0, 0.9)
    assert load_config(folder.config, ["model.expert=high", "edit.guidance=5"]).edit.guidance == 5
    assert edit.negative_prompt == load_config(folder.config).edit.negative_prompt


def test_the_other_lora_may_be_a_file_its_folder_or_the_newest_of_an_output_dir(tmp_path):
    steps = [tmp_path / "runs" / run / "step3" for run in ("20260101_00-00-00", "20260102_00-00-00")]
    for step in steps:
        step.mkdir(parents=True)
        (step / lora.EXPORT_NAME).touch()
    assert runs.lora_at(tmp_path / "runs") == steps[1] / lora.EXPORT_NAME
    assert runs.lora_at(steps[0]) == steps[0]
    assert runs.lora_at(steps[0] / lora.EXPORT_NAME) == steps[0] / lora.EXPORT_NAME
    with pytest.raises(UserError, match="no trained LoRA in it"):
        runs.lora_at(tmp_path)


@pytest.mark.parametrize("override", ["edit.other_lora=a", "edit.boundary=0.5", "edit.lora=[{path='a', expert='low'}]"])
def test_keys_of_two_experts_are_refused_without_them(folder, override):
    with pytest.raises(UserError, match=r"for Wan2\.2's two experts; set model\.expert, or remove it"):
        load_config(folder.config, [override])


def test_the_benchmark_refuses_an_expert():
    with pytest.raises(UserError, match=r"`model\.expert=low`: the benchmark edits with one transformer"):
        load_suite(["model.expert=low"])


def test_an_edit_without_the_other_expert_and_with_a_lora_of_the_wrong_one(folder, experts, tiny_wan22):
    low, model = experts["low"].stack[0][0], experts["low"].model
    lora.write(replace(low, metadata={"model": model.describe()}), low.path, model.lora_names)
    with pytest.raises(UserError, match=r"another model \(expert: LoRA 'low', checkpoint 'high'\)"):
        launch.edit(load_config(folder.config, ["model.expert=low", f"edit.other_lora={low.path}"]), low.path, None)
    shutil.copytree(tiny_wan22, folder.path / "half", ignore=shutil.ignore_patterns("high_noise_model"))
    half = ["model.expert=low", f"model.ckpt_path={folder.path / 'half'}", "edit.output=png"]
    with pytest.raises(UserError, match=r"needs the expert for high noise too; edit\.other_transformer_path may name it"):
        launch.edit(load_config(folder.config, half), low.path, None)
    named = f"edit.other_transformer_path={tiny_wan22 / 'high_noise_model'}"
    assert launch.edit(load_config(folder.config, [*half, named]), low.path, None).name == "edit"
