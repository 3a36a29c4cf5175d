"""Do the error rows of a run again, and put the new rows in their places.

Takes the configuration of the run, where `decode`, `ray` and `storage` may be changed. Killed and started again, it
goes on.
"""

from jobs.cli import load, main_guard, parser


def main() -> int:
    """Repeat the error rows; 0 when every one has been tried again."""
    arguments = parser(
        __doc__ or "",
        epilog="""example:
  python -m jobs.retry --config configs/caption.yaml --set decode.backend=pyav --set decode.timeout_s=1200

Exit code 0: every error row has been tried again. 2: the configuration or the output refuses.""",
    ).parse_args()
    job = load(arguments)
    from pipeline.job import retry  # torch and ray take seconds to import: help and refusals must not

    retry(job)
    return 0


if __name__ == "__main__":
    main_guard(main)
