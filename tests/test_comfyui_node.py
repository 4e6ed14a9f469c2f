"""The ComfyUI nodes tell the model exactly what training told it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from loraedit_ext import masks
from loraedit_ext.hunyuan import MaskedHunyuan
from loraedit_ext.wan import MaskedWan
from models.base import I2VModel
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.wan.checkpoint import WanCheckpoint

NODE = Path(__file__).parents[1] / "examples" / "comfyui" / "__init__.py"
FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture(scope="module")
def node():
    """The module as ComfyUI loads it: from its file, outside any package of ours."""
    spec = importlib.util.spec_from_file_location("custom_node", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def media():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(FRAMES, HEIGHT, WIDTH)
    for frame in range(FRAMES):
        mask[frame, 5:20, 3 + frame : 21 + frame] = 1
    return torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=generator), mask, torch.rand(1, HEIGHT, WIDTH, 3, generator=generator)


class Vae:
    """ComfyUI's interface over our encoder: IMAGE in, latents before the model's normalisation out."""

    def __init__(self, model: I2VModel) -> None:
        self.model = model

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_video(images.movedim(-1, 0) * 2 - 1)[None]


def condition_video(source: torch.Tensor, mask: torch.Tensor, edited: torch.Tensor, keep_outside: bool) -> torch.Tensor:
    """The source with the edited first frame, (3, F, H, W) in [-1, 1], as `inference.py` has it."""
    first = torch.where(mask[:1, ..., None] < 0.5, source[:1], edited) if keep_outside else edited
    return torch.cat([first, source[1:]]).movedim(-1, 0) * 2 - 1


def concat_cond(options: dict) -> torch.Tensor:
    """How ComfyUI's WAN21 makes the model's 20 extra channels of a conditioning (its `concat_cond`, equal sizes)."""
    assert options["concat_mask"].shape[1] == 4, "any other number is averaged"
    return torch.cat([1.0 - options["concat_mask"], options["concat_latent_image"]], dim=1)


@pytest.mark.parametrize(("rule", "keep_outside"), [("all", True), ("nearest", True), ("all", False)])
def test_the_model_gets_the_condition_of_our_own_inference(node, media, tiny_wan, rule, keep_outside):
    source, mask, edited = media
    model = MaskedWan(WanCheckpoint.open(tiny_wan), torch.device("cpu"), rule)
    text = [[torch.zeros(1, 3, 8), {"pooled_output": None}]]
    positive, negative, latent = node.LoraEditCondition().condition(
        text, text, Vae(model), source, mask, edited, clip_vision_output="clip", mask_rule=rule,
        keep_outside=keep_outside,
    )
    preserve = masks.with_first_frame(mask < 0.5)
    video = condition_video(source, mask, edited, keep_outside)
    ours = model.encode_condition(video, preserve, video[:, 0], "p3rs0n, a square")["y"]
    for made in (positive, negative):
        features, options = made[0]
        assert features is text[0][0]
        assert options["clip_vision_output"] == "clip"
        assert torch.allclose(concat_cond(options)[0], ours, atol=1e-5)
    assert text[0][1] == {"pooled_output": None}
    assert latent["samples"].shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)


def hunyuan_concat_cond(options: dict) -> torch.Tensor:
    """How ComfyUI's HunyuanVideoI2V makes its 17 extra channels (`concat_keys`: concat_image, mask_inverted; equal sizes)."""
    return torch.cat([options["concat_latent_image"], 1.0 - options["concat_mask"][:, :1].round()], dim=1)


@pytest.mark.parametrize(("rule", "keep_outside", "whole"), [
    ("all", True, False), ("nearest", True, False), ("all", False, False), ("all", True, True),
])
def test_hunyuan_gets_the_condition_of_our_own_inference(node, media, tiny_hunyuan, rule, keep_outside, whole):
    """Also where a whole latent frame is to be generated, which stays zero."""
    source, mask, edited = media
    mask = mask.clone()
    mask[5:] = 1 if whole else mask[5:]
    model = MaskedHunyuan(HunyuanCheckpoint.open(tiny_hunyuan["latent_concat"]), torch.device("cpu"), rule)
    text = [[torch.zeros(1, 3, 8), {"pooled_output": None}]]
    positive, negative, latent = node.LoraEditConditionHunyuan().condition(
        text, text, Vae(model), source, mask, edited, mask_rule=rule, keep_outside=keep_outside
    )
    video = condition_video(source, mask, edited, keep_outside)
    ours = model.encode_condition(video, masks.with_first_frame(mask < 0.5), video[:, 0], "p3rs0n, a square")
    for made in (positive, negative):
        found = hunyuan_concat_cond(made[0][1])[0]
        assert torch.allclose(found, torch.cat([ours["known"], ours["mask"]]), atol=1e-5)
        assert found[:, 2].any() != whole
    assert latent["samples"].shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)


def test_one_mask_serves_all_frames(node, media):
    source, mask, edited = media
    vae = type("Vae", (), {"encode": lambda self, images: images})()
    still = node.LoraEditCondition().condition([[0, {}]], [[0, {}]], vae, source, mask[4:5], edited)[0]
    every = node.LoraEditCondition().condition([[0, {}]], [[0, {}]], vae, source, mask[4:5].repeat(FRAMES, 1, 1), edited)[0]
    assert torch.equal(concat_cond_mask(still), concat_cond_mask(every))
    assert torch.equal(still[0][1]["concat_latent_image"], every[0][1]["concat_latent_image"])
    first = still[0][1]["concat_latent_image"][0]
    assert (first == torch.where(mask[4, ..., None] > 0.5, edited[0], source[0])).all()


def concat_cond_mask(conditioning: list) -> torch.Tensor:
    return conditioning[0][1]["concat_mask"]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda s, m, e: (s[:8], m[:8], e), r"8 frames of 48x32; expected 4n\+1"),
    (lambda s, m, e: (s[:, :24], m[:, :24], e[:, :24]), "multiples of 16"),
    (lambda s, m, e: (s, m[:3], e), "mask: 3 frames"),
    (lambda s, m, e: (s, m, e[:, :16]), "edited_first_frame: 48x16, expected the source's 48x32"),
    (lambda s, m, e: (s, torch.cat([0 * m[:1], m[1:]]), e), "mask: its first frame is all black"),
])
def test_media_that_do_not_fit_are_refused(node, media, spoil, words):
    with pytest.raises(ValueError, match=words):
        node.LoraEditCondition().condition([], [], None, *spoil(*media))


def test_comfyui_finds_the_nodes_and_their_inputs_are_their_arguments(node):
    import inspect

    assert {kind.__name__ for kind in node.NODE_CLASS_MAPPINGS.values()} == {"LoraEditCondition", "LoraEditConditionHunyuan"}
    for kind in node.NODE_CLASS_MAPPINGS.values():
        offered = kind.INPUT_TYPES()
        assert [*offered["required"], *offered["optional"]] == list(inspect.signature(kind.condition).parameters)[1:]
        assert hasattr(kind, kind.FUNCTION)
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) == 3
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == node.NODE_CLASS_MAPPINGS.keys()
