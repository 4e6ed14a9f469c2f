"""Guidance: which passes an edit takes, what they are told, and how their velocities are put together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid
from dataset.triple import EncodedTriple
from loraedit_ext import launch, masks, plan
from loraedit_ext.config import EditSettings, load_config
from loraedit_ext.editing import guidance, sampling
from loraedit_ext.encode import Unconditional
from loraedit_ext.pipeline import World

RAW = ("edit.output=png", "edit.composite=false", "edit.guidance=1")


@pytest.fixture
def job(edit_folder):
    return load_job(edit_folder.job, Grid())


def settings(**values):
    return EditSettings(**{"guidance": 1.0} | values)


def test_guidance_that_is_1_takes_no_pass(job):
    (only,) = guidance.passes(job, settings(), "all")
    assert (only.sample.name, only.weight) == ("edit", 0)


@pytest.mark.parametrize("values", [{}, {"guidance": 2.0}, {"source_guidance": 2.0}, {"guidance": 3.0, "source_guidance": 2.0}])
def test_passes_are_counted_without_a_job(job, values):
    assert guidance.count(settings(**values)) == len(guidance.passes(job, settings(**values), "all")) == 1 + len(values)


def test_the_plan_tells_how_often_the_model_is_asked():
    assert plan.describe_sampling(EditSettings()) == "sampling  30 steps x 2 pass(es), unipc"
    quick = EditSettings(compute_every=3, guidance=1.0)
    assert plan.describe_sampling(quick) == "sampling  13 of 30 steps x 1 pass(es), unipc"


def test_the_source_pass_is_the_edit_but_for_the_first_frame(job):
    edit, source = (each.sample for each in guidance.passes(job, settings(source_guidance=2.0), "all", "preview"))
    assert (edit.name, source.name) == ("preview", "preview-source")
    assert source.prompt == edit.prompt
    assert torch.equal(source.mask, edit.mask)
    assert torch.equal(source.condition[:, 1:], edit.condition[:, 1:])
    first = torch.from_numpy(job.frames[0].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(source.condition[:, 0], first, atol=1e-6)
    assert torch.equal(source.reference, source.condition[:, 0])
    assert not torch.equal(source.reference, edit.reference)


@pytest.mark.parametrize("rule", ["all", "nearest"])
def test_source_guidance_counts_where_latents_are_generated(job, rule):
    edit, source = guidance.passes(job, settings(source_guidance=3.0), rule)
    known = masks.latent_mask(edit.sample.mask, rule)
    assert torch.equal(source.weight, 2 * (1 - known))
    assert (source.weight[:, 0] == 0).all()
    assert (source.weight[:, 1:] == 2).any()
    assert (source.weight[:, 1:] == 0).any()


def test_classifier_free_guidance_is_told_the_negative_prompt_and_nothing_else_changes(job):
    planned = guidance.passes(job, settings(guidance=5.0, source_guidance=2.0, negative_prompt="blurry"), "all")
    _, negative, _ = planned
    assert isinstance(negative.sample, Unconditional)
    assert (negative.sample.prompt, negative.weight) == ("blurry", 4)
    names = [each.sample.name for each in planned]
    assert names == ["edit", "edit-negative", "edit-source"]
    words = ({"y": 0, "text": 0}, {"text": 1}, {"y": 2, "text": 2})
    encoded = {name: EncodedTriple(name, None, each) for name, each in zip(names, words, strict=True)}
    conditions, weights = zip(*guidance.told(planned, encoded), strict=True)
    assert conditions == ({"y": 0, "text": 0}, {"y": 0, "text": 1}, {"y": 2, "text": 2})
    assert all(weight is each.weight for weight, each in zip(weights, planned, strict=True))


def test_a_job_without_edited_first_frame_is_refused(edit_folder):
    edit_folder.job.write_text(edit_folder.job.read_text().replace("frame = 0", "frame = 3"))
    with pytest.raises(UserError, match="no edited first frame"):
        guidance.passes(load_job(edit_folder.job, Grid()), settings(source_guidance=2.0), "all")


def test_one_pass_is_followed_as_it_is():
    velocity = torch.randn(1, 16, 3, 4, 4)
    assert torch.equal(guidance.combined([velocity], [0.0]), velocity)


def test_classifier_free_guidance_is_the_known_formula():
    conditional, plain = torch.randn(2, 1, 16, 3, 4, 4, dtype=torch.float64)
    expected = plain + 5 * (conditional - plain)
    assert torch.allclose(guidance.combined([conditional, plain], [0.0, 4.0]), expected, atol=1e-12)


def test_what_a_lora_heeds_too_little_is_restored():
    """A LoRA that heeds the first frame to a fourth, and follows its memory for the rest: a weight of 4 gives the edit."""
    memory, of_edit, of_source = torch.randn(3, 1, 16, 3, 4, 4, dtype=torch.float64)
    heeded = [0.75 * memory + 0.25 * first for first in (of_edit, of_source)]
    found = guidance.combined(heeded, [0.0, 3.0])
    assert torch.allclose(found - heeded[1], of_edit - of_source, atol=1e-12)


def test_both_kinds_of_guidance_add_up():
    edit, plain, source = torch.randn(3, 1, 16, 3, 4, 4, dtype=torch.float64)
    where = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    where[:, 1:] = 0.5
    found = guidance.combined([edit, plain, source], [0.0, 2.0, where])
    assert torch.allclose(found[:, :, 0], (3 * edit - 2 * plain)[:, :, 0], atol=1e-12)
    assert torch.allclose(found[:, :, 1:], (3.5 * edit - 2 * plain - 0.5 * source)[:, :, 1:], atol=1e-12)


def frames_of(folder, *overrides):
    out = launch.edit(load_config(folder.config, [*RAW, *overrides]), None, None)
    return np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))])


def check_led_away(folder) -> None:
    """With the source's own first frame and caption both passes are the same: guidance must change no bit."""
    launch.train(load_config(folder.config, ["stage=[{name='motion', steps=1, mix={motion=1}}]"]))
    plain, guided = frames_of(folder), frames_of(folder, "edit.source_guidance=3")
    assert (plain[1:] != guided[1:]).mean() > 0.05
    write_png(folder.path / "edited_0.png", read_image(sorted((folder.path / "source").glob("*.png"))[0]))
    assert (frames_of(folder) == frames_of(folder, "edit.source_guidance=3")).all()
    assert (frames_of(folder) != plain).any()


def test_an_edit_is_led_away_from_the_source_and_an_unedited_frame_from_nothing(edit_folder):
    check_led_away(edit_folder)


def test_the_same_with_both_variants_of_hunyuan(hunyuan_folder):
    check_led_away(hunyuan_folder)


class Counting:
    """A model whose velocity of a pass is that pass's number, and which notes who was asked."""

    def __init__(self):
        self.asked = []

    def model_inputs(self, x, _t, _condition, _embedded):
        return (x,)

    def forward(self, inputs, number):
        self.asked.append(number)
        return torch.full_like(inputs[0], float(number))


@pytest.mark.parametrize(("rank", "size", "own"), [(0, 1, [0, 1, 2]), (0, 2, [0, 2]), (1, 2, [1]), (2, 3, [2])])
def test_processes_take_the_passes_by_turns(monkeypatch, rank, size, own):
    model, shared = Counting(), []

    def share(_world, value, number):
        shared.append(number)
        return torch.full_like(value, float(number))

    monkeypatch.setattr(World, "share", share)
    world = World(rank, rank, size, torch.device("cpu"))
    velocity = sampling.velocity(model, model.forward, [({}, 0.0), ({}, 4.0), ({}, 1.0)], settings(), world)
    found = velocity(torch.zeros(1, 4, 1, 2, 2), torch.tensor(0.5))
    assert model.asked == own
    assert shared == [0, 1, 2]
    assert (found == 0 + 4 * (0 - 1) + 1 * (0 - 2)).all()
