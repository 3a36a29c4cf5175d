"""Builds and runs the job as a Ray Data graph: manifest → model actors → Parquet, with a write that can resume."""

import functools
import logging

import ray
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError

from pipeline.cluster.actor import BLOCKS_AT_ONCE, CaptionActor
from pipeline.cluster.connect import gpus_of_actor
from pipeline.cluster.ray_hooks import CleanOnly, Drain
from pipeline.config import JobConfig
from pipeline.errors import RunError
from pipeline.run.directory import Work
from pipeline.run.samples import Sampling


def build(
    job: JobConfig, work: Work, attempts: ActorHandle, actor: type[CaptionActor] = CaptionActor
) -> ray.data.Dataset:
    """Lazy graph from open units to rows of `actor`. Resuming relies on exactly one row per unit at every step."""
    filesystem, manifest = work.arrow_path(work.open_units)
    actors = job.ray.actors
    units = ray.data.read_parquet(manifest, filesystem=filesystem)
    # Cut the manifest into blocks of exactly batch_units: a small manifest is one block, which one actor would get.
    units = units.repartition(target_num_rows_per_block=actors.batch_units, strict=True)
    # batch_size=None makes every block one batch. With a size, Ray Data would bundle a short block behind another, and
    # run it only after that one has its rows. The public map_batches insists on a size when GPUs are asked for.
    return units.map_batches_internal(
        actor,
        fn_constructor_args=(job, work.run_id, attempts, Sampling.of(job, work)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=actors.min,
            max_size=actors.max,
            max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_gpus=gpus_of_actor(job),
        num_cpus=actors.num_cpus,
    )


def execute(job: JobConfig, work: Work, attempts: ActorHandle, actor: type[CaptionActor] = CaptionActor) -> None:
    """Run the graph and write rows into the run's data folder; a file counts once its checkpoint is committed.

    Raises `RunError` with the cause in one line if Ray fails; committed rows stay.
    """
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context.enable_progress_bars = False  # the job has its own display
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # else it explains how to enable them
    context.use_datasource_v2 = False  # it starts 32 processes to read the footer of one file
    context.max_consecutive_actor_init_deaths = 2
    context.execution_no_progress_timeout_s = -1  # `waits` ends a stalled job, and knows the reason
    context.execution_options.preserve_order = False
    context.custom_execution_callback_classes = [functools.partial(Drain, attempts)]
    if job.ray.actors.num_cpus > 0:  # keep the CPUs of a decode task free: Ray Data does not know these tasks
        context.execution_options.exclude_resources = ExecutionResources(cpu=job.decode.num_cpus)
    checkpoint_fs, checkpoint_path = work.arrow_path(work.checkpoint)
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=checkpoint_path,
        override_filesystem=checkpoint_fs,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=CleanOnly,
    )
    filesystem, path = work.arrow_path(work.data)
    try:
        build(job, work, attempts, actor).write_parquet(
            path,
            filesystem=filesystem,
            mode="append",
            min_rows_per_file=job.sink.rows_per_file,
            compression=job.sink.compression,
        )
    except (RayError, OSError) as error:
        raise RunError(f"the job cannot go on: {_cause(error)}; rows in {work.data} stay, fix it and repeat") from error
    finally:
        context.checkpoint_config = None
        context.custom_execution_callback_classes = []


def _cause(error: Exception) -> str:
    """The last line of Ray's message, after the traceback: it names the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
