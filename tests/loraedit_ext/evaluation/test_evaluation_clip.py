"""CLIP metrics on a tiny random CLIP, and scores from external programs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.errors import UserError
from common.files import hash_file
from loraedit_ext.evaluation import clip_metrics, external

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A full CLIP, text tower and all, as people download it."""
    path = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    CLIPModel(config).save_pretrained(path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder) -> clip_metrics.ClipImages:
    return clip_metrics.ClipImages(folder, CPU)


@pytest.fixture(scope="module")
def wan_file(folder, tmp_path_factory) -> Path:
    """The same image tower as `folder`'s in the names of Wan's models_clip file; 31 layers of it would be Wan's."""
    theirs = load_file(folder / "model.safetensors")
    ours = {"log_scale": torch.zeros(()), "visual.head": theirs["visual_projection.weight"].t().contiguous()}
    for name, tensor in theirs.items():
        if not name.startswith("vision_model.") or name.endswith("position_ids"):
            continue
        short = name.removeprefix("vision_model.")
        for old, new in (("embeddings.class_embedding", "cls_embedding"), ("pre_layrnorm", "pre_norm"),
                         ("embeddings.position_embedding.weight", "pos_embedding"), ("post_layernorm", "post_norm"),
                         ("embeddings.patch_embedding", "patch_embedding"), ("encoder.layers", "transformer"),
                         ("layer_norm", "norm"), ("self_attn.out_proj", "attn.proj"), ("mlp.fc1", "mlp.0"),
                         ("mlp.fc2", "mlp.2")):  # fmt: skip
            short = short.replace(old, new)
        lead = {"cls_embedding": (1, 1), "pos_embedding": (1,)}.get(short, ())
        ours[f"visual.{short}"] = tensor.reshape(*lead, *tensor.shape)
    for index in range(VISION["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"visual.transformer.{index}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            ours[f"visual.transformer.{index}.attn.to_qkv.{kind}"] = torch.cat(parts)
    path = tmp_path_factory.mktemp("wan") / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(ours, path)
    return path


def test_wans_own_clip_embeds_as_the_clip_that_it_is(folder, clip, wan_file):
    """The whole tower, its last norm and its projection; by the file, or by the checkpoint's folder."""
    exact = CLIPModel.from_pretrained(folder, vision_config=VISION | {"hidden_act": "gelu"}, text_config=TEXT).eval()
    frames = video(0, height=60)
    pixels = clip.processor(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = exact.get_image_features(pixel_values=pixels).pooler_output
    expected = theirs / theirs.norm(dim=-1, keepdim=True)
    for path in (wan_file, wan_file.parent):
        ours = clip_metrics.ClipImages(path, CPU, num_heads=VISION["num_attention_heads"])
        torch.testing.assert_close(ours.embed(frames), expected, atol=1e-5, rtol=1e-4)
        assert ours.variant.startswith(f"Wan's CLIP ({wan_file.name}): 2 layers of 32")
    assert not torch.allclose(clip.embed(frames), expected, atol=1e-3)  # quick_gelu, where Wan's has the exact one


def test_a_tower_without_its_projection_is_told(wan_file, tmp_path):
    state = torch.load(wan_file, weights_only=True)
    del state["visual.head"]
    torch.save(state, tmp_path / wan_file.name)
    with pytest.raises(UserError, match=r"without its projection \(`visual\.head`\)"):
        clip_metrics.ClipImages(tmp_path, CPU, num_heads=4)


def video(seed: int, frames: int = 5, height: int = 40, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def test_embeddings_are_the_full_models(folder, clip):
    """Against CLIPModel, which finds the projection's size where the folder keeps it."""
    frames = video(0)
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = clip.processor(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
    ours = clip.embed(frames)
    assert ours.shape == (5, 24)
    torch.testing.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_scores_are_the_papers_means(clip):
    edited, source, reference = video(1), video(2), video(3)[0]
    found = clip_metrics.clip_scores(clip, edited, source, reference)
    e, s, r = clip.embed(edited), clip.embed(source), clip.embed(reference[None])[0]
    cosines = [float(torch.dot(frame, r)) for frame in e]
    assert found.crop.clip_score == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.crop.clip_score_later == pytest.approx(np.mean(cosines[1:]), abs=1e-6)
    assert found.crop.frame_clip_score == pytest.approx(cosines, abs=1e-6)
    similar = [float(torch.dot(a, b)) for a, b in zip(e, s, strict=True)]
    assert found.crop.input_similarity == pytest.approx(np.mean(similar), abs=1e-6)
    assert found.crop.ceiling == pytest.approx(float(torch.dot(r, s[0])), abs=1e-6)


def test_the_source_itself_is_perfectly_similar(clip):
    source = video(4)
    found = clip_metrics.clip_scores(clip, source, source, source[0]).crop
    assert found.input_similarity == pytest.approx(1, abs=1e-5)
    assert found.ceiling == pytest.approx(1, abs=1e-5)
    assert found.frame_clip_score[0] == pytest.approx(1, abs=1e-5)
    assert found.clip_score_later < 1 - 1e-4


def test_wide_videos_are_judged_whole_too(clip):
    """The centre crop does not see a wide picture's sides, the letterbox does."""
    source = video(5, width=120)
    edited = source.copy()
    edited[:, :, :30] = 0
    found = clip_metrics.clip_scores(clip, edited, source, edited[0])
    assert found.crop.input_similarity == pytest.approx(1, abs=1e-5)
    assert found.letterbox.input_similarity < 1 - 1e-4
    assert clip_metrics.clip_scores(clip, video(6), video(6), video(6)[0]).letterbox is None


def test_a_letterbox_keeps_every_pixel():
    boxed = clip_metrics.letterbox(np.ones((2, 3, 8, 3), np.uint8))
    assert boxed.shape == (2, 8, 8, 3)
    assert boxed[:, 2:5].all()
    assert boxed.sum() == 2 * 3 * 8 * 3


def test_the_result_names_its_model(folder, clip):
    found = clip_metrics.clip_scores(clip, video(1), video(2), video(3)[0]).as_json()
    assert found["variant"] == "tiny-clip: 2 layers of 32, 32 pixels, patch 8"
    assert found["sha256"] == hash_file(folder / "model.safetensors")
    json.dumps(found)


def test_half_a_folder_is_named(tmp_path, folder):
    with pytest.raises(UserError, match=r"config\.json, preprocessor_config\.json"):
        clip_metrics.ClipImages(tmp_path, CPU)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors or pytorch_model\.bin"):
        clip_metrics.ClipImages(tmp_path, CPU)


def test_another_kind_of_model_is_refused(tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UserError, match="siglip"):
        clip_metrics.ClipImages(tmp_path, CPU)


def test_missing_weights_are_no_random_numbers(tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks visual_projection"):
        clip_metrics.ClipImages(tmp_path, CPU)


def script(tmp_path: Path, body: str) -> list[str]:
    """A command that runs a Python body with `frames`, `out` and `json` in scope."""
    path = tmp_path / "score.py"
    head = "import json, os, sys, time\nframes, out = sys.argv[1:]\nnames = sorted(os.listdir(frames))\n"
    path.write_text(head + body)
    return [sys.executable, str(path), "{frames}", "{out}"]


def test_an_external_program_scores_the_frames(tmp_path):
    frames = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)])
    body = "import cv2\nprint('chatter')\n" \
        "json.dump([float(cv2.imread(f'{frames}/{n}').mean()) for n in names], open(out, 'w'))"
    assert external.score_frames(script(tmp_path, body), frames, 60) == [10, 20, 30]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('no memory'); sys.exit(3)", r"status 3.*\nno memory"),
        ("pass", r"wrote no \{out\} file"),
        ("open(out, 'w').write('4.2, 3')", "no valid JSON"),
        ("json.dump([1.0, 2.0], open(out, 'w'))", "2 values, expected a list of 3"),
        ("json.dump([1.0, 2.0, float('nan')], open(out, 'w'))", "finite"),
        ("json.dump([1, 2, '3'], open(out, 'w'))", "finite numbers"),
        ("json.dump({'a': 1}, open(out, 'w'))", "wrote dict"),
    ],
)
def test_a_program_that_fails_is_told(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        external.score_frames(script(tmp_path, body), video(0, 3), 60)


def test_a_missing_program_or_placeholder_is_told():
    with pytest.raises(UserError, match="could not be started"):
        external.score_frames(["/nowhere/python", "{frames}", "{out}"], video(0, 2), 5)
    with pytest.raises(UserError, match=r"has no \{out\}"):
        external.score_frames([sys.executable, "{frames}"], video(0, 2), 5)


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    pid_file, program = tmp_path / "pid", tmp_path / "hangs.sh"
    program.write_text(f"sleep 600 & echo $! > '{pid_file}'; wait\n")  # a shell is there at once, also on a busy machine
    started = time.monotonic()
    with pytest.raises(UserError, match="longer than 4 s"):
        external.score_frames(["sh", str(program), "{frames}", "{out}"], video(0, 2), 4)
    assert time.monotonic() - started < 300
    assert not _alive(int(pid_file.read_text()))


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split(")")[1].split()[0] == "Z":
            return False
        time.sleep(0.1)
    os.kill(pid, 9)
    return True
