"""From a configuration to a finished training run or edit: what the verbs call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from common.files import check_writable
from dataset.cache import LatentCache
from dataset.job import EditJob, load_job
from dataset.resize import Grid
from dataset.triple import EncodedTriple, Triple
from loraedit_ext import lora, plan, regimes
from loraedit_ext import run as runs
from loraedit_ext.config import RunConfig, StageSettings
from loraedit_ext.doctor import ram
from loraedit_ext.editing import pieces
from loraedit_ext.encode import Unconditional, encode_all, identity
from loraedit_ext.family import Family
from loraedit_ext.forecast import product_rate
from loraedit_ext.hunyuan import MaskedHunyuan
from loraedit_ext.pipeline import World, check_world, distributed, planned_world, split, together
from loraedit_ext.training import state
from loraedit_ext.training.optim import check_optimizer, find_optimizer
from loraedit_ext.training.preview import Preview, describe_preview, plan_preview
from loraedit_ext.wan import MaskedWan
from models.attention_backend import attention_backend, check_backend
from models.base import I2VModel
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.layers import PipelineLayer
from models.streaming import streamed_blocks
from models.wan.checkpoint import WanCheckpoint

if TYPE_CHECKING:
    from loraedit_ext.editing.editor import Edit
    from loraedit_ext.editing.experts import Expert

MAX_AREA = 832 * 480
"""Pixels of a frame beyond which the default size is scaled down: what 480P models were trained on."""

Say = Callable[[str], None]
"""Prints a line, in the main process alone."""

FAMILIES: dict[Family, tuple[type[WanCheckpoint | HunyuanCheckpoint], type[MaskedWan | MaskedHunyuan]]] = {
    "wan": (WanCheckpoint, MaskedWan),
    "hunyuan-video": (HunyuanCheckpoint, MaskedHunyuan),
}
"""How each family's checkpoint is opened, and its model with the masked conditioning."""


def build_model(config: RunConfig, device: torch.device) -> I2VModel:
    """The masked model of the configured family; reads headers, no weights."""
    settings = config.model
    open_checkpoint, masked = FAMILIES[settings.type]
    chosen = {"expert": settings.expert} if settings.expert else {}
    checkpoint = open_checkpoint.open(
        settings.ckpt_path, settings.transformer_path, settings.vae_path, settings.llm_path, settings.clip_path, **chosen
    )
    return masked(checkpoint, device, config.mask_rule, vae_dtype=getattr(torch, settings.vae_dtype))


def open_job(config: RunConfig, model: I2VModel) -> EditJob:
    """The edit job, fitted to the model's grid; its choices tell what the mask leaves out of the edited pictures."""
    geometry = model.geometry
    job = load_job(config.dataset, Grid(geometry.temporal_stride, geometry.size_step, MAX_AREA))
    return replace(job, choices=(*job.choices, *regimes.left_out(job)))


def cache_of(config: RunConfig) -> LatentCache:
    """The latent cache: beside the job by default, in a folder per model family as diffusion-pipe has it."""
    folder = config.cache_dir or config.dataset.parent / "cache"
    return LatentCache(folder / config.model.type)


@dataclass(frozen=True)
class Prepared:
    """A run that is understood and planned, but not started."""

    model: I2VModel
    job: EditJob
    stages: Sequence[StageSettings]
    triples: Mapping[str, Sequence[Triple]]
    preview: Preview | None
    resumed: Path | None
    """The state that it goes on from."""
    done: int
    """The step that this is at."""

    @property
    def finished(self) -> bool:
        """Whether the run that was to be resumed is at its end already."""
        return self.done >= sum(stage.steps for stage in self.stages)

    def samples(self) -> list[Triple | Unconditional]:
        """Everything that the frozen encoders are needed for."""
        training = [triple for group in self.triples.values() for triple in group]
        return [*training, *(self.preview.samples() if self.preview else [])]


def train(config: RunConfig, dry_run: bool = False, cache_only: bool = False) -> None:
    """Plan, encode, train, export.

    Args:
        dry_run: stop after the plan; nothing is written.
        cache_only: stop when everything is encoded.
    """
    if dry_run:
        prepare(config, planned_world(config.pipeline_stages))
        return
    with distributed() as world:
        logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
        prepared = prepare(config, world)
        if prepared.finished and not cache_only:
            if world.is_main:
                print("done      nothing is left to train.", flush=True)
            return
        samples = encode_all(prepared.model, prepared.samples(), cache_of(config), config.mask_rule, world)
        if not cache_only:
            with attention_backend(config.attention_backend):
                _run(config, world, prepared, samples)


def prepare(config: RunConfig, world: World) -> Prepared:
    """Check everything that can be checked before time is spent, and print the plan."""
    replicas = check_world(world, config.pipeline_stages)
    check_optimizer(config.optimizer)
    check_backend(config.attention_backend)
    check_writable(config.output_dir)
    model = build_model(config, world.device)
    transformer = model.build_transformer()
    streamed_blocks(transformer.layers(), config.blocks_to_swap)
    if config.pipeline_stages > 1:
        split(transformer.layers(), config.pipeline_stages, config.partition_method, config.partition_split)
    lora.inject(transformer, model, config.adapter)
    resumed, done = _check_beginning(config, model, transformer.layers())
    job = open_job(config, model)
    stages = plan.stages(config, job)
    preview = plan_preview(config, job, model.geometry)
    prepared = Prepared(model, job, stages, plan.triples(job, stages), preview, resumed, done)
    _check_left(prepared)
    if world.is_main:
        cached = _check_folders(config, prepared)
        machine, triples = this_machine(world), prepared.triples
        print(plan.describe(config, job, model, stages, triples, cached, transformer, replicas, machine, done), flush=True)
        if resumed:
            print(plan.describe_resume(resumed, done, stages), flush=True)
        if preview:
            print(describe_preview(preview, config, job, model), flush=True)
    return prepared


def _check_folders(config: RunConfig, prepared: Prepared) -> int:
    """Refuse folders that may not be written, or in which another process trains; returns how many samples are cached."""
    if prepared.resumed and state.is_newest(prepared.resumed):
        run = prepared.resumed.parent
        check_writable(run)
        with runs.claimed(run):
            pass  # refused here, not after the model is loaded
    cache = cache_of(config)
    samples = [triple for group in prepared.triples.values() for triple in group]
    cached = sum(identity(prepared.model, triple, config.mask_rule) in cache for triple in samples)
    if cached < len(samples):
        check_writable(cache.folder)
    return cached


def _check_beginning(config: RunConfig, model: I2VModel, layers: Sequence[PipelineLayer]) -> tuple[Path | None, int]:
    """Refuse a state or a LoRA that this run cannot begin with, before anything is encoded or loaded.

    Args:
        layers: of the transformer with the LoRA that will be trained, on the meta device.

    Returns:
        The state and the step that it is at; None and 0 for a new run.
    """
    if existing := config.adapter.init_from_existing:
        lora.start_from(existing, model, lora.trainable(layers))
    resumed = runs.to_resume(config)
    if resumed is None:
        return None, 0
    optimizer = find_optimizer(config.optimizer.type).__name__
    facts = state.check(resumed, model.describe(), config.adapter.rank, config.adapter.effective_alpha, optimizer)
    state.check_weights(resumed, {index: lora.trainable([layer]) for index, layer in enumerate(layers)})
    return resumed, facts["step"]


def _check_left(prepared: Prepared) -> None:
    """Refuse a state that is not its run's newest, so that a new run would begin with it, if nothing is left to train."""
    resumed, done = prepared.resumed, prepared.done
    if resumed and prepared.finished and not state.is_newest(resumed):
        there = resumed.parent / f"step{done}" / lora.EXPORT_NAME
        learned = f", or edit with what was learned until then: inference.py --lora {there}" if there.is_file() else ""
        total = sum(stage.steps for stage in prepared.stages)
        raise UserError(f"{resumed}: is at step {done}, and the stages end at step {total}: nothing is left to train. Raise "
                        f"the last stage's steps{learned}.")  # fmt: skip


def this_machine(world: World) -> plan.Machine:
    """What one of the processes on this host may use."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else None
    available, _ = ram()
    rate = product_rate(world.device, torch.bfloat16) if world.device.type == "cuda" else None
    return plan.Machine(device, available and available / world.local_size, rate)


def _run(
    config: RunConfig, world: World, prepared: Prepared, samples: Mapping[str, EncodedTriple]
) -> None:
    from loraedit_ext.training.trainer import Trainer, group_names

    trainer = Trainer(
        config, prepared.job, prepared.model, samples, group_names(prepared.triples), prepared.stages, world,
        world.broadcast(prepared.resumed), prepared.preview,
    )  # fmt: skip
    if world.is_main:
        print(plan.describe_files(trainer.run, prepared.stages, trainer.step), flush=True)
    trainer.train()
    if world.is_main:
        print(f"done      {trainer.run / f'step{trainer.step}' / lora.EXPORT_NAME}", flush=True)


def edit(config: RunConfig, lora_path: Path | None, out: Path | None) -> Path:
    """`edit_with_seeds` with `edit.seed` alone.

    Returns:
        The folder.
    """
    return edit_with_seeds(config, lora_path, out, [config.edit.seed])[0]


def edit_with_seeds(config: RunConfig, lora_path: Path | None, out: Path | None, seeds: Sequence[int]) -> list[Path]:
    """Edit the job's video with a trained LoRA, once for each seed of the noise, and write the results.

    Several processes take the passes of guidance by turns; the main one encodes, decodes and writes.

    Args:
        lora_path: default: the newest LoRA in output_dir.
        out: folder to write to, whatever it holds, of several seeds each in `seed_N` there; default: `edit` beside the LoRA,
            or `edit_2` and so on where that holds a result of other settings.

    Returns:
        The folders.
    """
    with together() as world:
        logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
        return _edit(config, world, lora_path, out, seeds)


def _edit(config: RunConfig, world: World, lora_path: Path | None, out: Path | None, seeds: Sequence[int]) -> list[Path]:
    from loraedit_ext.editing.editor import Editor, check_lora

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    plan.check_passes(config.edit, world.size)
    check_backend(config.attention_backend)
    if config.edit.other_lora:  # the file, so that the record tells which of a folder's LoRAs it was
        found = config.edit.model_copy(update={"other_lora": runs.lora_at(config.edit.other_lora)})
        config = config.model_copy(update={"edit": found})
    model = build_model(config, world.device)
    streamed_blocks(model.build_transformer().layers(), config.blocks_to_swap)
    job = open_job(config, model)
    adapter = lora.read(lora_path or runs.newest_lora(config.output_dir), model)
    for note in (*regimes.left_out(job), *check_lora(adapter, model, job, config.mask_rule)):
        say(f"note      {note}")
    check_writable(out or adapter.path.parent)
    stacked = _stacked(config, model, say)
    say(f"editing   {job.name} with {adapter.path}, strength {config.edit.lora_strength:g}")
    planned = pieces.plan(job, config.edit.clip_frames, model.geometry.temporal_stride)
    sampling = plan.describe_sampling(config.edit, world.size)
    for line in (sampling, plan.describe_result(job, config.edit), *pieces.describe(planned)):
        say(line)
    other = _other_expert(config, job, world.device, say) if config.model.expert else None
    editor = Editor(config, model, adapter, world, cache_of(config), stacked, other)
    folders = []
    for number, seed in enumerate(seeds, 1):
        place = out
        if len(seeds) > 1:
            say(f"seed      {seed}, {number} of {len(seeds)}")
            place = out and out / f"seed_{seed}"
        result = editor.edit(job, seed, again=number < len(seeds))
        seeded = config.model_copy(update={"edit": config.edit.model_copy(update={"seed": seed})})
        folders.append(_write(result, job, seeded, adapter, world, place, say))
    return folders


def _write(
    result: Edit, job: EditJob, config: RunConfig, adapter: lora.LoraFile, world: World, out: Path | None, say: Say
) -> Path:
    """Write a result to `out` or beside its LoRA; the folder."""
    from loraedit_ext.editing.results import FOLDER, folder_beside, write

    folder = world.broadcast(out or folder_beside(job, config, adapter))
    if not out and folder.name != FOLDER:
        say(f"note      {FOLDER} holds a result of other settings and stays; this one goes to {folder.name}")
    for line in write(folder, result, job, config, adapter) if world.is_main else ():
        say(f"wrote     {line}")
    return folder


def _stacked(config: RunConfig, model: I2VModel, say: Say) -> list[tuple[lora.LoraFile, float]]:
    """The LoRAs of [[edit.lora]] that are for this model, checked and told."""
    expert = model.describe().get("expert")
    stacked = [(lora.read(extra.path, model), extra.strength) for extra in config.edit.lora if extra.expert in (None, expert)]
    for extra, strength in stacked:
        lora.check_model(extra, model)
        whose = f" of the expert for {expert} noise" if expert else ""
        say(f"stacked   {extra.path} ({extra.layout} names){whose}, strength {strength:g}")
    return stacked


def _other_expert(config: RunConfig, job: EditJob, device: torch.device, say: Say) -> Expert:
    """The expert of Wan2.2 that `model.expert` does not name, with its LoRAs."""
    from loraedit_ext.editing.editor import check_lora
    from loraedit_ext.editing.experts import Expert

    name = "low" if config.model.expert == "high" else "high"
    changes = {"expert": name, "transformer_path": config.edit.other_transformer_path}
    try:
        model = build_model(config.model_copy(update={"model": config.model.model_copy(update=changes)}), device)
    except UserError as error:
        needed = f"editing needs the expert for {name} noise too; edit.other_transformer_path may name it"
        raise UserError(f"{needed}. {error}") from error
    stacked = _stacked(config, model, say)
    if config.edit.other_lora is None:
        say(f"note      the expert for {name} noise goes without a trained LoRA: edit.other_lora names one")
        return Expert(model, stacked)
    adapter = lora.read(config.edit.other_lora, model)
    for note in check_lora(adapter, model, job, config.mask_rule):
        say(f"note      {note}")
    say(f"editing   the expert for {name} noise with {adapter.path}")
    return Expert(model, [(adapter, config.edit.lora_strength), *stacked])
