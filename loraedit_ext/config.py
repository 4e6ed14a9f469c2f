"""The run's TOML: every knob of training and editing, closed and typed.

Key names follow diffusion-pipe where the meaning is the same. Values may be overridden as `key=value`.
"""

from __future__ import annotations

import ast
import os
import tomllib
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from common.errors import UserError
from common.files import placed
from common.settings import Settings, load_settings, read_toml
from dataset.schema import JobSettings
from loraedit_ext import diffusion_pipe
from loraedit_ext.family import Family
from loraedit_ext.flow import SamplerName, TimestepMethod
from loraedit_ext.masks import MaskRule
from loraedit_ext.regimes import EditCondition, Regime
from models.attention_backend import AttentionBackend
from models.wan.config import BOUNDARY, Expert

DType = Literal["float32", "bfloat16"]
StorageDType = Literal["float32", "bfloat16", "float8", "int8"]
OFFLOAD = "offload"
ATTENTION = "attention"
"""Values of `activation_checkpointing`, beside true and false."""

WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What Wan2.1 is guided away from unless told otherwise: a value of the release (`sample_neg_prompt` of shared_config.py)."""

FAMILY_DEFAULTS: dict[Family, dict[str, dict[str, Any]]] = {
    "wan": {"edit": {"negative_prompt": WAN_NEGATIVE}},
    "hunyuan-video": {
        "model": {"shift": 7.0, "guidance": 1.0},
        "edit": {"guidance": 1.0, "embedded_guidance": 6.0, "shift": 7.0, "sampler": "euler"},
    },
}
"""Values of a family that differ from the fields' own defaults, which are Wan's."""

_WAN22_EDIT = {"steps": 40, "guidance": 3.5, "boundary": BOUNDARY}
EXPERT_DEFAULTS: dict[Expert, dict[str, dict[str, Any]]] = {
    "high": {"model": {"min_t": BOUNDARY}, "edit": _WAN22_EDIT},
    "low": {"model": {"max_t": BOUNDARY}, "edit": _WAN22_EDIT},
}
"""The same of an expert of Wan2.2: it is trained on the noise levels that it is used for, and both edit as the release does."""


class ModelSettings(Settings):
    """[model]: the checkpoint and how noise levels are drawn for it."""

    elsewhere = diffusion_pipe.MODEL

    type: Family
    """Model family."""
    ckpt_path: Path | None = None
    """Folder of the checkpoint: the official layout or a diffusers folder. Not needed if every part has its own path."""
    transformer_path: Path | None = None
    """Transformer weights to use instead of the folder's."""
    vae_path: Path | None = None
    """VAE weights to use instead of the folder's."""
    llm_path: Path | None = None
    """Text encoder weights (UMT5, LLaVA) to use instead of the folder's."""
    clip_path: Path | None = None
    """CLIP weights to use instead of the folder's: Wan's image encoder, HunyuanVideo's second text encoder."""
    expert: Expert | None = None
    """Wan2.2 has two transformers: `high` is used for high noise and `low` for low. Needed for such a checkpoint unless
    `transformer_path` is set. Each is trained in a run of its own, and an edit uses both: see docs/wan22.md."""
    dtype: DType = "bfloat16"
    """Compute dtype; bfloat16 means autocast around fp32 residuals."""
    transformer_dtype: StorageDType | None = None
    """Storage dtype of the frozen transformer; default: `dtype`. float8 and int8: the blocks' linears in e4m3 or
    in integers, with a scale per row, the rest as `dtype`. An 8-bit file stays as it is as float8; of others int8 is the more
    exact. See docs/checkpoints.md."""
    int8_matmul: bool = False
    """With transformer_dtype = "int8": multiply 8-bit integers too, which GPUs do two to four times as fast as bf16. Not
    measured on a GPU yet. See docs/checkpoints.md."""
    vae_dtype: DType = "float32"
    """dtype of the VAE. bfloat16 halves its memory, and its time too where the processor computes in bf16; latents are cached
    for each apart."""
    timestep_sample_method: TimestepMethod = "logit_normal"
    sigmoid_scale: float = Field(1.0, gt=0)
    """Width of the logit-normal distribution."""
    shift: float | None = Field(None, gt=0)
    """Flow shift of the training timesteps; default: none for Wan, 7 for HunyuanVideo, as released."""
    guidance: float | None = Field(None, ge=0)
    """HunyuanVideo: guidance that is embedded in training; default 1, as in diffusion-pipe. Wan has no such input."""
    min_t: float = Field(0.0, ge=0, lt=1)
    """Least noise level of the training; it cuts the shifted distribution. With expert = "high": 0.9."""
    max_t: float = Field(1.0, gt=0, le=1)
    """Highest noise level. With expert = "low": 0.9."""
    stratified: bool = False
    """Visit every band of noise levels equally often, which evens out a run of 100 steps."""

    @property
    def source(self) -> Path:
        """Where the transformer comes from."""
        return self.transformer_path or self.ckpt_path or Path()

    @property
    def storage(self) -> tuple[torch.dtype, torch.dtype | None]:
        """dtypes of the frozen transformer: of all, and of the blocks' linears where it differs."""
        eight_bit = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
        if self.transformer_dtype in eight_bit:
            return getattr(torch, self.dtype), eight_bit[self.transformer_dtype]
        return getattr(torch, self.transformer_dtype or self.dtype), None

    @model_validator(mode="after")
    def _ordered(self) -> ModelSettings:
        if self.min_t >= self.max_t:
            raise ValueError(f"min_t = {self.min_t} must be below max_t = {self.max_t}")
        if self.int8_matmul and self.transformer_dtype != "int8":
            raise ValueError(f"int8_matmul needs transformer_dtype = 'int8', found {self.transformer_dtype!r}")
        return self


class AdapterSettings(Settings):
    """[adapter]: the LoRA."""

    elsewhere = diffusion_pipe.ADAPTER

    type: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; default: alpha = rank, as diffusion-pipe has it. Exports carry the scale either way."""
    dropout: float = Field(0.0, ge=0, lt=1)
    exclude_modules: list[str] = []
    """Linears to leave out, by the end of their original name, e.g. `cross_attn.q`."""
    init_from_existing: Path | None = None
    """A LoRA file, or a folder that holds one, to start from (weights only)."""

    @property
    def effective_alpha(self) -> float:
        return self.alpha or self.rank


class OptimizerSettings(Settings):
    """[optimizer]: `type`, `lr`, and any argument of that optimizer."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)

    type: str = "adamw"
    """A name from torch.optim, bitsandbytes.optim or pytorch_optimizer, e.g. adamw, adamw8bit, Prodigy."""
    lr: float = Field(1e-4, gt=0)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class StageSettings(Settings):
    """[[stage]]: a part of the run with its own mix of regimes."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    steps: int = Field(ge=1)
    """Optimizer steps."""
    mix: dict[Regime, float]
    """Share of the steps that each regime gets, e.g. {motion = 1, appearance = 9}."""

    @field_validator("mix")
    @classmethod
    def _positive(cls, mix: dict[Regime, float]) -> dict[Regime, float]:
        if not mix or any(weight <= 0 for weight in mix.values()):
            raise ValueError("every regime of a mix needs a weight above 0, and a mix at least one regime")
        return mix


class MonitoringSettings(Settings):
    """[monitoring]: wandb; metrics.jsonl and tensorboard are always written."""

    enable_wandb: bool = False
    wandb_tracker_name: str = "lora-edit"
    """wandb project."""
    wandb_run_name: str | None = None
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = []
    wandb_log_model: bool = False
    """Upload the final LoRA as an artifact."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Default: the environment's WANDB_MODE, else online."""
    wandb_api_key: None = None
    """Refused: a key in a file ends up in run folders. Run `wandb login` or set WANDB_API_KEY."""

    @field_validator("wandb_api_key", mode="before")
    @classmethod
    def _no_key(cls, value: Any) -> None:
        if value:
            raise ValueError("keys do not belong in a file that is copied to run folders; "
                             "run `wandb login` or set WANDB_API_KEY, and remove this line")


class StackedLora(Settings):
    """[[edit.lora]]: a LoRA on top of the trained one, e.g. a step-distilled one for sampling in 4 to 8 steps."""

    path: Path
    """A file of ComfyUI, diffusers, kohya or peft, or a folder that holds one."""
    strength: float = 1.0
    expert: Expert | None = None
    """Wan2.2: the expert that it is for; default: both."""


class EditSettings(Settings):
    """[edit]: how inference.py samples and what it writes."""

    steps: int = Field(30, ge=1)
    """Sampling steps. Wan2.2: 40, as released."""
    compute_every: int = Field(1, ge=1)
    """Only one in so many steps asks the model, the first and last few apart; the velocity of the others follows from the last
    two. 2 takes 0.6 of the time and 3 takes 0.4; untested on released weights. See docs/editing.md."""
    guidance: float = Field(5.0, ge=1)
    """Classifier-free guidance; 1 switches it off and halves the cost. HunyuanVideo: 1, its guidance is embedded. Wan2.2: 3.5,
    as released."""
    source_guidance: float = Field(1.0, ge=1)
    """Leads the edit away from what the LoRA makes of the source's own first frame, where that look shows through; 1 switches
    it off and saves a pass. On the tiny model 1.5 to 2 did best; untested on released ones. See docs/editing.md."""
    embedded_guidance: float | None = Field(None, ge=0)
    """HunyuanVideo: guidance that is embedded; default 6, as released. Wan has no such input."""
    shift: float = Field(5.0, gt=0)
    """Flow shift; upstream advises 3 at 480P, the released LoRA-Edit uses 5. HunyuanVideo: 7, as released."""
    sampler: SamplerName = "unipc"
    """HunyuanVideo: euler, as released."""
    seed: int = 42
    negative_prompt: str = ""
    """What classifier-free guidance leads away from; default of Wan: the release's own."""
    lora_strength: float = 1.0
    """Of the trained LoRA."""
    lora: list[StackedLora] = []
    """Further LoRAs on top of it; with a step-distilled one use few steps and guidance = 1."""
    other_lora: Path | None = None
    """Wan2.2: the LoRA of the expert that `model.expert` does not name: a file, a folder that holds one, or the `output_dir` of
    its runs, whose newest is taken. Default: that expert goes without."""
    other_transformer_path: Path | None = None
    """Wan2.2: that expert's weights, where they do not lie in `ckpt_path`."""
    boundary: float | None = Field(None, ge=0, le=1)
    """Wan2.2: the expert for high noise is used while the noise level is at least this; default 0.9, as released."""
    condition: EditCondition = "motion"
    """What the model is told: the background (`motion`); for the paper's ablations only the `first_frame`, `all` or `none`."""
    clip_frames: int | None = Field(None, ge=5)
    """Edit in pieces of at most this many frames, each from the last frame of the one before: for clips longer than the model
    takes at once. Default: the whole clip at once. See docs/editing.md."""
    composite: bool = True
    """Put the source's own pixels back wherever the mask preserves them."""
    feather: int = Field(8, ge=0)
    """Width of the blend inside the edited region, next to preserved pixels, in pixels of the result."""
    color_match: int = Field(16, ge=0)
    """How far, in pixels of the result, generated colours are led to the source's along the border of the region: the model
    makes the preserved pixels too, so how far it is off is known there. A drift of all colours is undone everywhere. 0: not at
    all. See docs/masks.md."""
    grain: float = Field(0.0, ge=0, le=2)
    """Film grain on the generated region: 1 gives it as much as the preserved pixels around it have. Off by default."""
    output: Literal["mp4", "prores", "png"] = "mp4"
    """`mp4` for players and browsers, `prores` (4444, within two grey levels of the pixels) for editing programs, `png` frames
    to the bit. The first two keep the source's audio."""
    size: Literal["source", "model"] = "source"
    """Of the result: the `source`'s own, with the region scaled up to it, or the one that the `model` works at. Without
    `composite` it is always the model's."""


class PreviewSettings(Settings):
    """[preview]: what `sample_every_n_steps` renders; the rest is as in [edit]. The plan states the cost."""

    steps: int = Field(10, ge=1)
    """Sampling steps."""
    guidance: float | None = Field(None, ge=1)
    """Classifier-free guidance, default: that of [edit]; 1 halves the cost."""
    max_frames: int = Field(17, ge=5)
    """The first frames, up to so many."""
    max_area: int = Field(416 * 240, ge=256)
    """Pixels of a frame up to which the video is rendered at its own size, beyond which it is scaled down."""


class EvaluationSettings(Settings):
    """[evaluation]: what evaluate.py needs for the metrics that have weights."""

    clip_path: Path | None = None
    """CLIP in Hugging Face layout, or a Wan2.1-I2V checkpoint whose CLIP is used (its folder, or its models_clip file);
    default: `checkpoints/clip-vit-large-patch14` in the current folder."""
    deqa_command: list[str] = []
    """Program and arguments that score a folder of frames, see docs/evaluation.md; default: no DeQA score."""
    deqa_timeout: float = Field(3600, gt=0)
    """Seconds that it may take."""


class RunConfig(Settings):
    """One edit: model, job, LoRA, optimizer, stages, monitoring, inference."""

    elsewhere = diffusion_pipe.RUN | dict.fromkeys(
        JobSettings.model_fields, "this is of an edit job's TOML, which `dataset` names."
    )

    output_dir: Path
    """Each run makes a folder of its own in here."""
    dataset: Path
    """TOML of the edit job."""
    cache_dir: Path | None = None
    """Where encoded triples are kept; default: `cache` beside the job's TOML."""
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    stage: list[StageSettings] = []
    """Default: 100 steps of motion, then, if later frames were edited, 100 of motion and appearance 1 : 9."""
    monitoring: MonitoringSettings = MonitoringSettings()
    edit: EditSettings = EditSettings()
    preview: PreviewSettings = PreviewSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    seed: int = 42
    mask_rule: MaskRule = "all"
    """When a latent cell counts as preserved: `all` its pixels are, or the `nearest` one is (released code)."""
    micro_batch_size_per_gpu: int = Field(1, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest gradient norm over all weights; 0 switches clipping off."""
    warmup_steps: int = Field(0, ge=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    pipeline_stages: int = Field(1, ge=1)
    """GPUs per copy of the model; the rest of the GPUs are replicas."""
    partition_method: Literal["uniform", "parameters", "manual"] = "parameters"
    """How layers are split over pipeline stages; `manual` reads `partition_split`."""
    partition_split: list[int] = []
    activation_checkpointing: bool | Literal["attention", "offload"] = True
    """Recompute each block in backward instead of keeping its activations. `attention`: all but the result of attention,
    which takes a tenth of the step off at 49 frames. `offload`: what recomputing needs, the blocks' inputs, waits in host
    memory; diffusion-pipe's `unsloth` means the same. See docs/memory.md."""
    blocks_to_swap: int = Field(0, ge=0)
    """So many transformer blocks fewer on the GPU, at most all but two: weights wait in host memory and are copied over
    just before they are needed. For training and editing; see docs/memory.md."""
    compile: bool = False
    """Use torch.compile for the transformer's blocks, in training and in editing: fewer and larger steps for the device
    beside the products, for about a minute of compiling at the start. Not measured on a GPU yet."""
    attention_backend: AttentionBackend = "torch"
    """Kernel that computes attention, in training and in editing, where it can: torch's own choice, one of torch's (`flash`,
    `efficient`, `cudnn`), or that of a package (`FA3`: flash-attn-3, `FA4`: flash-attn-4). See docs/training.md."""
    save_every_n_steps: int | None = Field(None, ge=1)
    """Export the LoRA; it is always exported at the end of each stage."""
    save_dtype: DType = "float32"
    checkpoint_every_n_steps: int | None = Field(None, ge=1)
    """Write the full training state; it is always written at the end of each stage."""
    checkpoint_every_n_minutes: float | None = Field(None, gt=0)
    eval_every_n_steps: int | None = Field(None, ge=1)
    """Loss at nine fixed quantiles of the timesteps, with fixed noise."""
    eval_before_first_step: bool = True
    early_stop_patience: int | None = Field(None, ge=1)
    """End the last stage after so many evaluations without a better mean loss of its regimes; default: never."""
    sample_every_n_steps: int | None = Field(None, ge=1)
    """Render the edit with the LoRA as it is, as [preview] says."""
    logging_steps: int = Field(1, ge=1)
    resume_from_checkpoint: bool | str = False
    """True: the newest run in `output_dir`; a name: that run folder."""

    @field_validator("activation_checkpointing", mode="wrap")
    @classmethod
    def _offload(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """diffusion-pipe's word becomes ours."""
        try:
            return validate(OFFLOAD if value == "unsloth" else value)
        except ValidationError as error:
            raise ValueError(f"expected true, false, '{ATTENTION}' or '{OFFLOAD}'") from error

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill in what the family or the expert has other defaults for, so that the resolved configuration tells all."""
        if not isinstance(values, dict) or not isinstance(model := values.get("model"), dict):
            return values
        filled = dict(values)
        known = ((EXPERT_DEFAULTS, model.get("expert")), (FAMILY_DEFAULTS, model.get("type")))  # the first goes before
        for table, defaults in chain(*(of.get(key, {}).items() for of, key in known if isinstance(key, str))):
            given = filled.get(table, {})
            if isinstance(given, dict):
                filled[table] = defaults | given
        return filled

    @model_validator(mode="after")
    def _fits_family(self) -> RunConfig:
        if self.model.type == "wan":
            for key, value in (("model.guidance", self.model.guidance),
                               ("edit.embedded_guidance", self.edit.embedded_guidance)):
                if value is not None:
                    raise ValueError(f"{key} = {value:g}: Wan embeds no guidance; remove it, or see edit.guidance")
        elif self.model.expert:
            raise ValueError(f"model.expert = {self.model.expert!r}: HunyuanVideo has no experts; remove it")
        if self.model.expert and self.sample_every_n_steps:
            raise ValueError(
                f"sample_every_n_steps = {self.sample_every_n_steps}: a preview of Wan2.2 needs both experts, and a training "
                "has one of them in memory; remove it, and edit with inference.py when both are trained"
            )
        return self

    @model_validator(mode="after")
    def _experts_where_there_are_two(self) -> RunConfig:
        keys = ("other_lora", "other_transformer_path", "boundary")
        given = [f"edit.{key}" for key in keys if getattr(self.edit, key) is not None]
        given += [f"edit.lora.{index}.expert" for index, extra in enumerate(self.edit.lora) if extra.expert]
        if given and not self.model.expert:
            raise ValueError(f"{', '.join(given)}: for Wan2.2's two experts; set model.expert, or remove it")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        names = [stage.name for stage in self.stage]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, found {names}")
        if self.blocks_to_swap and self.pipeline_stages > 1:
            raise ValueError(
                f"blocks_to_swap = {self.blocks_to_swap} needs pipeline_stages = 1, found {self.pipeline_stages}; "
                "save memory with the one or the other"
            )
        if self.blocks_to_swap and not self.activation_checkpointing:
            raise ValueError(
                f"blocks_to_swap = {self.blocks_to_swap} needs activation_checkpointing, not false: a block's "
                "weights come again when it is recomputed in backward"
            )
        if self.early_stop_patience and not self.eval_every_n_steps:
            raise ValueError("early_stop_patience counts evaluations; set eval_every_n_steps too")
        if (self.partition_method == "manual") != bool(self.partition_split):
            raise ValueError("partition_split goes with partition_method = 'manual', and is needed there")
        if self.partition_split and len(self.partition_split) != self.pipeline_stages - 1:
            raise ValueError(
                f"partition_split has {len(self.partition_split)} cuts; "
                f"{self.pipeline_stages} pipeline stages need {self.pipeline_stages - 1}"
            )
        return self


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read the run's TOML, apply `key=value` overrides, resolve paths relative to the TOML.

    Raises:
        UserError: all that is wrong with it, together.
    """
    values = read_toml(path)
    for override in overrides:
        apply_override(values, override)
    return _resolve_paths(load_settings(RunConfig, path, values), path.parent.resolve())


def load_evaluation(overrides: Iterable[str]) -> EvaluationSettings:
    """The [evaluation] table from overrides alone, for files that no config made; paths are relative to here.

    Raises:
        UserError: an override is of another table, unknown, or of the wrong type.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("evaluation."):
            raise UserError(f"override `{override}`: without --config only keys of [evaluation] have a meaning.")
        apply_override(values, override)
    return load_settings(EvaluationSettings, Path("command line"), values.get("evaluation", {}))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `key=value` names in nested tables; None removes it.

    Raises:
        UserError: it is no `key=value`, or leads nowhere.
    """
    key, found, text = override.partition("=")
    if not found or not key:
        raise UserError(f"override `{override}`: expected key=value, e.g. optimizer.lr=2e-4")
    *parents, last = key.strip().split(".")
    table: Any = values
    for part, inner in pairwise([*parents, last]):
        if isinstance(table, dict) and part not in table and inner.isdigit():
            raise UserError(f"override `{override}`: the file has no [[{part}]] to change. Write it there.")
        table = _descend(table, part, override)
    value = parse_value(text.strip())
    if isinstance(table, list):
        table[_index(table, last, override)] = value
    elif value is None:
        table.pop(last, None)
    else:
        table[last] = value


def _descend(table: Any, part: str, override: str) -> Any:
    if isinstance(table, list):
        return table[_index(table, part, override)]
    nested = table.setdefault(part, {})
    if not isinstance(nested, dict | list):
        raise UserError(f"override `{override}`: `{part}` is a value, not a table")
    return nested


def _index(table: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(table):
        raise UserError(f"override `{override}`: `{part}` is not a position in a list of {len(table)}")
    return int(part)


def parse_value(text: str) -> Any:
    """A TOML value, or Python's spelling of one, as wandb sweeps write it (True, None, 1e-06), else a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _resolve_paths(config: RunConfig, base: Path) -> RunConfig:
    """Paths in the TOML are relative to it."""
    changes: dict[str, Any] = {}
    for table_name, table in ((None, config), ("model", config.model), ("adapter", config.adapter),
                              ("edit", config.edit), ("evaluation", config.evaluation)):
        paths = {
            name: Path(os.path.normpath(placed(value, base))) for name in type(table).model_fields
            if isinstance(value := getattr(table, name), Path)
        }
        if table_name is None:
            changes |= paths
        else:
            changes[table_name] = table.model_copy(update=paths)
    stacked = [extra.model_copy(update={"path": placed(extra.path, base)}) for extra in config.edit.lora]
    changes["edit"] = changes["edit"].model_copy(update={"lora": stacked})
    return config.model_copy(update=changes)
