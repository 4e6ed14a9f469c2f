"""The run's TOML: closed, typed, all errors together, overrides in TOML's and Python's spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.settings import load_settings
from dataset.schema import load_job_settings
from loraedit_ext import run as runs
from loraedit_ext.config import load_config, parse_value
from loraedit_ext.sweep.settings import SweepSettings


def test_paths_are_relative_to_the_toml(edit_folder):
    config = load_config(edit_folder.config)
    assert config.output_dir == edit_folder.path / "runs"
    assert config.dataset == edit_folder.path / "job.toml"


@pytest.mark.parametrize("override", ["output_dir=~nobody-of-this-name/runs", "edit.lora=[{path='~nobody-of-this-name/x'}]"])
def test_a_home_that_nobody_has_is_told(edit_folder, override):
    with pytest.raises(UserError, match=r"~nobody-of-this-name/.*: no such home folder"):
        load_config(edit_folder.config, [override])


def test_defaults_are_the_papers(edit_folder):
    config = load_config(edit_folder.config, ["adapter=None", "optimizer=None", "edit=None"])
    assert (config.adapter.rank, config.optimizer.lr, config.gradient_clipping) == (16, 1e-4, 1.0)
    assert (config.edit.steps, config.edit.guidance, config.edit.shift) == (30, 5.0, 5.0)


def test_guidance_leads_away_from_the_releases_negative_prompt_unless_another_is_given(edit_folder):
    config = load_config(edit_folder.config)
    assert config.edit.negative_prompt.startswith("色调艳丽，过曝，静态")
    assert load_config(edit_folder.config, ["edit.negative_prompt=blurry"]).edit.negative_prompt == "blurry"
    hunyuan = load_config(edit_folder.config, ["model.type=hunyuan-video"])
    assert hunyuan.edit.negative_prompt == ""


def test_all_errors_come_together_with_file_key_value_and_expectation(edit_folder):
    overrides = ["optimiser.lr=1", "model.shfit=3", "adapter.rank=0", "pipeline_stages=two", "model.dtype=float8"]
    with pytest.raises(UserError) as caught:
        load_config(edit_folder.config, overrides)
    message = str(caught.value)
    assert message.startswith("5 problems found")
    assert message.count(str(edit_folder.config)) == 5
    assert "unknown key `optimiser`; did you mean `optimizer`?" in message
    assert "unknown key `model.shfit`; did you mean `shift`?" in message
    assert "`adapter.rank` = 0: Input should be greater than or equal to 1" in message
    assert "`pipeline_stages` = 'two'" in message
    assert "`model.dtype` = 'float8': Input should be 'float32' or 'bfloat16'" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("None", None), ("1e-06", 1e-6), ("5e-4", 5e-4), ("16", 16),
     ("[0.9, 0.99]", [0.9, 0.99]),
     ("{ motion = 1 }", {"motion": 1}), ("cosine", "cosine"), ('"16"', "16"), ("runs/a b", "runs/a b")],
)
def test_override_values_take_toml_and_python_spellings(text, value):
    assert parse_value(text) == value


def test_overrides_reach_tables_and_list_items(edit_folder):
    config = load_config(edit_folder.config, ["stage.1.steps=7", "optimizer.weight_decay=0.1", "model.shift=3"])
    assert config.stage[1].steps == 7
    assert config.optimizer.arguments == {"weight_decay": 0.1}
    assert config.model.shift == 3


@pytest.mark.parametrize("override", ["optimizer.lr", "stage.5.steps=1", "output_dir.x=1", "=3", "edit.lora.0.strength=2"])
def test_a_malformed_override_is_named(edit_folder, override):
    with pytest.raises(UserError, match=r"^override `"):
        load_config(edit_folder.config, [override])


@pytest.mark.parametrize("key", ["optimizer.lr", "model.shift", "edit.lora_strength", "stage.0.mix.motion"])
def test_numbers_are_finite(edit_folder, key):
    for value in ("inf", "nan"):
        with pytest.raises(UserError, match=rf"`{key}` = {value}: Input should be a finite number"):
            load_config(edit_folder.config, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["save_every_n_steps", "edit.feather", "model.shift", "stage.0.steps"])
def test_true_is_no_number(edit_folder, key):
    with pytest.raises(UserError, match=rf"`{key}` = True: expected a number, found true or false"):
        load_config(edit_folder.config, [f"{key}=true"])


@pytest.mark.parametrize("key", ["dataset", "model.vae_path"])
def test_nothing_is_no_path(edit_folder, key):
    """It would be the folder of the TOML."""
    with pytest.raises(UserError, match=rf"`{key}` = '': is empty, expected a path"):
        load_config(edit_folder.config, [f"{key}=''"])


def test_the_run_and_the_job_taken_for_each_other_are_told_as_that(edit_folder):
    with pytest.raises(UserError) as caught:
        load_config(edit_folder.job)
    assert "unknown key `mask`; this is of an edit job's TOML, which `dataset` names." in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_job_settings(edit_folder.config)
    assert "unknown key `stage`; this is of a run's TOML, which names an edit job's as its `dataset`." in str(caught.value)
    assert "known keys" not in str(caught.value)


def test_what_is_wrong_in_a_table_is_told_without_the_table(edit_folder):
    with pytest.raises(UserError, match=r"edit\.toml: `model`: int8_matmul needs transformer_dtype = 'int8', found None"):
        load_config(edit_folder.config, ["model.int8_matmul=true"])


def test_a_value_that_may_be_of_several_types_is_one_problem_under_its_key(edit_folder):
    """The key once had pydantic's name of each type behind it."""
    with pytest.raises(UserError) as caught:
        load_config(edit_folder.config, ["resume_from_checkpoint=3"])
    assert "edit.toml: `resume_from_checkpoint` = 3: Input should be a valid boolean" in str(caught.value)
    assert "; or Input should be a valid string" in str(caught.value)
    sweep, limits = {"configs": ["edit.toml"], "output_dir": "out"}, {"min": 1, "maxi": 2}
    for wrong, told in ((3, "`parameters.adapter.rank` = 3: Input should be a valid list; or "),
                        (limits, "missing key `parameters.adapter.rank.max`; it is required"),
                        (limits, "unknown key `parameters.adapter.rank.maxi`; did you mean `max`?")):  # fmt: skip
        for parameters in ({"adapter.rank": wrong}, {"adapter": {"rank": wrong}}):
            with pytest.raises(UserError) as caught:
                load_settings(SweepSettings, Path("sweep.toml"), sweep | {"parameters": parameters})
            assert told in str(caught.value)
            assert "list[any]" not in str(caught.value)


def test_an_api_key_in_the_file_is_refused_without_repeating_it(edit_folder):
    with pytest.raises(UserError) as caught:
        load_config(edit_folder.config, ["monitoring.wandb_api_key=s3cret"])
    assert "wandb login" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.toml: no such file"):
        load_config(tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("output_dir = [")
    with pytest.raises(UserError, match=r"broken\.toml: not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_contradictions_are_refused(edit_folder):
    for overrides, words in (
        (["model.min_t=0.8", "model.max_t=0.2"], "must be below"),
        (["stage.1.name=motion"], "names must differ"),
        (["partition_method=manual"], "partition_split"),
        (["partition_method=manual", "partition_split=[2]", "pipeline_stages=3"], "need 2"),
        (["stage.0.mix={ motion = 0 }"], "above 0"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(edit_folder.config, overrides)


@pytest.mark.parametrize("overrides", [
    [], ["optimizer.lr=2e-4"], ["model.shift=None", "warmup_steps=3"], ["stage.0.steps=50", "output_dir=/tmp/a b"],
    ["stage=[{name='only', steps=2, mix={motion=1}}]", "optimizer=None"], ["optimizer.eps=1e-6", "monitoring.wandb_tags=['a']"],
    ["edit.lora=[{path='x.safetensors', strength=0.5}]"],
])
def test_a_run_folder_knows_what_its_command_set(edit_folder, overrides):
    """The found overrides on the same TOML give the run's configuration again, and none is found where none was given."""
    edit_folder.config.write_text(edit_folder.config.read_text().replace("[adapter]", "shift = 3.0\n[adapter]"))
    config, folder = load_config(edit_folder.config, overrides), edit_folder.path / "run"
    runs.write_config(folder, config.model_copy(update={"resume_from_checkpoint": True}), {})
    found = runs.overrides_of(folder, load_config(edit_folder.config))
    assert load_config(edit_folder.config, found) == config
    assert bool(found) == bool(overrides)
    assert runs.overrides_of(edit_folder.path, config) == []


def test_only_what_differs_is_set(edit_folder):
    runs.write_config(edit_folder.path / "run", load_config(edit_folder.config, ["optimizer.lr=2e-4", "seed=7"]), {})
    found = runs.overrides_of(edit_folder.path / "run", load_config(edit_folder.config))
    assert sorted(found) == ["optimizer.lr=0.0002", "seed=7"]
