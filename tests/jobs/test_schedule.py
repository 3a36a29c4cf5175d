"""Schedules: firings are on time and unique, with one run at a time, also after failures."""

import datetime
import json
import logging
import shlex
import signal
import sys
import zoneinfo

import pytest

from jobs.cli import load, main_guard, parser
from jobs.schedule import __main__ as cli
from jobs.schedule.firings import Firing, Firings
from jobs.schedule.scheduler import LOG, Clock, Schedule, Scheduler
from jobs.schedule.submission import Submission, command
from pipeline.config import Storage, load_config
from pipeline.errors import ConfigError, RunError
from pipeline.run.directory import RunDirectory

UTC = zoneinfo.ZoneInfo("UTC")
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def at(text):
    return datetime.datetime.fromisoformat(f"2026-{text}").replace(tzinfo=datetime.UTC)


class FakeClock:
    """A clock that a test advances; stops the scheduler at `until`."""

    def __init__(self, now, until=None):
        self.time, self.until = now, until
        self.slept = []

    @property
    def stopping(self):
        return self.until is not None and self.time >= self.until

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += datetime.timedelta(seconds=max(seconds, 0.001))


class FakeJobs:
    """A fake cluster: jobs take `seconds` and end with their (status, exit code) in `results`, else they succeed."""

    def __init__(self, clock, seconds=60.0, results=()):
        self.clock, self.seconds, self.results = clock, seconds, list(results)
        self.submitted, self.runs, self.ends = {}, {}, {}
        self.overlaps = 0
        self.away_until = None

    def submit(self, id, job):
        self._reach()
        if id in self.submitted:
            return False
        self.overlaps += any(end > self.clock.now() for end, *_ in self.ends.values())
        self.submitted[id], self.runs[id] = command(job), job.sink.uri
        status, code = self.results.pop(0) if self.results else ("SUCCEEDED", 0)
        self.ends[id] = (self.clock.now() + datetime.timedelta(seconds=self.seconds), status, code)
        return True

    def find(self, id):
        self._reach()
        if id not in self.submitted:
            return None
        end, status, code = self.ends[id]
        over = self.clock.now() >= end
        return Submission(status if over else "RUNNING", code if over else None, "", self.runs[id])

    def log_tail(self, id, lines):
        return f"the last words of {id}"

    def _reach(self):
        if self.away_until is not None and self.clock.now() < self.away_until:
            raise ConnectionError("Failed to connect to Ray at address: http://head:8265.")


@pytest.fixture
def base(tmp_path):
    return tmp_path / "captions"


def scheduler(base, clock, jobs, cron="0 2 * * *", timezone=UTC, overrides=(), **options):
    def configuration():
        return load_config(None, ["source.uri=/videos", f"sink.uri={base}", *overrides])

    return Scheduler(Schedule("nightly", cron, timezone, **options), configuration, jobs, clock)


def run(base, start, until, jobs=None, seconds=60.0, results=(), **options):
    clock = FakeClock(start, until)
    jobs = jobs or FakeJobs(clock, seconds, results)
    jobs.clock = clock
    scheduler(base, clock, jobs, **options).run()
    return jobs


@pytest.fixture
def logged(caplog):
    """Every logged event with its fields."""
    caplog.set_level(logging.INFO, LOG.name)
    return lambda: [(record.getMessage(), record.fields) for record in caplog.records if record.name == LOG.name]


def fires(cron, start, count, timezone=UTC):
    times = Schedule("s", cron, timezone).after(at(start))
    return [f"{next(times):%m-%dT%H:%M}" for _ in range(count)]


def test_expressions_mean_what_they_mean_to_cron():
    assert fires("0 2 * * *", "11-23T02:00", 2) == ["11-24T02:00", "11-25T02:00"]
    assert fires("*/20 9-10 * * *", "11-23T09:50", 3) == ["11-23T10:00", "11-23T10:20", "11-23T10:40"]
    assert fires("0 0 * * 0", "11-23T00:00", 1) == fires("0 0 * * 7", "11-23T00:00", 1) == ["11-29T00:00"]  # Sunday
    assert fires("0 0 1 * 1", "11-23T12:00", 2) == ["11-30T00:00", "12-01T00:00"]  # either day field


def test_times_are_those_of_the_timezone_also_when_clocks_change():
    assert fires("30 1 * * *", "10-23T12:00", 3, BERLIN) == ["10-23T23:30", "10-24T23:30", "10-26T00:30"]
    assert fires("30 2 * * *", "03-27T12:00", 3, BERLIN) == ["03-28T01:30", "03-29T01:00", "03-30T00:30"]
    assert len(set(fires("30 2 * * *", "10-23T12:00", 5, BERLIN))) == 5  # the repeated hour fires once


@pytest.mark.parametrize("cron", ["0 2 * *", "61 * * * *", "nightly", "0 0 30 2 *"])
def test_wrong_expressions_are_refused(cron):
    with pytest.raises(ConfigError, match="--cron: expected five fields"):
        Schedule("s", cron, UTC)


def test_a_firing_submits_the_caption_job_with_a_folder_of_its_own(base):
    jobs = run(base, at("11-23T01:30"), at("11-23T03:10"), cron="0 * * * *")
    assert list(jobs.submitted) == ["nightly-2026-11-23T02-00-00Z", "nightly-2026-11-23T03-00-00Z"]
    words = shlex.split(jobs.submitted["nightly-2026-11-23T02-00-00Z"])
    assert words[:3] == ["python", "-m", "jobs.caption"]
    job = load(parser("").parse_args(words[3:]))
    assert job.source.uri == "/videos"
    assert job.sink.uri == jobs.runs["nightly-2026-11-23T02-00-00Z"] == f"{base}/run=2026-11-23T02-00-00Z"
    assert job.source.known == str(base)


def test_the_command_holds_the_whole_configuration(tmp_path):
    text = "line one\nline 'two' = \"three\" – ü $HOME #!"
    overrides = ["source.uri=/v", "sink.uri=o", f"prompts=[{{id: a, text: {json.dumps(text)}}}]", "model.revision='1'"]
    job = load_config(None, [*overrides, "clips.length_s=60", "source.extensions=[mp4]", "source.known_attempts=3"])
    words = shlex.split(command(job))
    assert load(parser("").parse_args(words[3:])) == job


def test_the_configuration_is_read_anew_for_every_firing(base):
    clock = FakeClock(at("11-23T01:30"), at("11-23T03:10"))
    jobs = FakeJobs(clock)

    def configuration():
        fps = 5 if clock.now() > at("11-23T02:30") else 2
        return load_config(None, ["source.uri=/videos", f"sink.uri={base}", f"frames.fps={fps}"])

    Scheduler(Schedule("nightly", "0 * * * *", UTC), configuration, jobs, clock).run()
    first, second = jobs.submitted.values()
    assert "--set=frames.fps=2.0" in first
    assert "--set=frames.fps=5.0" in second


def test_nothing_before_the_first_start_was_missed(base):
    assert not run(base, at("11-23T02:05"), at("11-23T23:59")).submitted


def test_missed_firings_become_one_run(base, logged):
    jobs = run(base, at("11-20T01:00"), at("11-20T03:00"))
    run(base, at("11-23T14:00"), at("11-23T15:00"), jobs)
    assert list(jobs.submitted) == ["nightly-2026-11-20T02-00-00Z", "nightly-2026-11-23T02-00-00Z"]
    assert ("missed", {"schedule": "nightly", "count": 3, "policy": "catch-up"}) in logged()


def test_missed_firings_are_left_out_where_asked(base, logged):
    jobs = run(base, at("11-20T01:00"), at("11-20T03:00"))
    run(base, at("11-23T22:00"), at("11-24T02:10"), jobs, missed="skip")
    assert list(jobs.submitted) == ["nightly-2026-11-20T02-00-00Z", "nightly-2026-11-24T02-00-00Z"]
    assert [fields["count"] for name, fields in logged() if name == "missed"] == [3]


@pytest.mark.parametrize(("missed", "expected"), [("catch-up", ["02", "05", "08"]), ("skip", ["02", "06"])])
def test_one_run_at_a_time(base, missed, expected):
    """Runs of 3.4 hours on an hourly schedule: firings missed meanwhile become one run, or none."""
    jobs = run(base, at("11-23T01:30"), at("11-23T09:30"), seconds=3.4 * 3600, cron="0 * * * *", missed=missed)
    assert [id.split("T")[1][:2] for id in jobs.submitted] == expected
    assert jobs.overlaps == 0


def test_of_two_schedulers_one_fires(base):
    clock = FakeClock(at("11-23T01:59:50"))
    jobs = FakeJobs(clock)
    one, two = scheduler(base, clock, jobs), scheduler(base, clock, jobs)
    for _ in range(20):
        one.step()
        two.step()
        clock.sleep(10)
    assert list(jobs.submitted) == ["nightly-2026-11-23T02-00-00Z"]
    assert len(list((base / "_schedule" / "nightly").iterdir())) == 1


def test_two_schedulers_at_the_same_moment_cannot_both_claim(base, monkeypatch, logged):
    """Both see that nothing is running before either claims."""
    clock = FakeClock(at("11-23T01:59"))
    jobs = FakeJobs(clock)
    one, two = scheduler(base, clock, jobs), scheduler(base, clock, jobs)
    clock.time = at("11-23T02:00")
    original, inside = Firings.claim, []

    def claim(self, firing):
        if not inside:
            inside.append(True)
            two.step()
        return original(self, firing)

    monkeypatch.setattr(Firings, "claim", claim)
    one.step()
    assert len(jobs.submitted) == 1
    assert any(name == "not fired" and "another scheduler" in fields["reason"] for name, fields in logged())


def test_a_claim_that_its_scheduler_never_submitted_is_taken_up(base):
    clock = FakeClock(at("11-23T02:00:10"))
    folder = f"{base}/_schedule/nightly"
    Firings(folder, Storage()).claim(Firing(1, at("11-23T02:00"), "elsewhere:1:1", at("11-23T02:00:05")))
    jobs = FakeJobs(clock)
    scheduler(base, clock, jobs).step()
    assert not jobs.submitted  # it may be about to submit
    clock.time = at("11-23T02:10")
    scheduler(base, clock, jobs).step()
    assert list(jobs.submitted) == ["nightly-2026-11-23T02-00-00Z"]


def test_a_submission_whose_answer_was_lost_is_not_made_twice(base, monkeypatch, logged):
    clock = FakeClock(at("11-23T01:59:50"), at("11-23T02:30"))
    jobs = FakeJobs(clock)
    original, lost = jobs.submit, []

    def submit(*arguments):
        answer = original(*arguments)
        if not lost:
            lost.append(True)
            raise ConnectionError("connection reset")
        return answer

    monkeypatch.setattr(jobs, "submit", submit)
    scheduler(base, clock, jobs).run()
    assert len(jobs.submitted) == 1
    assert [name for name, _ in logged()] == ["started", "failed", "was submitted", "ended", "stopped"]


def test_a_head_out_of_reach_is_tried_again_ever_more_slowly_and_never_ends_the_scheduler(base, logged):
    clock = FakeClock(at("11-23T01:59"), at("11-23T05:00"))
    jobs = FakeJobs(clock)
    jobs.away_until = at("11-23T04:00")
    scheduler(base, clock, jobs).run()
    waits = [fields["again_in_s"] for name, fields in logged() if name == "failed"]
    assert waits[:7] == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0]
    assert set(waits[7:]) == {300.0}
    assert list(jobs.submitted) == ["nightly-2026-11-23T02-00-00Z"]
    assert Firings(f"{base}/_schedule/nightly", Storage()).last().state == "ended"


def test_a_failed_run_is_taken_up_again_a_few_times(base, logged):
    results = [("FAILED", 1), ("FAILED", None), ("SUCCEEDED", 0), ("FAILED", 2), ("FAILED", 2)]
    jobs = run(base, at("11-23T01:50"), at("11-23T03:30"), results=results, attempts=3, cron="0 2-3 * * *")
    assert [id.removeprefix("nightly-2026-11-") for id in jobs.submitted] == [
        "23T02-00-00Z",
        "23T02-00-00Z-2",
        "23T02-00-00Z-3",
        "23T03-00-00Z",
        "23T03-00-00Z-2",
        "23T03-00-00Z-3",
    ]
    assert len({jobs.runs[f"nightly-2026-11-23T02-00-00Z{again}"] for again in ("", "-2", "-3")}) == 1
    tails = [fields["tail"] for name, fields in logged() if name == "output"]
    assert tails[0] == "the last words of nightly-2026-11-23T02-00-00Z"
    assert len(tails) == 4


def test_a_run_that_somebody_stopped_is_not_taken_up(base):
    jobs = run(base, at("11-23T01:00"), at("11-23T03:00"), results=[("STOPPED", None)])
    assert len(jobs.submitted) == 1


def test_a_run_lost_with_its_cluster_is_taken_up_on_the_next(base):
    clock = FakeClock(at("11-23T01:59"), at("11-23T02:01"))
    jobs = FakeJobs(clock, seconds=3600)
    scheduler(base, clock, jobs).run()
    new = run(base, at("11-23T02:05"), at("11-23T03:00"))
    assert list(new.submitted) == ["nightly-2026-11-23T02-00-00Z-2"]


def test_a_run_that_gives_signs_of_life_is_running_whatever_the_cluster_says(base):
    clock = FakeClock(at("11-23T01:59"), at("11-23T02:01"))
    jobs = FakeJobs(clock, seconds=3600)
    scheduler(base, clock, jobs).run()
    job = load_config(None, ["source.uri=/videos", f"sink.uri={base}/run=2026-11-23T02-00-00Z"])
    with RunDirectory(job).lock():
        assert not run(base, at("11-23T02:05"), at("11-23T03:00")).submitted
    assert run(base, at("11-23T03:05"), at("11-23T03:10")).submitted


def test_once_fires_now_waits_and_gives_the_exit_code_of_the_job(base):
    clock = FakeClock(at("11-23T14:07:09"))
    jobs = FakeJobs(clock, 300, [("FAILED", 2), ("FAILED", 7)])
    assert scheduler(base, clock, jobs, attempts=2).once(clock.now()) == 7
    assert list(jobs.submitted) == ["nightly-2026-11-23T14-07-09Z", "nightly-2026-11-23T14-07-09Z-2"]
    assert scheduler(base, clock, jobs).once(clock.now()) == 0


def test_once_for_a_time_is_run_once(base):
    clock = FakeClock(at("11-23T14:07"))
    jobs = FakeJobs(clock, 300, [("STOPPED", None)])
    moment = at("11-23T14:00")
    assert scheduler(base, clock, jobs).once(moment) == 1
    assert scheduler(base, clock, jobs).once(moment) == 1
    assert len(jobs.submitted) == 1
    with pytest.raises(RunError, match="expected a later time"):
        scheduler(base, clock, jobs).once(at("11-23T13:00"))


def test_once_beside_a_run_is_refused(base):
    clock = FakeClock(at("11-23T01:59"), at("11-23T02:01"))
    jobs = FakeJobs(clock, seconds=3600)
    scheduler(base, clock, jobs).run()
    clock.until = None
    with pytest.raises(RunError, match="one run at a time"):
        scheduler(base, clock, jobs).once(clock.now())


def test_once_stopped_before_the_end_leaves_the_job_alone(base):
    clock = FakeClock(at("11-23T14:00"), at("11-23T14:01"))
    jobs = FakeJobs(clock, 3600)
    assert scheduler(base, clock, jobs).once(clock.now()) == 143
    assert jobs.find("nightly-2026-11-23T14-00-00Z").status == "RUNNING"


def test_earlier_answers_elsewhere_are_refused_rather_than_forgotten(base):
    clock = FakeClock(at("11-23T14:00"))
    with pytest.raises(ConfigError, match=r"source\.known: a schedule sets it"):
        scheduler(base, clock, FakeJobs(clock), overrides=["source.known=s3://elsewhere"])


def test_the_clock_ends_a_sleep_when_asked_to():
    clock = Clock()
    previous = signal.signal(signal.SIGALRM, clock.stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        clock.sleep(3600)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert clock.stopping


def test_log_lines_are_json_objects(base, capsys, monkeypatch):
    monkeypatch.setattr(cli, "Clock", lambda: FakeClock(at("11-23T14:00"), at("11-23T14:01")))
    monkeypatch.setattr(FakeClock, "stop", lambda *_: None, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = ["--name", "n", "--set", "source.uri=/v", "--set", f"sink.uri={base}"]
    monkeypatch.setattr(sys, "argv", ["jobs.schedule", *arguments, "--cron", "*/5 * * * *"])
    assert cli.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["started", "stopped"]
    assert (lines[0]["schedule"], lines[0]["cron"], lines[0]["timezone"]) == ("n", "*/5 * * * *", "UTC")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cron", "every day"], "--cron: expected five fields"),
        (["--timezone", "Middle/Earth"], "--timezone: expected a name"),
        (["--name", "My Schedule"], "--name: expected lower case"),
        (["--attempts", "0"], "--attempts: expected at least 1, got 0"),
        (["--once", "yesterday"], "--once: expected a time"),
        (["--set", "frames.fsp=1"], "did you mean fps?"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(base, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["jobs.schedule", "--set", "source.uri=/v", "--set", f"sink.uri={base}", *arguments]
    )
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main_guard(cli.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
