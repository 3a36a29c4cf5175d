"""Caption or question a folder, bucket or manifest of videos and image sets.

Plans the units, runs them through model actors on Ray and writes Parquet. If the job is killed, the same command
continues it.
"""

from jobs.cli import load, main_guard, parser


def main() -> int:
    """Run the job; return 0 when every unit has its row, error rows included."""
    arguments = parser(
        __doc__ or "",
        epilog="""examples:
  python -m jobs.caption --config configs/caption.yaml --set source.uri=videos --set sink.uri=captions
  python -m jobs.caption --config configs/caption.yaml --set source.uri=s3://bucket/videos --set sink.uri=s3://bucket/out
  ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.caption --config configs/caption.yaml

Exit code 0: every unit has its row (error rows included). 2: the configuration, source or output is refused.""",
    ).parse_args()
    job = load(arguments)
    from pipeline.job import caption  # importing torch and ray takes seconds, which help and refusals must not

    caption(job)
    return 0


if __name__ == "__main__":
    main_guard(main)
