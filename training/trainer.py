"""What all stages share beyond transformers' Trainer: losses averaged over the whole batch however it is cut, losses
logged one by one, a stop at a loss that is not finite, checkpoints that appear whole or not at all, and own metrics.
"""

import contextlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from medsight.files import write_text
from medsight.hub import CardFacts, push

from .dataset import SampleDataset, Skipped
from .optimisation import muon_with_adamw
from .sharding import gather_in_methods
from .stage import Stage, frozen_modules


LOSSES = (
    *("lm_loss", "mask_loss", "alignment_loss", "perceiver_loss", "class_query_loss"),
    *("codebook_loss", "vq_loss", "reconstruction_loss", "group_loss"),
)
CHECKPOINT = "checkpoint-"
STATE_FILE = "stage_state.safetensors"
STEPS_FILE = "steps.jsonl"


class NotFiniteError(ValueError):
    """A loss is NaN or infinite."""


class SamplerEpoch(TrainerCallback):
    """Tells the sampler which epoch begins: a data loader that several processes resume in mid-epoch does not."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class StageTrainer(Trainer):
    """transformers' Trainer for one `Stage`; put before another Trainer class, that one for a `Stage`.

    Every loss of a step is a sum over all its samples divided by a count over all its samples, whatever the batch is
    cut into: micro-batches, processes. Each step's losses stand in `steps.jsonl`; after a resume the file goes on
    where the checkpoint was.

    Args:
        stage: what is trained and how it is scored.
        sampler: order of the training draws; none for streams.
    """

    def __init__(self, *args: Any, stage: Stage, sampler: Sampler | None = None, **kwargs: Any) -> None:
        self.stage, self.sampler = stage, sampler
        self.counts: dict[str, float] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.window: list[dict[str, Any]] = []  # steps that are not in the file yet
        self.unlogged: list[dict[str, Any]] = []
        self.skipped = 0
        self._staging: str | None = None
        if getattr(kwargs.get("args"), "push_to_hub", False):
            raise ValueError(
                "push_to_hub would upload a run's logs, example pictures and pickles at every save: leave it out, and "
                "publish the result with medsight push, or with the trainer's push_to_hub()"
            )
        super().__init__(*args, **kwargs)
        if not stage.shardable and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"stage {stage.name} needs whole parameters in every process, which FSDP and DeepSpeed divide: run "
                "it with training/accelerate/ddp.yaml, or in one process"
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed ZeRO-3 would wait for ever: it gathers a module's parameters when all processes run it, "
                "and one whose batch has no image, or cites no code, runs fewer modules. Take "
                "training/accelerate/fsdp2.yaml or deepspeed-zero2.yaml"
            )
        if sampler is not None:
            self.add_callback(SamplerEpoch(sampler))
        # The losses are scaled here, for accumulation too: Trainer must not divide them again.
        self.model_accepts_loss_kwargs = True
        self.frozen = frozen_modules(self.model)

    # Data

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        return self.sampler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """One step's batches, and the numbers over all processes that its losses are averages of."""
        if self.state.global_step >= self.state.max_steps:  # it was stopped after its last step
            self.control.should_training_stop = True
            return [], None
        batches = []
        for _ in range(num_batches):
            with contextlib.suppress(StopIteration):
                batches.append(next(epoch_iterator))
        names = ("tokens", "masks", "images", "asked", "codes")
        queries = self.stage.config.num_region_queries
        counts = [count_terms(batch, queries) for batch in batches]
        skipped = sum(batch.pop("skipped", 0) for batch in batches)
        sums = torch.tensor([*(sum(c[name] for c in counts) for name in names), skipped], dtype=torch.float64)
        *totals, skipped = self.accelerator.reduce(sums.to(device).float(), reduction="sum").tolist()
        self.counts = {name: max(1.0, total) for name, total in zip(names, totals, strict=True)}
        self.skipped += int(skipped)
        batches = [batch if batch["files"] else self.stand_in(self.train_dataset) for batch in batches]
        return batches, torch.tensor(self.counts["tokens"], device=device)

    def stand_in(self, dataset: SampleDataset) -> dict[str, Any]:
        """The first good sample as a batch without `files`: it passes through the model in place of a batch that all
        samples were left out of, as other processes' batches do, and counts for nothing."""
        reason = ""
        for draw in range(len(dataset)):
            sample = dataset[draw]
            if not isinstance(sample, Skipped):
                return {**self.data_collator([sample]), "files": []}
            reason = sample.reason
        raise ValueError(f"stage {self.stage.name}: every sample is broken; the last: {reason}")

    # Loss and step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, masks included; raises NotFiniteError naming the files of a batch."""
        inputs = dict(inputs)
        files = inputs.pop("files")
        for module in self.frozen:
            module.training = False  # a frozen encoder's batch statistics stay, too
        inputs = self.stage.before_forward(inputs, self.state.global_step / max(1, self.state.max_steps))
        if "labels" in inputs:
            inputs["num_items_in_batch"] = num_items_in_batch
        outputs = model(**inputs, loss_counts=self.counts)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            parts = {name: outputs[name].item() for name in LOSSES if outputs.get(name) is not None}
            raise NotFiniteError(
                f"stage {self.stage.name}, step {self.state.global_step + 1}: the loss is {loss.item()} ({parts}); "
                f"the batch holds {', '.join(files)}. The last checkpoint is untouched"
            )
        counts = float(bool(files))  # a stand-in does not
        for name in ("loss", *LOSSES):
            if outputs.get(name) is not None:
                self.sums[name] = self.sums.get(name, 0) + outputs[name].detach().float() * counts
        if files:
            self.stage.after_forward(outputs)
        # Gradients are averaged over processes, where the counts already span them.
        loss = loss * counts * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as `TrainingArguments` says, or Muon with AdamW where the stage has a `muon_learning_rate`."""
        self.optimizer: Any
        args, muon = self.args, self.stage.settings.muon_learning_rate
        if self.optimizer is None and muon:
            options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            self.optimizer = muon_with_adamw(self.model, muon, args.learning_rate, args.weight_decay, **options)
        return super().create_optimizer(*([] if model is None else [model]))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.sums:
            sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum").tolist()
            self.window.append({"step": self.state.global_step, **dict(zip(self.sums, sums, strict=True))})
            self.sums = {}
            self.stage.after_step(self)
        if self.control.should_log or self.control.should_save:
            self._write_steps()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _write_steps(self) -> None:
        self.unlogged += self.window
        if self.is_world_process_zero() and self.window:
            with open(Path(self.args.output_dir) / STEPS_FILE, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.window)
        self.window = []

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the mean of every loss since the last one."""
        steps, self.unlogged = self.unlogged, []
        if steps and "loss" in logs:
            for name in (name for name in steps[-1] if name != "step"):
                logs[name] = statistics.fmean(step[name] for step in steps if name in step)
        if self.skipped:
            logs["skipped_items"] = self.skipped
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write `checkpoint-N` under another name, then rename it: a checkpoint is whole or not there."""
        output = Path(self.args.output_dir)
        name = f"{CHECKPOINT}{self.state.global_step}"
        if (output / name).is_dir():
            return  # the same step of a resumed run: the same content
        staging = output / f".saving-{name}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                state = {key: value.cpu() for key, value in self.stage.state().items()}
                if state:
                    save_file(state, staging / name / STATE_FILE)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"checkpoint {output / name} could not be written ({error}); the one before is untouched"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in filter(Path.is_file, staging.rglob("*")):  # on the disk, before it has its name
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(staging / name, output / name)
            shutil.rmtree(staging, ignore_errors=True)
            limit = self.args.save_total_limit
            for old in checkpoints(output)[:-limit] if limit else ():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = Path(resume_from_checkpoint) / STATE_FILE
        if state.is_file():
            self.stage.load_state(load_file(state))
        if self.is_world_process_zero():
            cut_steps(Path(self.args.output_dir) / STEPS_FILE, int(str(resume_from_checkpoint).rsplit("-", 1)[1]))

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """Publish the model as it is, its processor and a card, as `medsight push` does: no logs, no pictures.

        Args:
            facts: of `medsight.hub.CardFacts`.

        Returns:
            A `medsight.hub.Push` on the main process, None on others.

        Raises:
            OSError, ValueError: as `medsight.hub.push`; or `hub_model_id` is not set.
        """
        if self.args.hub_model_id is None:
            raise ValueError("hub_model_id is not set: expected NAMESPACE/NAME of a repository on the Hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            self.stage.processor.save_pretrained(folder)
            return push(
                folder,
                self.args.hub_model_id,
                private=bool(self.args.hub_private_repo if private is None else private),
                revision=revision or self.args.hub_revision,
                message=commit_message,
                token=token or self.args.hub_token,
                facts=CardFacts(**facts) if facts else None,
            )

    # Scores

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process' share of the validation samples: every n-th, none twice, as many batches as every other has.

        `scored` says how many of the batches count; a last one may be there for company alone: where parameters are
        sharded, all processes make the same passes.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size, limit = self.args.per_device_eval_batch_size, self.stage.settings.eval_batches
        count = len(dataset) if limit is None else min(len(dataset), limit * size)
        chosen = [place * len(dataset) // count for place in range(count)]
        shares = [chosen[first :: self.args.world_size] for first in range(self.args.world_size)]
        share = shares[self.args.process_index]
        batches = [share[start : start + size] for start in range(0, len(share), size)]
        scored, most = len(batches), -(-len(shares[0]) // size)
        loader = DataLoader(
            dataset,
            batch_sampler=batches + [[0]] * (most - scored),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        loader.scored = scored
        return loader

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stage's own metrics: counts summed over batches and processes, then turned into figures."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            gather_in_methods(model)
        model.eval()
        totals: dict[str, torch.Tensor] = {}
        samples = 0
        for number, batch in enumerate(dataloader):
            batch.pop("skipped", 0)
            size = len(batch["files"])
            batch = self._prepare_inputs(batch if size else self.stand_in(dataloader.dataset))
            batch.pop("files")
            with self.compute_loss_context_manager():
                scores = self.stage.score(model, batch)
            counts = number < dataloader.scored and size > 0
            samples += size if counts else 0
            for name, value in scores.items():
                value = torch.as_tensor(value, device=self.args.device).double()
                totals[name] = totals.get(name, 0) + (value if counts else torch.zeros_like(value))
        totals = {name: self.accelerator.reduce(value.float(), reduction="sum") for name, value in totals.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.stage.summarise(totals).items()}
        samples = int(self.accelerator.reduce(torch.tensor(samples, device=self.args.device), reduction="sum"))
        model.train()
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)


def sft_trainer_class() -> type:
    """TRL's SFTTrainer for a stage. Its own loss reads the base model alone and would leave the masks out."""
    from trl import SFTTrainer

    class StageSFTTrainer(StageTrainer, SFTTrainer):
        """TRL's SFTTrainer for one `Stage`. It takes rows of `datasets` only: samples are drawn from them after."""

        def __init__(self, *args: Any, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any) -> None:
            rows = None if eval_dataset is None else eval_dataset.rows
            model = kwargs["model"]
            dtypes = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
            super().__init__(*args, train_dataset=train_dataset.rows, eval_dataset=rows, **kwargs)
            for name, weight in model.named_parameters():
                if name in dtypes:  # TRL rounds what trains beside a quantised model to bfloat16
                    weight.data = weight.data.to(dtypes[name])
            self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    return StageSFTTrainer


def count_terms(batch: dict[str, Any], num_queries: int) -> dict[str, float]:
    """The numbers of things that the losses of one micro-batch are averages over."""
    counts = dict.fromkeys(("tokens", "masks", "images", "asked", "codes"), 0.0)
    masks = batch.get("mask_labels") or []
    if "labels" in batch:
        counts["tokens"] = float((batch["labels"][:, 1:] != -100).sum())
        counts["masks"] = float(sum(len(entry) for entry in masks if entry is not None))
        counts["codes"] = float(sum(int((classes >= 0).sum()) for classes in batch.get("code_class_labels", [])))
    else:
        matched = batch.get("matched_images")
        rows = range(len(masks)) if matched is None else matched.tolist()
        counts["masks"] = float(sum(min(len(masks[row]), num_queries) for row in rows))
        counts["images"] = float(len(rows))
        counts["asked"] = float(sum(len(asked) for asked in batch.get("asked_classes", masks)))
    return counts


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def cut_steps(path: Path, step: int) -> None:
    """Drop the steps after `step` from a log that a killed run wrote further than its last checkpoint."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError):  # the line that the kill cut short
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    write_text(path, "".join(lines))
