"""The job as a Ray Data graph: manifest → model actors → Parquet, and the write that resumes."""

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
    """Units still to be done → rows of `actor`; lazy. One row per unit from end to end, which resuming rests on."""
    filesystem, manifest = work.arrow_path(work.open_units)
    actors = job.ray.actors
    units = ray.data.read_parquet(manifest, filesystem=filesystem)
    # A small manifest is one block, which one actor would take whole; of parts of blocks actors would run short.
    units = units.repartition(target_num_rows_per_block=actors.batch_units, strict=True)
    # A batch is a block. Ray Data bundles blocks up to a batch_size: one that is not full would come after another in
    # the same task, once that one has its rows. `map_batches` itself insists on a size where GPUs are asked for.
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
    """Run the graph into the run's data folder; a file counts once its checkpoint is committed.

    Raises `RunError` with the cause in a line when Ray cannot go on; what is committed stays.
    """
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context.enable_progress_bars = False  # the job has its own display
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would tell how to enable them
    context.use_datasource_v2 = False  # it starts 32 processes to read the footer of one file
    context.max_consecutive_actor_init_deaths = 2
    context.execution_no_progress_timeout_s = -1  # `waits` ends a job that is stuck, and knows the reason
    context.execution_options.preserve_order = False
    context.custom_execution_callback_classes = [functools.partial(Drain, attempts)]
    if job.ray.actors.num_cpus > 0:  # decode tasks are not Ray Data's: keep it from taking their CPUs
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
    """The last line of what Ray tells, after the traceback: there stands the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
