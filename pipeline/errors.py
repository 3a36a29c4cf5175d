"""Errors a job shows to its user. Every message says what was expected, what came, and what to do.

PipelineError
├── ConfigError      the configuration cannot be run (before anything starts)
├── SourceError      the source cannot be listed or its manifest cannot be read
├── RunError         the run directory refuses: locked, or written by another configuration
└── UnitError        one unit failed; becomes that unit's error row, never the job's end

StoppedError is no failure: the job was asked to end before all was done.
"""


class PipelineError(Exception):
    """Base of all errors of this package that are meant for the user."""


class ConfigError(PipelineError):
    """A configuration that cannot be run; names the key."""


class SourceError(PipelineError):
    """A source that cannot be listed, or a manifest that cannot be read."""


class RunError(PipelineError):
    """A run directory that is locked, or holds a run of another configuration."""


class StoppedError(Exception):
    """The job ended on request; the same command goes on."""


class UnitError(PipelineError):
    """One unit failed: `stage` (plan | fetch | decode | prepare | generate) and `error_type` go into its row."""

    def __init__(self, stage: str, error_type: str, message: str) -> None:
        super().__init__(stage, error_type, message)  # all three, so that the error pickles between processes
        self.stage = stage
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.stage}: {self.error_type}: {self.message}"


class SkippedError(UnitError):
    """A unit that a configured limit leaves out; its row has status `skipped`."""
