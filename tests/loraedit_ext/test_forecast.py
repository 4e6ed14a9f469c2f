"""What a run computes: against what is really computed, and what the plan says of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.activations import Counter
from loraedit_ext import forecast, launch, lora
from loraedit_ext.config import load_config
from loraedit_ext.training.trainer import checkpoint_activations
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.wrapper import HunyuanI2V
from models.wan.config import WanConfig
from models.wan.wrapper import WanI2V
from tests.loraedit_ext.training.test_streaming import build, inputs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("how", [False, True, "attention"])
@pytest.mark.parametrize("family", ["wan", "token_replace"])
def test_flops_are_those_that_a_pass_takes(open_model, family, how):
    """Of blocks, forward and backward; a LoRA of rank 2 and the text take their part, which grows small with the size."""
    model = open_model(family)
    layers = build(model, 0)
    checkpoint_activations(layers, how, CPU)
    noisy, *rest = inputs_of(model)
    noisy = noisy.repeat(1, 1, 4, 4, 4)
    rest = [part.repeat(1, 1, 4, 4, 4) if part.ndim == 5 else part for part in rest]
    stream = layers[0]((noisy, *rest))
    tokens = stream[0].shape[1] - (17 if family != "wan" else 0)
    known = [weight for layer in layers for weight in layer.parameters()]
    with Counter(known) as counter:
        for layer in layers[1:-1]:
            stream = layer(stream)
        stream[0].square().mean().backward()
    work = model.flops(tokens)
    assert counter.attention == pytest.approx(work.attention * (3.5 + (how is True)), rel=0.3)
    assert counter.linears == pytest.approx(work.linears * (2 + bool(how)) + work.outputs * 2, rel=0.3)
    assert lora.trainable(layers)


@pytest.mark.parametrize(("model", "tokens", "expected"), [
    (WanI2V(SimpleNamespace(config=WanConfig.i2v_14b()), CPU), 20280, 838e12),
    (HunyuanI2V(SimpleNamespace(config=HunyuanConfig.i2v_13b("token_replace")), CPU), 11661, 271e12),
])
def test_released_models_at_49_frames(model, tokens, expected):
    assert sum(model.flops(tokens)) == pytest.approx(expected, rel=0.01)


def test_stages_and_edits_add_up(edit_folder):
    config = load_config(edit_folder.config, ["stage=[{name='a', steps=10, mix={motion=1, appearance=3}}]", "edit.steps=5"])
    model = launch.build_model(config, CPU)
    job = launch.open_job(config, model)
    stages = launch.plan.stages(config, job)
    samples = launch.plan.triples(job, stages)
    clip, one = (len(job.frames), *job.frames.shape[1:3]), (1, *job.frames.shape[1:3])
    of_clip, of_one = (
        forecast.training_sample(config, model, forecast.count_tokens(model.geometry, shape)) for shape in (clip, one)
    )
    by_hand = 10 * (0.25 * of_clip + 0.75 * of_one)
    assert forecast.training(config, model, stages, samples, 1) == pytest.approx(by_hand)
    twice = config.model_copy(update={"gradient_accumulation_steps": 2})
    assert forecast.training(twice, model, stages, samples, 3) == pytest.approx(6 * by_hand)
    guided = 2 if config.edit.guidance != 1 else 1
    assert forecast.editing(config, model, job) == pytest.approx(5 * guided * forecast.forward(model, clip))
    in_pieces = config.model_copy(update={"edit": config.edit.model_copy(update={"clip_frames": 5})})
    assert forecast.editing(in_pieces, model, job) == pytest.approx(5 * guided * 2 * forecast.forward(model, (5, *clip[1:])))


def test_a_step_tells_its_pace(edit_folder):
    """Over all steps it is the plan's work; a metric of each process."""
    config = load_config(edit_folder.config, ["gradient_accumulation_steps=2"])
    launch.train(config)
    model = launch.build_model(config, CPU)
    job = launch.open_job(config, model)
    stages = launch.plan.stages(config, job)
    planned = forecast.training(config, model, stages, launch.plan.triples(job, stages), 1)
    rows = [json.loads(line) for line in (edit_folder.runs()[0] / "metrics.jsonl").read_text().splitlines()]
    done = sum(row["train/tflops"] * 1e12 * row["train/step_seconds"] for row in rows if "train/tflops" in row)
    assert done == pytest.approx(planned)


def test_the_plan_tells_work_and_time(edit_folder, capsys, monkeypatch):
    launch.train(load_config(edit_folder.config), dry_run=True)
    out = capsys.readouterr().out
    assert "work      training " in out
    assert "time      " not in out  # of a CPU nothing is forecast
    real = launch.this_machine
    monkeypatch.setattr(launch, "this_machine", lambda world: replace(real(world), rate=1e12))
    launch.train(load_config(edit_folder.config), dry_run=True)
    assert "at half of the 1 TFLOP/s that large products reach here" in capsys.readouterr().out


def test_the_plan_of_a_resumed_run_counts_what_is_left(edit_folder, capsys):
    whole = load_config(edit_folder.config)
    launch.train(whole)
    (run,) = edit_folder.runs()
    capsys.readouterr()
    launch.train(whole.model_copy(update={"resume_from_checkpoint": str(run / "global_step3")}), dry_run=True)
    resumed = capsys.readouterr().out
    launch.train(whole.model_copy(update={"stage": whole.stage[1:]}), dry_run=True)
    (left,) = re.findall(r"^work      training (.* GFLOP), the edit", capsys.readouterr().out, re.MULTILINE)
    assert f"work      training from step 3 on {left}, the edit" in resumed
    assert "motion: 3 steps, 0 left, " in resumed
    assert "appearance: 3 steps, 3 left, " in resumed


def test_times_are_told_as_people_tell_them():
    (_, line) = forecast.describe(3600e15, 50e15, 790e12, 1)
    assert line.startswith("time      training about 2.5 h, the edit 2 min, at half of the 790 TFLOP/s")
    (_, line) = forecast.describe(3600e15, 5e15, 790e12, 8)
    assert "training about 19 min, the edit 13 s" in line
    assert list(forecast.describe(3600e15, 50e15, None, 1)) == ["work      training 3.6 EFLOP, the edit 50 PFLOP"]


def test_the_rate_is_measured():
    assert forecast.product_rate(CPU, torch.float32) > 1e8

