"""RayJobs of a CronJob: created once and waited for, through an API server that may be unreachable."""

import contextlib
import http.server
import json
import sys
import threading

import pytest

from jobs import rayjob
from jobs.cli import main_guard
from jobs.rayjob import RayJobs, named
from pipeline.errors import ConfigError

TEMPLATE = {
    "metadata": {"name": "lightkv", "labels": {"a": "b"}},
    "spec": {
        "entrypoint": "python -m jobs.caption --set source.known=s3://b/out --set sink.uri=s3://b/out/run=lightkv"
    },
}


class Server:
    """A fake API server for RayJobs: returns the configured refusals, and the job statuses in `statuses` in turn."""

    def __init__(self):
        self.jobs, self.statuses, self.tokens, self.refusals = {}, [], [], []

    def answer(self, method, path, body, token):
        self.tokens.append(token)
        if self.refusals:
            return self.refusals.pop(0), {"message": "no"}
        base = "/apis/ray.io/v1/namespaces/team/rayjobs"
        if method == "POST":
            assert path == base
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"reason": "AlreadyExists"}
            self.jobs[name] = body
            return 201, body
        if (name := path.removeprefix(f"{base}/")) not in self.jobs:
            return 404, {"reason": "NotFound"}
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return 200, self.jobs[name] | ({"status": status} if status else {})


@pytest.fixture
def server():
    with _running(Server()) as running:
        yield running


@contextlib.contextmanager
def _running(api):
    class Handler(http.server.BaseHTTPRequestHandler):
        def _do(self):
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            code, answer = api.answer(self.command, self.path, body, self.headers["Authorization"])
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST = _do  # noqa: N815 - the base class's names

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    api.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield api
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def account(tmp_path):
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "namespace").write_text("team")
    (folder / "token").write_text("secret-1\n")
    return folder


@pytest.fixture
def run(server, account, tmp_path, monkeypatch, capsys):
    """Run the job with the template: exit code and events."""
    template = tmp_path / "job.yaml"
    template.write_text(json.dumps(TEMPLATE))
    monkeypatch.setattr(rayjob, "_server", lambda: server.url)
    monkeypatch.setattr(rayjob, "RayJobs", lambda url: RayJobs(url, account))
    slept = []
    monkeypatch.setattr(rayjob.time, "sleep", slept.append)

    def call(*arguments):
        command = ["jobs.rayjob", "--template", str(template), "--name", "nightly-1", "--poll-s", "7", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main_guard(rayjob.main)
        error = capsys.readouterr().err
        return end.value.code, [json.loads(line) for line in error.splitlines() if line.startswith("{")], error

    call.slept = slept
    return call


DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def test_a_rayjob_is_created_under_its_name_with_a_folder_of_its_own(server, run):
    server.statuses = [None, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running"}, DONE]
    code, events, _ = run("--owner-uid", "u-1")
    assert code == 0
    assert [event["event"] for event in events] == ["created", "ended"]
    job = server.jobs["nightly-1"]
    assert job["metadata"]["labels"] == {"a": "b"}
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-1", "uid": "u-1"}
    ]
    assert job["spec"]["entrypoint"].endswith("--set source.known=s3://b/out --set sink.uri=s3://b/out/run=nightly-1")
    assert run.slept == [7.0] * 3
    assert set(server.tokens) == {"Bearer secret-1"}


def test_a_pod_that_is_started_again_waits_for_the_same_rayjob(server, run):
    server.statuses = [DONE]
    run()
    first = dict(server.jobs)
    code, events, _ = run()
    assert (code, [event["event"] for event in events]) == (0, ["found", "ended"])
    assert server.jobs == first


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit 2"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        {"jobDeploymentStatus": "ValidationFailed"},
    ],
)
def test_a_run_without_success_is_exit_code_1_and_said(server, run, status):
    server.statuses = [{"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, status]
    code, events, _ = run()
    assert code == 1
    assert events[-1] == {"event": "ended", "name": "nightly-1", **status}


def test_an_api_server_that_is_away_is_asked_again(server, run):
    server.statuses = [DONE]
    server.refusals = [503, 500, 503]
    code, events, _ = run()
    assert code == 0
    assert [event.get("again_in_s") for event in events] == [1.0, 2.0, 4.0, None, None]
    assert run.slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("code", [401, 403, 422])
def test_what_the_api_server_refuses_for_good_is_one_line_and_exit_code_2(server, run, code):
    server.refusals = [code]
    end, _, error = run()
    assert end == 2
    assert error.startswith(f"error: the API server refuses RayJob creation ({code})")
    assert error.count("\n") == 1


def test_a_rayjob_that_somebody_deleted_is_not_waited_for(server, run):
    server.statuses = [{"jobDeploymentStatus": "Running"}]
    original = server.answer

    def answer(method, path, body, token):
        result = original(method, path, body, token)
        if method == "GET":
            server.jobs.clear()
        return result

    server.answer = answer
    assert run()[0] == 2


def test_the_token_is_read_anew_for_every_request(server, account):
    jobs = RayJobs(server.url, account)
    jobs.create(named(TEMPLATE, "a", None))
    (account / "token").write_text("secret-2")
    jobs.create(named(TEMPLATE, "b", None))
    assert server.tokens == ["Bearer secret-1", "Bearer secret-2"]


def test_a_template_without_a_folder_of_its_name_is_refused():
    with pytest.raises(ConfigError, match="expected an output folder run=other"):
        named({**TEMPLATE, "metadata": {"name": "other"}}, "x", None)


def test_outside_of_a_pod_it_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (tmp_path / "job.yaml").write_text(json.dumps(TEMPLATE))
    monkeypatch.setattr(sys, "argv", ["jobs.rayjob", "--template", str(tmp_path / "job.yaml"), "--name", "n"])
    with pytest.raises(rayjob.RunError, match="KUBERNETES_SERVICE_HOST"):
        rayjob.main()
