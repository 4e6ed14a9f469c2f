"""What became of diffusion-pipe's keys that we do not have: told where one is met (docs/diffusion-pipe.md lists them)."""

from __future__ import annotations

from collections.abc import Mapping

_STEPS = "a run is counted in steps, not epochs: set `steps` of the [[stage]] tables."
_EVERY = "runs are counted in steps: use `{}`."
_PER_STEP = "remove it: one micro-batch size holds for all there is."
_NO_NEED = "remove it: there is nothing to set here."

RUN: Mapping[str, str] = {
    "epochs": _STEPS,
    "max_steps": _STEPS,
    "save_every_n_epochs": _EVERY.format("save_every_n_steps"),
    "save_every_n_examples": _EVERY.format("save_every_n_steps"),
    "checkpoint_every_n_epochs": _EVERY.format("checkpoint_every_n_steps"),
    "eval_every_n_epochs": _EVERY.format("eval_every_n_steps"),
    "eval_every_n_examples": _EVERY.format("eval_every_n_steps"),
    "eval_datasets": "remove it: the evaluation is on the job itself, at fixed noise levels (`eval_every_n_steps`).",
    "eval_micro_batch_size_per_gpu": _PER_STEP,
    "eval_gradient_accumulation_steps": _PER_STEP,
    "image_micro_batch_size_per_gpu": _PER_STEP,
    "caching_batch_size": "remove it: samples are encoded one by one.",
    "map_num_proc": _NO_NEED,
    "steps_per_print": "use `logging_steps`.",
    "x_axis_examples": "remove it: steps are the axis.",
    "video_clip_mode": "the job chooses the frames: `start`, `frames` and `clip_frames` in its TOML.",
    "regenerate_cache": "remove it: entries are found by content, so that what changed is encoded again.",
    "reentrant_activation_checkpointing": "remove it: recomputation needs no such choice here.",
    "disable_block_swap_for_eval": "remove it: evaluation and editing swap as training does.",
    "force_constant_lr": "remove it: the rate is a function of the step, also when a run is resumed.",
    "huber_delta": "remove it: the loss is the mean squared error.",
    "smooth_l1_beta": "remove it: the loss is the mean squared error.",
    "pseudo_huber_c": "remove it: the loss is the mean squared error.",
    "uncond_fraction": "remove it: an edit trains with its prompts only.",
}
"""Top level of the run's TOML."""

MODEL: Mapping[str, str] = {
    "cache_text_embeddings": "remove it: they always are.",
    "text_encoder_fp8": "remove it: the text encoder runs once, before the transformer is loaded.",
    "flux_shift": "set a number as `shift`.",
    "diffusion_model": "use `transformer_path`.",
    "diffusion_model_dtype": "use `transformer_dtype`.",
    "vae": "use `vae_path`.",
    "text_encoders": "use `llm_path` and `clip_path`.",
}
"""[model]."""

ADAPTER: Mapping[str, str] = {
    "dtype": "remove it: a LoRA trains in float32; `save_dtype` is what it is written in.",
    "fuse_adapters": "`python -m loraedit_ext.lora.merge` merges LoRAs into a checkpoint, for any later run.",
}
"""[adapter]."""

OPTIMIZERS: Mapping[str, str] = {
    "adamw_optimi": "use 'adamw': Kahan summation is for bf16 weights, and a LoRA trains in float32 here",
    "adamw8bitkahan": "use 'adamw8bit': Kahan summation is for bf16 weights, and a LoRA trains in float32 here",
    "offload": "use 'adamw': a LoRA's moments are too small to be worth moving",
    "automagic": "use 'Prodigy', which finds its learning rate itself (lr = 1)",
    "genericoptim": "use 'Muon' or any other of torch.optim or pytorch_optimizer",
}
"""`optimizer.type`, in lower case."""
