"""Errors that a job shows to its user. A message names the expected and the actual value, and what to do.

PipelineError
├── ConfigError      the configuration cannot be run (before anything starts)
├── SourceError      the source cannot be listed or its manifest cannot be read
├── RunError         the run directory is locked, or written by another configuration
└── UnitError        one unit failed: its row gets the error, the job continues

StoppedError is not a failure: the job was asked to end before every unit had a row.
"""


class PipelineError(Exception):
    """Base class of the errors that are shown to the user."""


class ConfigError(PipelineError):
    """The configuration cannot be run; the message names the key."""


class SourceError(PipelineError):
    """The source cannot be listed, or its manifest cannot be read."""


class RunError(PipelineError):
    """The run directory is locked, or holds a run of another configuration."""


class StoppedError(Exception):
    """The job ended on request; the same command resumes it."""


class UnitError(PipelineError):
    """One unit failed: `stage` (plan | fetch | decode | prepare | generate) and `error_type` go into its row."""

    def __init__(self, stage: str, error_type: str, message: str) -> None:
        super().__init__(stage, error_type, message)  # all three: pickle rebuilds the error from them
        self.stage = stage
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.stage}: {self.error_type}: {self.message}"


class SkippedError(UnitError):
    """A unit outside a configured limit; its row has status `skipped`."""
