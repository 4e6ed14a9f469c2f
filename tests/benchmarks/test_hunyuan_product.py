"""The experiment on the condition latents: what differs between its forms, and that it goes on where it stopped."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import hunyuan_product
from benchmarks.hunyuan_product import Product
from loraedit_ext import masks
from loraedit_ext.evaluation.suite.tasks import GUARD
from loraedit_ext.hunyuan import MaskedHunyuan
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.hunyuan.wrapper import HunyuanI2V
from pretraining import encoders
from pretraining.latents import LatentPool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tiny_hunyuan):
    return HunyuanCheckpoint.open(tiny_hunyuan["latent_concat"])


@pytest.fixture(scope="module")
def video():
    return torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_with_a_first_frame_mask_both_forms_are_the_released_input(checkpoint, video):
    arguments = (video, masks.first_frame_only(9, 32, 48), video[:, 0], "a cat")
    released = HunyuanI2V(checkpoint, CPU).encode_condition(*arguments)
    for form in (Product, MaskedHunyuan):
        found = form(checkpoint, CPU).encode_condition(*arguments)
        assert all(torch.equal(released[name], found[name]) for name in released)


def test_the_forms_differ_in_the_latents_behind_the_mask_and_in_nothing_else(checkpoint, video):
    preserve = torch.ones(9, 32, 48, dtype=torch.bool)
    preserve[1:, :, 16:32] = False
    arguments = (video, preserve, video[:, 0], "a cat")
    product = Product(checkpoint, CPU).encode_condition(*arguments)
    whole = MaskedHunyuan(checkpoint, CPU).encode_condition(*arguments)
    cells = product["mask"].bool().expand_as(product["known"])
    assert torch.equal(product["known"][cells], whole["known"][cells])
    assert not product["known"][~cells].any()
    assert whole["known"][~cells].any()
    assert all(torch.equal(product[name], whole[name]) for name in product if name != "known")


def test_told_pixels_are_those_of_whole_latents():
    preserve = torch.ones(9, 16, 16, dtype=torch.bool)
    preserve[0, 0, 0] = preserve[3, 0, 15] = False
    expected = torch.ones_like(preserve)
    expected[1:5, :8, 8:] = False
    assert torch.equal(hunyuan_product.told_pixels(preserve), expected)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("product")
    noise = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(2, *shape, generator=noise).half()

    (folder / "latents").mkdir()
    for shard in range(2):
        clips = LatentPool(
            video=draw(16, 4, 8, 8), condition=draw(16, 4, 8, 8), text=draw(encoders.TEXT_LEN, encoders.TEXT_DIM),
            image=draw(17, encoders.IMAGE_DIM), objects=draw(8, 8),
        )  # fmt: skip
        save_file(vars(clips), folder / "latents" / f"{shard}.safetensors")
    small = ["--base-steps=1", "--base-batch=2", "--seeds=1", "--steps=2", "--batch=1", "--sampling=1"]
    arguments = [f"--latents={folder / 'latents'}", f"--out={folder / 'out'}", f"--tasks={GUARD[0].name}", *small]
    hunyuan_product.main(arguments)
    return folder / "out", arguments


def test_one_command_makes_the_table_and_the_pictures(ran):
    out, _ = ran
    text = (out / "table.md").read_text()
    rows = re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
    forms = ["released, no LoRA", "product, no LoRA", "product, LoRA", "whole, no LoRA", "whole, LoRA"]
    assert rows == ["condition", *forms, "**whole - product, no LoRA**", "**whole - product, LoRA**"]
    assert (out / "edits.png").is_file()


def test_run_again_it_makes_what_is_missing_and_the_same(ran):
    out, arguments = ran
    lost, kept = sorted((out / "edits").iterdir())[1:3]
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    hunyuan_product.main(arguments)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp


def test_a_trained_edit_differs_from_an_untrained_one(ran):
    edits = {path.stem: path.read_bytes() for path in (ran[0] / "edits").iterdir()}
    assert len(set(edits.values())) == len(edits) == 5
