"""The tables of quality say what the summary says."""

from jobs.measure.evaluate.readme import SHORT_LIST, fidelity, quality

LINE = {
        "suite": "all suites", "error": "", "questions": 200, "p_reference": None, "p_captions": None,
        "kept_interval": [None, None],
}  # fmt: skip
RUN = {
    "config": {"reference": "ours", "methods": {"ours": {}, "other": {}}},
    "devices": ["a cpu"], "torch": ["2.13"], "transformers": "5.23", "split": "test", "answers": 1000, "command": "run",
}  # fmt: skip


def line(method, retention, kept, captions, **more):
    interval = [kept - 0.01, kept + 0.01]
    return {**LINE, "method": method, "retention": retention, "kept": kept, "kept_interval": interval,
            "captions": captions, "accuracy": 0.9, **more}  # fmt: skip


SUMMARY = {
    "run": RUN,
    "figures": [
        line("plain", 1.0, 1.0, 0.8),
        line("ours", 0.5, 0.995, 0.76),
        line("ours", 0.1, 0.95, 0.4),
        line("other", 0.5, 0.9, 0.4, p_reference=0.01, p_captions=0.04),
        {**line("other", 0.1, 0.0, 0.0), "error": "not reachable", "kept": None},
        {**line("other", 0.5, 0.1, 0.1), "suite": "one suite"},
    ],
}


def test_a_line_per_method_and_a_column_per_retention():
    lines = fidelity(SUMMARY).splitlines()
    assert "| method | 50% kept | 10% kept |" in lines
    assert "| ours | 99.5 (98.5–100.5) / 95 | 95.0 (94.0–96.0) / 50 |" in lines
    assert "| other | 90.0 (89.0–91.0)* / 50* | – |" in lines


def test_first_page_shows_its_short_list_without_intervals():
    figures = [
        {**figure, "method": SHORT_LIST[0]} if figure["method"] == "ours" else figure for figure in SUMMARY["figures"]
    ]
    lines = quality({"run": RUN, "figures": figures}).splitlines()
    assert "| method | 50% kept | 10% kept |" in lines
    assert f"| {SHORT_LIST[0]} | 99.5 / 95 | 95.0 / 50 |" in lines
    assert not any("other" in line for line in lines)
