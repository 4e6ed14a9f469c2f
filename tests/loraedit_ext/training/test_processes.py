"""The same run on one process, two pipeline stages and two replicas, over gloo; some through the real launchers."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from dataset.images import read_image
from models.wan.random_weights import tiny_config, write_random_checkpoint
from tests.conftest import strips, write_edit_folder
from tests.processes import launch

TWO_SAMPLES = "gradient_accumulation_steps=2"
CLIPPED = ["gradient_clipping=0.05", "eval_every_n_steps=3"]
SGD = ["optimizer.type=sgd", "optimizer.lr=0.05", "gradient_clipping=0"]


def numbers(rows: list[dict]) -> list[tuple[str, float]]:
    """Losses, norms and evaluation losses of a run in order; times and memory left out."""
    return [
        (name, value) for row in rows for name, value in sorted(row.items())
        if "loss" in name or name == "train/grad_norm"
    ]


def assert_close(first, second, tolerance):
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, a), (_, b) in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "launcher"), [(CLIPPED, "torchrun"), (SGD, "")], ids=["adamw-clipped", "sgd-unclipped"])
def test_two_pipeline_stages_equal_one_process(edit_folder, optimizer, launcher):
    """With clipping, regimes of different shape and evaluation between; and with plain gradients (SGD).

    Guards: DeepSpeed clips by the first stage's norm alone, and sends stale shapes when they change.
    """
    launch(edit_folder, TWO_SAMPLES, *optimizer)
    launch(edit_folder, TWO_SAMPLES, *optimizer, "pipeline_stages=2", processes=2, launcher=launcher)
    first, second = numbers(edit_folder.metrics(0)), numbers(edit_folder.metrics(1))
    assert len(first) >= 12
    assert_close(first, second, 1e-6)


@pytest.mark.slow
def test_two_pipeline_stages_of_an_expert_equal_one_process(tmp_path):
    """Wan2.2's stream has one constant fewer: no image crosses the boundary."""
    write_random_checkpoint(tmp_path / "wan22", tiny_config("wan2.2"))
    folder = write_edit_folder(tmp_path, "wan", tmp_path / "wan22")
    launch(folder, TWO_SAMPLES, "model.expert=high")
    launch(folder, TWO_SAMPLES, "model.expert=high", "pipeline_stages=2", processes=2)
    assert_close(numbers(folder.metrics(0)), numbers(folder.metrics(1)), 1e-6)


@pytest.mark.slow
def test_previews_with_two_pipeline_stages_are_those_of_one_process_and_change_no_number(edit_folder):
    previews = ["sample_every_n_steps=3", "preview.steps=2", "edit.composite=false"]
    launch(edit_folder, *previews)
    launch(edit_folder, *previews, "pipeline_stages=2", processes=2)
    launch(edit_folder, "pipeline_stages=2", processes=2)
    one, two, without = edit_folder.runs()
    assert numbers(edit_folder.metrics(1)) == numbers(edit_folder.metrics(2))
    first, second = strips(one), strips(two)
    assert list(first) == list(second) == [3, 6]
    assert all(np.abs(first[step].astype(int) - second[step]).max() <= 1 for step in first)
    assert not (without / "previews").exists()


@pytest.mark.slow
def test_two_replicas_equal_one_process_with_twice_the_accumulation(edit_folder):
    launch(edit_folder, TWO_SAMPLES, *SGD)
    launch(edit_folder, "gradient_accumulation_steps=1", *SGD, processes=2)
    assert_close(numbers(edit_folder.metrics(0)), numbers(edit_folder.metrics(1)), 1e-6)


@pytest.mark.slow
def test_an_edit_whose_passes_two_processes_share_is_that_of_one(edit_folder):
    """In pieces too, where the second begins with what the main process made of the first."""
    launch(edit_folder)
    overrides = ["edit.output=png", "edit.guidance=3", "edit.source_guidance=2", "edit.clip_frames=5", "edit.steps=3"]
    made = {}
    for launcher, processes in (("", 1), ("deepspeed", 2)):
        out = edit_folder.path / f"out{processes}"
        done = launch(edit_folder, *overrides, "--out", str(out), processes=processes, launcher=launcher, verb="inference")
        made[launcher] = np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))])
        assert done.stdout.count("editing   ") == 1, "one process speaks"
        assert ("x 3 pass(es) on 2 devices" in done.stdout) == (processes == 2)
    assert len(made[""]) == 9
    assert (made["deepspeed"] == made[""]).all()
    assert len(list(edit_folder.path.glob("out*"))) == 2


@pytest.mark.slow
def test_more_processes_than_passes_are_refused(edit_folder):
    launch(edit_folder)
    done = launch(edit_folder, "edit.guidance=1", processes=2, launcher="torchrun", check=False, verb="inference")
    assert done.returncode != 0
    assert "2 processes for an edit of 1 pass(es) a step" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("split", [["pipeline_stages=2", TWO_SAMPLES], ["gradient_accumulation_steps=1"]],
                         ids=["stages", "replicas"])
def test_8_bit_storage_crosses_processes(edit_folder, split):
    launch(edit_folder, TWO_SAMPLES, *SGD, "model.transformer_dtype=float8")
    launch(edit_folder, *SGD, *split, "model.transformer_dtype=float8", processes=2)
    assert_close(numbers(edit_folder.metrics(0)), numbers(edit_folder.metrics(1)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "in_place"), [(1, 2, False), (2, 1, True)])
def test_a_run_resumes_on_another_number_of_stages(edit_folder, before, after, in_place):
    """From its newest state in its own folder, from an earlier one in a new folder on which all processes agree."""
    launch(edit_folder)
    launch(edit_folder, f"pipeline_stages={before}", processes=before)
    second = edit_folder.runs()[1]
    if in_place:
        (second / "latest").write_text("global_step3\n")
    resume = ["--resume_from_checkpoint", second.name if in_place else f"{second.name}/global_step3"]
    launch(edit_folder, f"pipeline_stages={after}", *resume, processes=after)
    whole, *others = edit_folder.runs()
    assert len(others) == (1 if in_place else 2)
    assert_close(numbers(edit_folder.metrics(0)), numbers(edit_folder.metrics(-1)), 1e-6)
    first, last = (load_file(run / "step6" / "adapter_model.safetensors") for run in (whole, others[-1]))
    assert all((first[name] - last[name]).abs().max() < 1e-6 for name in first)


@pytest.mark.slow
def test_the_deepspeed_launcher_runs_it_and_ends_well(edit_folder):
    done = launch(edit_folder, "pipeline_stages=2", "model.dtype=bfloat16", processes=2, launcher="deepspeed")
    assert "2 pipeline stage(s) x 1 replica(s)" in done.stdout
    assert len(edit_folder.losses()) == 6


@pytest.mark.slow
def test_a_user_error_on_several_processes_ends_them_all_with_the_message(edit_folder):
    done = launch(edit_folder, "pipeline_stages=2", "adapter.init_from_existing=nothing.safetensors", processes=2,
                  launcher="torchrun", check=False)
    assert done.returncode != 0
    assert "nothing.safetensors: no such LoRA file" in done.stderr
    assert not edit_folder.runs()


def test_stages_that_do_not_divide_the_processes_are_refused(edit_folder):
    done = launch(edit_folder, "pipeline_stages=2", check=False)
    assert done.returncode == 2
    assert "pipeline_stages = 2 does not divide the 1 processes" in done.stderr
    assert "Traceback" not in done.stderr
