"""Train a language model: ``python train.py [experiment=…] [key=value …]``.

Without arguments this is the quickstart: a small Mamba-2 on the novels the package carries.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config import EvalConfig
from eval.tasks import run_task
from mamba2lm.cli import script
from mamba2lm.config import TrainConfig
from mamba2lm.data.loader import Corpus, prepare_data
from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.distributed import World
from mamba2lm.host import tune_host
from mamba2lm.inference.engine import Engine
from mamba2lm.inference.loading import LoadedRun, load_run
from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.jobs import EXIT_REQUEUE
from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.models.checkpoint import TOKENIZER, read_config
from mamba2lm.models.lora import add_lora
from mamba2lm.schema import ConfigError, from_mapping
from mamba2lm.training.checkpoint import SaveError
from mamba2lm.training.dry_run import report_dry_run
from mamba2lm.training.faults import (
    EXIT_DIVERGED,
    EXIT_STOPPED,
    EXIT_UNSAVED,
    NonFiniteError,
)
from mamba2lm.training.metrics import Tracking, WandbTracker
from mamba2lm.training.parallelize import start_accelerator
from mamba2lm.training.run_folder import RunFolder, check_same_run, open_run
from mamba2lm.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("mamba2lm.train")


@script("train", TrainConfig)
def main(config: TrainConfig) -> int:
    """Read the configuration, build, run."""
    config.validate()
    tune_host(config.training.threads)
    accelerator = start_accelerator()
    if not accelerator.is_main_process:
        logging.getLogger("mamba2lm").setLevel(logging.WARNING)
    world = World(accelerator.process_index, accelerator.num_processes, accelerator.device)
    # Objects to degrees and sizes that do not divide.
    degrees = config.parallel.degrees(world.size)
    config.training.share_of(degrees.data_replicate * degrees.data_shard)
    if config.lora.rank and degrees.tensor > 1:
        raise ConfigError(
            "lora.rank",
            config.lora.rank,
            "trains whole matrices, which parallel.tensor divides; use 0, or the other degrees.",
        )
    run = world.decide(lambda: open_run(config.run_dir, config.resume))
    begin = first_weights(config, run)
    corpus = prepare(config, run, accelerator, begin)
    config.model.fit_vocabulary(corpus.vocab_size)
    if config.dry_run:
        report_dry_run(
            config.resolved(), config.model, corpus, config.training, config.optimizer,
            config.parallel, accelerator,
        )  # fmt: skip
        return 0
    if run.resume_from is not None:
        check_same_run(run, config.resolved())
    with contextlib.ExitStack() as stack:
        # On the main process alone, which writes; if it may not, nobody goes on.
        world.decide(lambda: stack.enter_context(run.locked()))
        return train(config, run, corpus, begin, accelerator)


def train(
    config: TrainConfig,
    run: RunFolder,
    corpus: Corpus,
    begin: LoadedRun | None,
    accelerator: Accelerator,
) -> int:
    """Build the model and train it; return the exit code."""
    if begin is None:
        model = LanguageModel(config.model)
        model.init_weights(config.training.seed)
    else:
        model = begin.model.train()
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.training.seed)
    log.info(
        "%s on %s: %s parameters, pattern %s",
        config.run_dir, accelerator.device, f"{model.parameter_count():,}", config.model.letters,
    )  # fmt: skip
    trainer = Trainer(
        model,
        corpus,
        config=config.training,
        optimizer=config.optimizer,
        schedule=config.schedule,
        run=run,
        accelerator=accelerator,
        parallel=config.parallel,
        num_workers=config.data.num_workers,
        tracker=lambda: (
            WandbTracker(run.path, config.resolved()) if config.tracking is Tracking.wandb else None
        ),
        write_sample=sampler(config, corpus),
        evaluate_more=evaluator(config, corpus),
    )
    # Written once nothing is left to object to, and not over a run that is complete.
    if accelerator.is_main_process and not trainer.complete:
        run.write_config(config.resolved())
        if corpus.tokenizer is not None:
            corpus.tokenizer.save(run.tokenizer)
    accelerator.wait_for_everyone()
    try:
        complete = trainer.fit()
    except NonFiniteError as error:
        log.error("%s", error)
        return EXIT_DIVERGED
    except SaveError as error:
        log.error("%s; make room and start the same command again", error)
        return EXIT_UNSAVED
    if complete and accelerator.is_main_process:
        say_what_next(config, run)
    accelerator.end_training()
    if complete:
        return 0
    return EXIT_REQUEUE if trainer.stop_signal == signal.SIGUSR1 else EXIT_STOPPED


def first_weights(config: TrainConfig, run: RunFolder) -> LoadedRun | None:
    """Return what ``init_from`` names, and make ``config.model`` the model that is trained.

    A run that goes on has weights of its own, whatever has become of what it began with.
    """
    if config.init_from is None:
        return None
    if run.resume_from is not None:
        model = read_config(run.resume_from, "resume")["model"]
        config.model = from_mapping(ModelConfig, model, "model")
        return None
    begin = load_run(config.init_from, key="init_from", device="cpu", dtype="float32", share=False)
    config.model = begin.model.config
    log.info("model.* is that of %s, whatever else is given", config.init_from)
    return begin


def prepare(
    config: TrainConfig, run: RunFolder, accelerator: Accelerator, begin: LoadedRun | None
) -> Corpus:
    """Make or find the tokens; a run that goes on keeps its tokenizer, as do first weights."""
    tokenizer = None if begin is None else begin.tokenizer
    if run.resume_from is not None and (run.resume_from / TOKENIZER).is_dir():
        tokenizer = Tokenizer.load(run.resume_from / TOKENIZER)
    return prepare_data(
        config.data,
        seed=config.training.seed,
        tokenizer=tokenizer,
        streams=config.training.batch_size if config.training.carry_state else None,
        is_main=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )


def sampler(config: TrainConfig, corpus: Corpus) -> Callable[[LanguageModel], str] | None:
    """Return what writes a sample of text with a model, or None where data are not text."""
    if corpus.tokenizer is None or not config.training.sample_tokens:
        return None
    tokenizer = corpus.tokenizer

    def write(model: LanguageModel) -> str:
        prompt = config.training.sample_prompt
        [completion] = Engine(model, tokenizer).generate(
            [prompt],
            SamplingConfig(temperature=0.7),
            max_new_tokens=config.training.sample_tokens,
            seeds=config.training.seed,
        )
        return prompt + completion.text

    return write


def evaluator(
    config: TrainConfig, corpus: Corpus
) -> Callable[[LanguageModel], dict[str, float]] | None:
    """Return what runs the tasks of ``evaluation`` on a model, or None where there are none."""
    if not config.evaluation:
        return None
    given = {**config.evaluation, "checkpoint": config.run_dir}
    tasks = from_mapping(EvalConfig, given, "evaluation")
    tasks.validate()

    def evaluate(model: LanguageModel) -> dict[str, float]:
        run = LoadedRun(model, corpus.tokenizer, Path(config.run_dir), config.resolved())
        return {
            f"{task}: {name}": value
            for task in tasks.tasks
            for name, value in run_task(task, tasks, run).headline.items()
        }

    return evaluate


def say_what_next(config: TrainConfig, run: RunFolder) -> None:
    """End a run by naming what it left and the commands that use it."""
    if run.samples.exists():
        last = run.samples.read_text(encoding="utf-8").rsplit("=== step", 1)[-1]
        log.info("a sample, from step%s", last.rstrip())
    log.info(
        "kept in %s: checkpoints/, metrics.jsonl, loss.png, samples.txt, config.yaml\n"
        "next:  python generate.py checkpoint=%s prompt=\"It was\" max_new_tokens=200\n"
        "       python -m eval checkpoint=%s tasks=[perplexity]",
        config.run_dir, config.run_dir, config.run_dir,
    )  # fmt: skip


if __name__ == "__main__":
    main()
