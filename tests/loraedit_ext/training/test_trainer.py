"""Training in one process: resume, signals, bad numbers, what is written."""

from __future__ import annotations

import gc
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from common.errors import UserError
from dataset.images import read_image, write_png
from loraedit_ext import inspect, launch, plan
from loraedit_ext import run as runs
from loraedit_ext.config import OptimizerSettings, load_config
from loraedit_ext.pipeline import World
from loraedit_ext.training import optim, state, tracking
from loraedit_ext.training.trainer import Trainer


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


def lora_of(run, step):
    return load_file(run / f"step{step}" / "adapter_model.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_exactly_what_the_plan_announces(edit_folder, capsys):
    train(edit_folder)
    (run,) = edit_folder.runs()
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out")}
    assert names == {"step3", "step6", "global_step3", "global_step6", "latest", "config.json", "metrics.jsonl"}
    out = capsys.readouterr().out
    assert "step3/ and global_step3/, step6/ and global_step6/" in out
    assert "samples   motion: motion" in out
    assert "samples   appearance: appearance@6" in out


def test_loss_falls_on_one_sample(edit_folder):
    train(edit_folder, "stage=[{name='motion', steps=25, mix={motion=1}}]", "optimizer.lr=5e-3")
    losses = edit_folder.losses()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_same_seed_gives_the_same_run_and_another_does_not(edit_folder):
    for seed in (1, 1, 2):
        train(edit_folder, f"seed={seed}")
    assert edit_folder.losses(0) == edit_folder.losses(1)
    assert edit_folder.losses(0) != edit_folder.losses(2)
    assert_same(lora_of(edit_folder.runs()[0], 6), lora_of(edit_folder.runs()[1], 6))


def in_memory():
    gc.collect()
    names = [type(thing).__name__ for thing in gc.get_objects()]
    return {name: names.count(name) for name in ("Trainer", "PipelineEngine", "WanTransformer")}


def test_a_finished_run_is_gone_from_memory(edit_folder):
    """Model, optimizer and engine once stayed for as long as the process: a benchmark grew with each LoRA it trained."""
    before = in_memory()
    train(edit_folder)
    assert all(count <= before[name] for name, count in in_memory().items())


@pytest.mark.parametrize("optimizer", ["adamw", "Prodigy", "ScheduleFreeAdamW"])
def test_a_resumed_run_equals_the_uninterrupted_one(edit_folder, optimizer):
    """Resumed within a stage, with dropout and a schedule: weights and losses to the bit, whatever is exported between."""
    common = ["adapter.dropout=0.1", "lr_scheduler=cosine", "warmup_steps=2", f"optimizer.type={optimizer}"]
    common += ["optimizer.lr=1.0"] if optimizer == "Prodigy" else []
    train(edit_folder, *common, "save_every_n_steps=1")
    train(edit_folder, *common, "checkpoint_every_n_steps=2")
    whole, second = edit_folder.runs()
    (second / "latest").write_text("global_step2\n")
    train(edit_folder, *common, f"resume_from_checkpoint={second.name}")
    assert edit_folder.losses(1) == edit_folder.losses(0)
    assert [row["step"] for row in edit_folder.metrics(1) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert_same(lora_of(whole, 6), lora_of(second, 6))


def test_of_a_schedule_free_optimizer_the_average_is_exported_and_evaluated(edit_folder):
    """Not the point where it takes gradients, (1 - beta) z + beta x with the average x."""
    train(edit_folder, "optimizer.type=ScheduleFreeAdamW", "optimizer.lr=0.05", "eval_every_n_steps=6", "save_dtype=float32")
    (run,) = edit_folder.runs()
    exported, states = lora_of(run, 6), {}
    for path in (run / "global_step6").glob("*.safetensors"):
        states |= load_file(path)
    names = {name.removesuffix("/weight") for name in states if name.endswith("/weight")}
    far = 0.0
    for name in names:
        trained, z = states[f"{name}/weight"], states[f"{name}/z"]
        average = exported["diffusion_model." + name.replace(".default", "")]
        torch.testing.assert_close((1 - 0.9) * z + 0.9 * average, trained)
        far = max(far, (average - trained).abs().max().item())
    assert far > 1e-3
    assert len(names) == len(exported)
    before = edit_folder.metrics()[-1]
    train(edit_folder, f"adapter.init_from_existing={run / 'step6'}", "eval_every_n_steps=6", "eval_before_first_step=true")
    again = next(row for row in edit_folder.metrics() if "motion/loss" in row)
    assert again["step"] == 0
    assert again["motion/loss"] == pytest.approx(before["motion/loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD", "SPlus"])
def test_looking_at_averages_changes_nothing(name):
    def after(looks: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.eye(4))
        optimizer = optim.build_optimizer([weight], OptimizerSettings(type=name, lr=0.1))
        for step in range(4):
            with optim.averaged(optimizer) if looks else nullcontext():
                weight.grad = torch.full((4, 4), 1.0 + step)
            optimizer.step()
        return weight.detach()

    assert torch.equal(after(True), after(False))


def test_an_earlier_state_goes_on_in_a_new_run_and_leaves_the_first_as_it_is(edit_folder, capsys):
    """Another edit of the same clip once wrote over the LoRA, the states and the numbers of the first one."""
    train(edit_folder)
    (first,) = edit_folder.runs()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    image = edit_folder.path / "edited_6.png"
    write_png(image, read_image(image)[:, ::-1].copy())
    train(edit_folder, f"resume_from_checkpoint={first / 'global_step3'}")
    first, second = edit_folder.runs()
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert f"its run went on from here and stays as it is; this one goes on in {second}" in capsys.readouterr().err
    assert json.loads((second / "config.json").read_text())["resumed_from"] == str(first / "global_step3")
    one, two = edit_folder.metrics(0), edit_folder.metrics(1)
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    assert one[:3] == two[:3]
    assert one[4]["train/loss"] != two[4]["train/loss"], "the step on the other edit"
    assert (second / "latest").read_text() == "global_step6\n"


def test_a_finished_run_is_left_before_anything_is_loaded(edit_folder, monkeypatch, capsys):
    train(edit_folder)
    (run,) = edit_folder.runs()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(launch, "encode_all", None)
    train(edit_folder, "resume_from_checkpoint=true")
    assert "at step 6: steps left: none\n" in (out := capsys.readouterr().out)
    assert out.endswith("done      nothing is left to train.\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_earlier_state_with_nothing_left_to_train_names_its_lora(edit_folder):
    train(edit_folder)
    (first,) = edit_folder.runs()
    with pytest.raises(UserError, match=r"nothing is left to train.*inference\.py --lora .*step3/adapter_model"):
        launch.train(load_config(edit_folder.config, [f"resume_from_checkpoint={first / 'global_step3'}",
                     "stage=[{name='motion', steps=3, mix={motion=1}}]"]), dry_run=True)  # fmt: skip


def test_a_new_run_from_an_earlier_state_equals_the_first_and_is_resumed_in_place(edit_folder):
    train(edit_folder)
    (first,) = edit_folder.runs()
    train(edit_folder, f"resume_from_checkpoint={first.name}/global_step3")
    first, second = edit_folder.runs()
    assert_same(lora_of(first, 6), lora_of(second, 6))
    train(edit_folder, f"resume_from_checkpoint={second / 'global_step6'}", "stage.1.steps=4")
    assert edit_folder.runs() == [first, second]
    assert len(edit_folder.losses(1)) == 7
    assert json.loads((second / "config.json").read_text())["resumed_from"] == str(first / "global_step3")
    again = runs.overrides_of(second, load_config(edit_folder.config))
    assert f"resume_from_checkpoint={first / 'global_step3'}" in again


def test_a_signal_file_saves_state_and_lora_and_quits(edit_folder, monkeypatch):
    log = tracking.JsonlTracker.log

    def log_and_signal(self, step, values):
        log(self, step, values)
        if step == 2:
            (self.path.parent / "save_quit").touch()

    monkeypatch.setattr(tracking.JsonlTracker, "log", log_and_signal)
    train(edit_folder)
    (run,) = edit_folder.runs()
    assert len(edit_folder.losses()) == 2
    assert (run / "step2" / "adapter_model.safetensors").is_file()
    assert (run / "latest").read_text() == "global_step2\n"
    assert not (run / "save_quit").exists()
    monkeypatch.undo()
    train(edit_folder, "resume_from_checkpoint=true")
    assert len(edit_folder.losses()) == 6
    assert len(edit_folder.runs()) == 1


def test_the_exported_lora_tells_its_story(edit_folder):
    train(edit_folder, "adapter.alpha=2")
    (run,) = edit_folder.runs()
    with safe_open(run / "step6" / "adapter_model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["loraedit"])
    assert facts["model"]["variant"] == "wan2.1-i2v"
    assert (facts["rank"], facts["alpha"], facts["trigger"], facts["steps"]) == (4, 2, "p3rs0n,", 6)
    assert "1 = preserve" in facts["mask_convention"]
    assert facts["config"]["seed"] == 42
    assert [stage["name"] for stage in facts["stages"]] == ["motion", "appearance"]


def test_non_finite_numbers_stop_the_run_before_the_weights_are_touched(edit_folder):
    train(edit_folder, "stage=[{name='motion', steps=3, mix={motion=1}}]")
    (run,) = edit_folder.runs()
    broken = run / "global_step3" / "layer_001.safetensors"
    tensors, text = load_file(broken), safe_open(broken, "pt").metadata()
    name = "blocks.0.self_attn.q.lora_B.weight/weight"
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    from safetensors.torch import save_file

    save_file(tensors, broken, metadata=text)
    with pytest.raises(UserError, match=r"step 4 \(motion\): gradient norm is nan.*Lower optimizer\.lr"):
        train(edit_folder, "stage=[{name='motion', steps=5, mix={motion=1}}]", "resume_from_checkpoint=true")
    assert (run / "latest").read_text() == "global_step3\n"


def test_quantile_evaluation_has_diffusion_pipes_names_and_no_effect_on_training(edit_folder):
    train(edit_folder)
    train(edit_folder, "eval_every_n_steps=2")
    assert edit_folder.losses(0) == edit_folder.losses(1)
    rows = [row for row in edit_folder.metrics(1) if "motion/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    names = {f"{group}/loss_quantile_{k / 10:.2f}" for group in ("motion", "appearance") for k in range(1, 10)}
    assert names | {"motion/loss", "appearance/loss", "eval/eval_time_sec", "step"} == set(rows[0])


def test_a_stage_can_be_run_again_alone_from_the_lora_of_the_one_before(edit_folder):
    train(edit_folder, "stage=[{name='motion', steps=3, mix={motion=1}}]")
    first = edit_folder.runs()[0] / "step3"
    train(edit_folder, f"adapter.init_from_existing={first}",
          "stage=[{name='appearance', steps=1, mix={appearance=1}}]", "optimizer.lr=1e-9")
    before, after = lora_of(edit_folder.runs()[0], 3), lora_of(edit_folder.runs()[1], 1)
    assert all(torch.allclose(before[n], after[n], atol=1e-6) for n in before)
    assert any(before[n].abs().max() > 1e-4 for n in before if "lora_B" in n)


def test_checkpointed_activations_change_nothing(edit_folder):
    train(edit_folder, "activation_checkpointing=False")
    train(edit_folder, "activation_checkpointing=True")
    assert edit_folder.losses(0) == edit_folder.losses(1)


def test_a_warm_cache_loads_no_encoder(edit_folder):
    train(edit_folder)
    forbidden = {"load_vae", "load_text_encoder", "load_image_encoder"}
    from models.wan.checkpoint import WanCheckpoint

    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded although the cache is warm")

    with pytest.MonkeyPatch.context() as patch:
        for name in forbidden:
            patch.setattr(WanCheckpoint, name, refuse)
        train(edit_folder)
        with pytest.raises(AssertionError, match="encoder was loaded"):
            train(edit_folder, "mask_rule=nearest")


def test_new_pixels_under_the_same_name_are_encoded_again(edit_folder):
    from dataset.images import read_image, write_png

    train(edit_folder)
    entries = set((edit_folder.path / "cache").rglob("*.safetensors"))
    edited = edit_folder.path / "edited_6.png"
    image = read_image(edited)
    write_png(edited, image[:, ::-1].copy())
    train(edit_folder)
    new = set((edit_folder.path / "cache").rglob("*.safetensors")) - entries
    assert len(new) == 1  # the appearance sample alone


def test_a_damaged_cache_entry_is_encoded_again_in_the_same_run(edit_folder):
    """It ended the run, which blamed another machine's disk."""
    train(edit_folder, "sample_every_n_steps=6")
    entries = sorted((edit_folder.path / "cache").rglob("*.safetensors"))
    whole = [load(entry.read_bytes()) for entry in entries]
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-100])
    train(edit_folder, "sample_every_n_steps=6")
    for entry, tensors in zip(entries, whole, strict=True):
        assert_same(load_file(entry), tensors)


def test_a_dry_run_writes_nothing(edit_folder, capsys):
    before = sorted(edit_folder.path.rglob("*"))
    launch.train(load_config(edit_folder.config), dry_run=True)
    assert sorted(edit_folder.path.rglob("*")) == before
    assert "memory    about" in capsys.readouterr().out


def test_a_dry_run_plans_several_stages_without_a_launcher(edit_folder, capsys):
    launch.train(load_config(edit_folder.config, ["pipeline_stages=2"]), dry_run=True)
    assert "2 pipeline stage(s) x 1 replica(s)" in capsys.readouterr().out


def test_a_dry_run_under_a_launcher_plans_its_processes_and_one_of_them_prints(edit_folder, capsys, monkeypatch):
    said = []
    for rank in range(4):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
        launch.train(load_config(edit_folder.config, ["pipeline_stages=2"]), dry_run=True)
        said.append(capsys.readouterr().out)
    assert "2 pipeline stage(s) x 2 replica(s)" in said[0]
    assert said[1:] == [""] * 3


def test_cache_only_encodes_and_stops(edit_folder):
    launch.train(load_config(edit_folder.config), cache_only=True)
    assert len(list((edit_folder.path / "cache" / "wan").glob("*.safetensors"))) == 2
    assert not edit_folder.runs()


def test_the_papers_stages_are_the_default(edit_folder):
    from dataset.job import load_job
    from dataset.resize import Grid

    config = load_config(edit_folder.config, ["stage=None"])
    job = load_job(edit_folder.job, Grid())
    motion, appearance = plan.stages(config, job)
    assert (motion.steps, motion.mix) == (100, {"motion": 1})
    assert (appearance.steps, appearance.mix) == (100, {"motion": 1, "appearance": 9})
    text = edit_folder.job.read_text()
    edit_folder.job.write_text(text[: text.index('[[edited_frame]]\nimage = "edited_6')])
    assert [s.name for s in plan.stages(config, load_job(edit_folder.job, Grid()))] == ["motion"]


def test_a_clip_unlike_what_the_model_was_trained_on_is_told(edit_folder, open_model, capsys):
    from dataset.job import load_job
    from dataset.resize import Grid

    job, wan = load_job(edit_folder.job, Grid()), open_model("wan")

    def notes(rate, frames, every=1, model=wan):
        clip = job.frames[:1].repeat(frames, 0)
        return list(plan.clip_notes(replace(job, fps=Fraction(rate), frames=clip, every=every), model, frames))

    assert notes(24, 81) == []
    (fast,) = notes(60, 49)
    assert "wan was trained on 16 frames a second; at 60 the 49 frames are 0.8 s" in fast
    assert "every = 4 in the job makes it 15, and 49 frames 3.3 s; prepare.py --every 4" in fast
    (half,) = notes(30, 49, every=2)
    assert "every = 4 in the job makes it 15" in half
    (long,) = notes(16, 85)
    assert "85 frames at once are beyond the 81 that wan was trained on" in long
    assert notes(30, 85, model=open_model("token_replace")) == []
    edit_folder.job.write_text("fps = 50\n" + edit_folder.job.read_text())
    launch.train(load_config(edit_folder.config), dry_run=True)
    assert "every = 3 in the job" in capsys.readouterr().out


def test_a_damaged_copy_of_the_configuration_is_named(edit_folder):
    train(edit_folder)
    (run,) = edit_folder.runs()
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON .*remove it"):
        train(edit_folder, "resume_from_checkpoint=true", "stage.1.steps=4")


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_checkpoint_is_named(edit_folder, damage):
    train(edit_folder)
    (run,) = edit_folder.runs()
    path = run / "global_step6" / "layer_002.safetensors"
    path.write_bytes(path.read_bytes()[:100]) if damage == "truncated" else path.unlink()
    with pytest.raises(UserError, match=r"layer_002\.safetensors: unreadable training state"):
        train(edit_folder, "resume_from_checkpoint=true", "stage.1.steps=9")


@pytest.mark.parametrize(("setting", "home"), [({}, "cpu"), ({"capturable": True}, "meta"), ({"fused": True}, "meta")])
def test_a_step_counter_resumes_where_the_optimizers_kernels_look_for_it(tmp_path, setting, home):
    """`meta` stands for the weights' device."""
    weight = torch.nn.Parameter(torch.ones(2))
    before = torch.optim.AdamW([weight])
    weight.sum().backward()
    before.step()
    state.save(tmp_path, 1, {0: {"w": weight}}, before, True, World(0, 0, 1, torch.device("cpu")), {})
    there = torch.nn.Parameter(torch.ones(2, device="meta"))
    after = torch.optim.AdamW([there])
    after.param_groups[0] |= setting
    state.load(tmp_path / "global_step1", {0: {"w": there}}, after)
    assert {key: value.device.type for key, value in after.state[there].items()} == {
        "step": home, "exp_avg": "meta", "exp_avg_sq": "meta",
    }


def test_nothing_to_resume_is_told_with_what_is_there(edit_folder):
    with pytest.raises(UserError, match="no run to resume"):
        train(edit_folder, "resume_from_checkpoint=true")
    train(edit_folder)
    (run,) = edit_folder.runs()
    (run / "latest").unlink()
    with pytest.raises(UserError, match=r"no file `latest`.*global_step3, global_step6"):
        train(edit_folder, f"resume_from_checkpoint={run}")
    (run / "latest").touch()
    with pytest.raises(UserError, match=r"its file `latest` is empty.* Whole is .*global_step6: name it"):
        train(edit_folder, f"resume_from_checkpoint={run}")


def test_the_plan_says_from_which_step_a_run_goes_on_and_what_it_will_write(edit_folder, capsys):
    train(edit_folder)
    (run,) = edit_folder.runs()
    assert "resumes" not in capsys.readouterr().out
    launch.train(load_config(edit_folder.config, [f"resume_from_checkpoint={run / 'global_step3'}"]), dry_run=True)
    assert f"resumes   {run / 'global_step3'}, at step 3: steps left: 3" in capsys.readouterr().out
    train(edit_folder, "resume_from_checkpoint=true", "stage.1.steps=4")
    out = capsys.readouterr().out
    assert f"resumes   {run / 'global_step6'}, at step 6: steps left: 1" in out
    assert f"writes    {run}: step7/ and global_step7/, latest, config.json, metrics.jsonl, tensorboard events" in out


def test_a_warm_up_that_the_run_does_not_reach_the_end_of_is_told(edit_folder, capsys):
    for steps, told in ((6, False), (60, True)):
        launch.train(load_config(edit_folder.config, [f"warmup_steps={steps}", "optimizer.lr=1e-3"]), dry_run=True)
        note = "warmup_steps = 60 is longer than the run, 6 steps: its learning rate grows to 0.0001, not to"
        assert (note in capsys.readouterr().out) == told


def test_a_checkpoint_of_other_linears_another_rank_alpha_or_optimizer_is_refused(edit_folder):
    """Before anything is encoded or loaded; other linears once after that, and another alpha not at all."""
    train(edit_folder, "adapter.exclude_modules=['ffn.2']")
    for keys, message in (
        (["adapter.exclude_modules=['ffn.2', 'ffn.0']"],
         r"layer_001\.safetensors: weight .*ffn\.0\.lora_A\.weight: this run does not train it.*exclude_modules"),
        ([], r"layer_001\.safetensors: weight .*ffn\.2\.lora_A\.weight: expected shape .*, found nothing.*exclude_modules"),
        (["adapter.rank=8"], r"another model or rank \(rank: state 4, this run 8\)\. Set model and adapter\.rank"),
        (["adapter.alpha=8"], "was trained with alpha 4, this run has 8: .* 2 times as much. Set adapter.alpha = 4"),
        (["optimizer.type=sgd"], r"global_step6: .* optimizer AdamW, this run has SGD.*init_from_existing"),
    ):
        with pytest.raises(UserError, match=message):
            launch.train(load_config(edit_folder.config, ["resume_from_checkpoint=true", *keys]), dry_run=True)


def test_a_lora_of_other_linears_or_rank_is_no_beginning(edit_folder):
    """It once ended a run after the transformer was loaded."""
    train(edit_folder)
    existing = f"adapter.init_from_existing={edit_folder.runs()[0] / 'step6'}"
    for key, message in (("adapter.rank=8", "of another shape.*adapter.rank"),
                         ("adapter.exclude_modules=['ffn.2']", r"unexpected .*ffn\.2.*adapter\.exclude_modules")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            launch.train(load_config(edit_folder.config, [existing, key]), dry_run=True)


def test_a_run_that_a_person_named_is_not_the_newest(edit_folder, capsys):
    train(edit_folder)
    (first,) = edit_folder.runs()
    first.rename(first.with_name("good one"))
    train(edit_folder)
    newest = edit_folder.runs()[0]
    assert runs.newest_lora(edit_folder.path / "runs") == newest / "step6" / "adapter_model.safetensors"
    assert runs.to_resume(load_config(edit_folder.config, ["resume_from_checkpoint=true"])) == newest / "global_step6"
    assert inspect.main([str(edit_folder.path / "runs")]) == 0
    assert f"2 runs; the newest:\nfolder      {newest}" in capsys.readouterr().out


@pytest.mark.parametrize("last", ["export", "save_state"])
def test_a_run_that_was_killed_between_its_last_lora_and_state_has_both_when_it_is_resumed(edit_folder, monkeypatch, last):
    """It once said that nothing was left and named a LoRA that was not there; the edit took an older one."""
    write = getattr(Trainer, last)

    def killed(trainer):
        if trainer.step == 6:
            raise KeyboardInterrupt
        write(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, last, killed)
        with pytest.raises(KeyboardInterrupt):
            train(edit_folder)
    train(edit_folder, "resume_from_checkpoint=true")
    train(edit_folder)
    resumed, whole = edit_folder.runs()
    assert (resumed / "latest").read_text() == "global_step6\n"
    assert_same(lora_of(resumed, 6), lora_of(whole, 6))


def test_a_state_that_cannot_be_written_leaves_no_half_and_takes_away_those_of_killed_processes(edit_folder, monkeypatch):
    monkeypatch.setattr(state, "write_json_atomic", lambda *_: (_ for _ in ()).throw(UserError("full")))
    with pytest.raises(UserError, match="full"):
        train(edit_folder)
    (run,) = edit_folder.runs()
    assert list(run.glob(".*")) == []
    monkeypatch.undo()
    train(edit_folder)
    run = edit_folder.runs()[-1]
    (run / ".global_step2.partial").mkdir()
    train(edit_folder, "resume_from_checkpoint=true", "stage.1.steps=4")
    assert list(run.glob(".*")) == []


def test_two_trainings_in_one_run_folder_are_refused(edit_folder):
    """They once wrote over each other's states and numbers."""
    train(edit_folder)
    (run,) = edit_folder.runs()
    with runs.claimed(run):
        for dry in (True, False):
            with pytest.raises(UserError, match=f"{run}: another process trains in it"):
                launch.train(load_config(edit_folder.config, ["resume_from_checkpoint=true", "stage.1.steps=4"]), dry)
        train(edit_folder, f"resume_from_checkpoint={run / 'global_step3'}")
    train(edit_folder, f"resume_from_checkpoint={run}", "stage.1.steps=4")
    assert (run / "latest").read_text() == "global_step7\n"


def test_a_run_folder_that_may_not_be_written_is_refused_before_the_model_is_loaded(edit_folder, monkeypatch):
    """Not by a real folder: tests may run as a user who may write everything."""
    train(edit_folder)
    (run,) = edit_folder.runs()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != run)
    with pytest.raises(UserError, match=rf"{run} may not be written to"):
        launch.train(load_config(edit_folder.config, ["resume_from_checkpoint=true", "stage.1.steps=4"]), dry_run=True)


def test_a_run_keeps_its_folder_to_itself_until_it_ends(edit_folder, monkeypatch):
    held = []

    def step(trainer):
        with pytest.raises(UserError, match="another process trains in it"), runs.claimed(trainer.run):
            pass
        held.append(trainer.run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_one_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(edit_folder)
    with runs.claimed(*held):
        pass


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    """Also if the other one makes its folder when this one has looked for it already."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert len({runs.create(tmp_path / "runs") for _ in range(3)}) == 3


def test_training_and_editing_over_8_bit_storage(edit_folder):
    """The loss stays near that of full storage, resuming is exact, the edit runs."""
    train(edit_folder)
    train(edit_folder, "model.transformer_dtype=float8")
    full, stored = edit_folder.losses(0), edit_folder.losses(1)
    assert stored == pytest.approx(full, rel=0.05)
    assert stored != full
    (edit_folder.runs()[1] / "latest").write_text("global_step3\n")
    train(edit_folder, "model.transformer_dtype=float8", f"resume_from_checkpoint={edit_folder.runs()[1].name}")
    assert edit_folder.losses(1) == stored
    folder = launch.edit(load_config(edit_folder.config, ["model.transformer_dtype=float8", "edit.output=png"]), None, None)
    assert len(list((folder / "edited").glob("*.png"))) == 9
