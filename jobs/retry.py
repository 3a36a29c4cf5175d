"""Repeat the units of a run that have error rows, and replace those rows.

Takes the configuration of the run; `decode`, `ray` and `storage` may be changed. If the job is killed, the same command
continues it.
"""

from jobs.cli import load, main_guard, parser


def main() -> int:
    """Repeat the error rows; return 0 when each has been tried again."""
    arguments = parser(
        __doc__ or "",
        epilog="""example:
  python -m jobs.retry --config configs/caption.yaml --set decode.backend=pyav --set decode.timeout_s=1200

Exit code 0: every error row has been tried again. 2: the configuration or the output is refused.""",
    ).parse_args()
    job = load(arguments)
    from pipeline.job import retry  # importing torch and ray takes seconds, which help and refusals must not

    retry(job)
    return 0


if __name__ == "__main__":
    main_guard(main)
