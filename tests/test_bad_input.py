"""Every mistake a user can make is one message with file, finding, expectation and cure; status 2, no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import inference
import train
from dataset.images import write_png
from dataset.video_writer import write_video
from models.wan.checkpoint import WanCheckpoint
from tests.conftest import square_clip


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def masks(folder, value):
    for path in (folder.path / "mask").glob("*.png"):
        write_png(path, np.full((64, 64), value, np.uint8))


def truncated_video(folder):
    video, _ = square_clip()
    write_video(folder.path / "cut.mp4", video, 8)
    data = (folder.path / "cut.mp4").read_bytes()
    (folder.path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    rewrite(folder.job, 'source = "source"', 'source = "cut.mp4"')


def not_a_video(folder):
    (folder.path / "song.mp4").write_bytes(b"la la la" * 100)
    rewrite(folder.job, 'source = "source"', 'source = "song.mp4"')


def smaller_masks(folder):
    for path in (folder.path / "mask").glob("*.png"):
        write_png(path, np.zeros((32, 32), np.uint8))


def narrower_edit(folder):
    write_png(folder.path / "edited_6.png", np.zeros((40, 50, 3), np.uint8))


CASES = {
    "misspelled job key": (lambda f: rewrite(f.job, "caption =", "captoin ="), ["job.toml", "`captoin`", "did you mean"]),
    "wrong type": (lambda f: rewrite(f.job, "frame = 6", 'frame = "six"'), ["job.toml", "frame"]),
    "missing source": (lambda f: rewrite(f.job, 'source = "source"', 'source = "film.mp4"'), ["film.mp4"]),
    "unreadable video": (not_a_video, ["song.mp4"]),
    "truncated video": (truncated_video, ["cut.mp4"]),
    "video shorter than asked": (lambda f: f.job.write_text("frames = 13\n" + f.job.read_text()), ["source", "9", "13"]),
    "frames off the grid": (lambda f: f.job.write_text("frames = 8\n" + f.job.read_text()), ["4n+1", "5", "9"]),
    "size off the grid": (lambda f: f.job.write_text("size = [50, 64]\n" + f.job.read_text()), ["multiples of 16", "48"]),
    "masks of another size": (smaller_masks, ["mask", "32x32", "64x64"]),
    "too few masks": (lambda f: (f.path / "mask" / "008.png").unlink(), ["mask", "8", "9"]),
    "all-black mask": (lambda f: masks(f, 0), ["mask", "all black", "white"]),
    "all-white mask": (lambda f: masks(f, 255), ["mask", "all white"]),
    "edited frame of another aspect": (narrower_edit, ["edited_6.png", "50x40", "64x64"]),
    "frame index outside the clip": (lambda f: rewrite(f.job, "frame = 6", "frame = 9"), ["edited_6.png", "9"]),
    "missing edited frame": (lambda f: (f.path / "edited_0.png").unlink(), ["edited_0.png"]),
    "missing checkpoint": (lambda f: rewrite(f.config, "/checkpoint", "/nowhere"), ["nowhere", "no such folder"]),
    "missing job": (lambda f: f.job.unlink(), ["job.toml", "no such file"]),
    "broken TOML": (lambda f: f.config.write_text("output_dir = "), ["edit.toml", "not valid TOML"]),
    "unknown optimizer": (lambda f: rewrite(f.config, '"adamw"', '"adamm"'), ["optimizer.type", "adamm", "did you mean"]),
    "unknown optimizer argument": (lambda f: rewrite(f.config, "lr = 1e-3", "lr = 1e-3\nbetass = 1"), ["betass"]),
    "appearance without later edits": (
        lambda f: rewrite(f.job, '[[edited_frame]]\nimage = "edited_6.png"\nframe = 6\n', ""), ["appearance", "frame > 0"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_ends_with_a_clear_message(edit_folder, capsys, name):
    spoil, words = CASES[name]
    spoil(edit_folder)
    status = train.main(["--config", str(edit_folder.config)])
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not edit_folder.runs()


@pytest.mark.parametrize(("overrides", "words"), [
    (["optimizer.type=adamm"], "did you mean"),
    (["optimizer.type=adamw_optimi"], "use 'adamw'"),
    (["optimizer.weight_decy=0.1"], "takes no such argument"),
    (["optimizer.type=lbfgs"], "LBFGS asks for the loss several times a step"),
    (["optimizer.betas=[0.9]"], "[optimizer] type = 'adamw'"),
    (["output_dir=edit.toml/runs"], "is a file"),
    (["cache_dir=edit.toml"], "is a file"),
    (["adapter.exclude_modules=['q', 'k', 'v', 'o', 'ffn.0', 'ffn.2']"], "leave no linear to train"),
    (["resume_from_checkpoint=true"], "no run to resume"),
    (["resume_from_checkpoint=yesterday"], "yesterday: no such folder"),
    (["adapter.init_from_existing=yesterday"], "yesterday: no such LoRA file"),
    (["pipeline_stages=5"], "of 5 would hold layers"),
    (["pipeline_stages=2", "partition_method=manual", "partition_split=[9]"], "pipeline stage 1 of 2 would hold layers 9..5"),
])
def test_what_would_end_a_run_late_ends_the_dry_run(edit_folder, capsys, overrides, words):
    assert train.main(["--config", str(edit_folder.config), "--dry_run", *overrides]) == 2
    assert words in capsys.readouterr().err


def test_a_cache_that_cannot_be_ends_a_run_before_an_encoder_is_loaded(edit_folder, capsys, monkeypatch):
    monkeypatch.setattr(WanCheckpoint, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
    assert train.main(["--config", str(edit_folder.config), "cache_dir=edit.toml"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_t2v_model_is_refused_by_name(edit_folder, tiny_wan, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    spoiled = tmp_path / "t2v"
    shutil.copytree(tiny_wan, spoiled)
    for shard in spoiled.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(shard).items() if "img" not in n}
        if "patch_embedding.weight" in tensors:
            tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"][:, :16].contiguous()
        save_file(tensors, shard)
    (spoiled / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert train.main(["--config", str(edit_folder.config), f"model.ckpt_path={spoiled}"]) == 2
    error = capsys.readouterr().err
    assert "16 input channels" in error
    assert "36" in error


def test_missing_and_unexpected_weights_are_named(edit_folder, tiny_wan, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    spoiled = tmp_path / "spoiled"
    shutil.copytree(tiny_wan, spoiled)
    shard = sorted(spoiled.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors["blocks.0.mystery.weight"] = tensors.pop("blocks.0.self_attn.q.weight")
    save_file(tensors, shard)
    (spoiled / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert train.main(["--config", str(edit_folder.config), f"model.ckpt_path={spoiled}"]) == 2
    error = capsys.readouterr().err
    assert "blocks.0.self_attn.q.weight" in error
    assert "blocks.0.mystery.weight" in error


def test_errors_of_configuration_come_together(edit_folder, capsys):
    rewrite(edit_folder.config, "rank = 4", "rank = 0\nrnak = 4")
    rewrite(edit_folder.config, "lr = 1e-3", "lr = -1")
    assert train.main(["--config", str(edit_folder.config)]) == 2
    assert "3 problems found" in capsys.readouterr().err


def test_errors_of_media_come_together(edit_folder, capsys):
    smaller_masks(edit_folder)
    narrower_edit(edit_folder)
    (edit_folder.path / "edited_0.png").unlink()
    assert train.main(["--config", str(edit_folder.config)]) == 2
    error = capsys.readouterr().err
    for name in ("edited_0.png", "edited_6.png", "32x32"):
        assert name in error


def test_inference_without_a_lora_or_with_a_foreign_one(edit_folder, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    assert inference.main(["--config", str(edit_folder.config)]) == 2
    assert "no trained LoRA" in capsys.readouterr().err
    save_file({"lora.down": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert inference.main(["--config", str(edit_folder.config), "--lora", str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(edit_folder, capsys, monkeypatch):
    """The export fails for lack of space: the message names the file, and the checkpoint before is whole."""
    from safetensors import torch as safetensors_torch

    assert train.main(["--config", str(edit_folder.config), "stage=[{name='motion', steps=2, mix={motion=1}}]"]) == 0
    (run,) = edit_folder.runs()
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    status = train.main(["--config", str(edit_folder.config), "--resume_from_checkpoint"])
    error = capsys.readouterr().err
    assert status == 2
    assert "No space left on device" in error
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} == before
    assert (run / "latest").read_text() == "global_step2\n"


def test_a_gpu_without_enough_memory_is_told_with_what_helps(edit_folder, capsys, monkeypatch):
    import torch

    from loraedit_ext import launch

    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9 GiB. If reserved but unallocated memory is large try setting PYTORCH_X."
        )

    monkeypatch.setattr(launch, "train", full)
    assert train.main(["--config", str(edit_folder.config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the GPU has not enough memory: CUDA out of memory. Tried to allocate 9 GiB. What lowers it")
    for word in ("model.transformer_dtype=float8", "blocks_to_swap", "clip_frames", "docs/memory.md", "--dry_run"):
        assert word in error
    assert "Traceback" not in error
    assert "PYTORCH_X" not in error
    with pytest.raises(torch.OutOfMemoryError):
        train.main(["--config", str(edit_folder.config), "--traceback"])


def test_what_may_not_be_read_is_told_without_a_traceback(edit_folder, capsys, monkeypatch):
    """Not by a real folder: tests may run as a user who may read everything."""
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert train.main(["--config", str(edit_folder.config), "--dry_run"]) == 2
    assert f"error: {edit_folder.path / 'source'}: may not be read or written (Permission denied)" in capsys.readouterr().err


def test_a_disk_that_is_full_or_gone_in_the_middle_is_told_without_a_traceback(edit_folder, capsys, monkeypatch):
    from loraedit_ext import launch

    for number, told in ((errno.ENOSPC, "could not be written"), (errno.EROFS, "may not be read or written"),
                         (errno.ENOENT, "is not there")):
        error = OSError(number, os.strerror(number), "metrics.jsonl")
        monkeypatch.setattr(launch, "train", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert train.main(["--config", str(edit_folder.config)]) == 2
        assert f"error: metrics.jsonl: {told} ({os.strerror(number)})" in capsys.readouterr().err


def test_a_path_that_is_too_long_is_told_without_a_traceback(edit_folder, capsys):
    assert train.main(["--config", str(edit_folder.config), "--dry_run", f"model.ckpt_path={'x' * 300}"]) == 2
    assert "xx: File name too long. " in capsys.readouterr().err


def test_the_traceback_flag_shows_where_it_came_from(edit_folder):
    from common.errors import UserError

    edit_folder.job.unlink()
    with pytest.raises(UserError):
        train.main(["--config", str(edit_folder.config), "--traceback"])


def test_every_case_of_this_file_would_pass_unspoiled(edit_folder, capsys):
    assert train.main(["--config", str(edit_folder.config), "--dry_run"]) == 0
