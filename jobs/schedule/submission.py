"""Submit jobs to a Ray cluster, once per id, and find them, through the address of its head."""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import JobConfig, load_config
from pipeline.errors import ConfigError, RunError

_STOP_S = 15  # from the end of run.grace_s to the end of the job
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submission:
    """What a cluster says about a job."""

    status: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    exit_code: int | None  # of the driver, once it has ended by itself
    message: str
    run: str | None  # the job's output folder

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


class Cluster:
    """A cluster that may be unreachable: every call opens a new connection and raises what Ray's client raises."""

    def __init__(self, address: str, working_dir: str | None) -> None:
        """`working_dir`: code to send to the cluster; None if the cluster has it."""
        self._address = address
        self._code = {"working_dir": working_dir} if working_dir else {}

    def submit(self, id: str, job: JobConfig) -> bool:
        """Submit a captioning job; False if the cluster has a job of this id and output.

        Raises `RunError` if the id belongs to another output.
        """
        client, run = self._client(), job.sink.uri
        # Without this Ray kills a job three seconds after it was asked to stop.
        patience = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(job.run.grace_s) + _STOP_S)}
        try:
            client.submit_job(
                entrypoint=command(job),
                submission_id=id,
                runtime_env={**self._code, "env_vars": patience},
                metadata={"run": run},
            )
        except RuntimeError:  # refused, or a retry after a lost response: look at what the cluster has
            found = self._find(client, id)
            if found is None:
                raise
            if found.run != run:
                raise RunError(f"submission {id} belongs to {found.run}, not to {run}: choose another --name") from None
            return False
        return True

    def find(self, id: str) -> Submission | None:
        """The job of this id; None if the cluster does not know it."""
        return self._find(self._client(), id)

    def log_tail(self, id: str, lines: int) -> str:
        """The last lines of a job's output."""
        return "\n".join(self._client().get_job_logs(id).splitlines()[-lines:])

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient  # slow to import: help and refusals must not

        return JobSubmissionClient(self._address)

    def _find(self, client: Any, id: str) -> Submission | None:
        try:
            found = client.get_job_info(id)
        except RuntimeError:
            if any(job.submission_id == id for job in client.list_jobs()):
                raise
            return None
        run = (found.metadata or {}).get("run")
        return Submission(str(found.status.value), found.driver_exit_code, found.message or "", run)


def command(job: JobConfig) -> str:
    """The shell command that runs `job` on any machine: it carries the configuration in `--set` options."""
    values = job.model_dump(mode="json", exclude_defaults=True)
    overrides = [f"{key}={json.dumps(value)}" for key, value in _leaves(values)]
    if load_config(None, overrides) != job:
        raise ConfigError("the configuration cannot be written as --set options: write small numbers without exponents")
    return shlex.join(["python", "-m", "jobs.caption", *(f"--set={override}" for override in overrides)])


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
