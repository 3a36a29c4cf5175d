"""Create a RayJob for one firing of a Kubernetes CronJob, and wait for its end.

Creates the RayJob of `--template` under the name `--name` and renames the output folder in its entrypoint
(`run=TEMPLATE'S NAME` becomes `run=NAME`). If a RayJob of that name exists, waits for it: a restarted pod neither
starts a second run nor loses the first. Runs inside a pod whose service account may create and get rayjobs.
"""

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.cli import main_guard
from pipeline.errors import ConfigError, RunError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_ENDED = ("Complete", "Failed", "ValidationFailed")
_TIMEOUT_S = 30.0
_LONGEST_WAIT_S = 300.0


@dataclass(frozen=True)
class RayJobs:
    """The RayJobs of the pod's namespace, through the API server; reads the token at every call, because it changes."""

    server: str
    account: Path = _ACCOUNT

    def create(self, job: dict[str, Any]) -> bool:
        """Create a RayJob; False if one of its name exists. Raises `ConfigError` if the server refuses it."""
        try:
            self._ask("", json.dumps(job).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def status(self, name: str) -> dict[str, Any]:
        """The status of a RayJob; empty until the operator has set one."""
        status: dict[str, Any] = self._ask(f"/{name}").get("status", {})
        return status

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        namespace = (self.account / "namespace").read_text().strip()
        request = urllib.request.Request(
            f"{self.server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}",
            data=body,
            headers={
                "Authorization": f"Bearer {(self.account / 'token').read_text().strip()}",
                "Content-Type": "application/json",
            },
        )
        authority = self.account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (400, 401, 403, 404, 422):  # a retry would fail again
                detail = " ".join(error.read().decode(errors="replace").split())[:500]
                raise ConfigError(
                    f"the API server refuses RayJob {path or 'creation'} ({error.code}): {detail}"
                ) from None
            raise


def main() -> int:
    """Create and wait; return 0 if the run succeeded, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, metavar="FILE", help="the RayJob, as YAML")
    parser.add_argument("--name", required=True, help="of the RayJob and its output folder; unique to the firing")
    parser.add_argument("--owner-uid", help="uid of the Job NAME; the RayJob is deleted with it")
    parser.add_argument("--poll-s", type=float, default=15.0, help="seconds between checks of its status")
    arguments = parser.parse_args()
    job = named(yaml.safe_load(arguments.template.read_text()), arguments.name, arguments.owner_uid)
    jobs = RayJobs(_server())
    _print("created" if _again(lambda: jobs.create(job)) else "found", name=arguments.name)
    while (status := _again(lambda: jobs.status(arguments.name))).get("jobDeploymentStatus") not in _ENDED:
        time.sleep(arguments.poll_s)
    said = {key: status[key] for key in ("jobDeploymentStatus", "jobStatus", "reason", "message") if status.get(key)}
    _print("ended", name=arguments.name, **said)
    return 0 if status.get("jobStatus") == "SUCCEEDED" else 1


def named(job: dict[str, Any], name: str, owner_uid: str | None) -> dict[str, Any]:
    """The template's RayJob with another name and an output folder of that name."""
    old, entrypoint = f"run={job['metadata']['name']}", job["spec"]["entrypoint"]
    if old not in entrypoint:
        raise ConfigError(f"expected an output folder {old} in the template's entrypoint, got {entrypoint!r}")
    metadata = {**job["metadata"], "name": name}
    if owner_uid:
        metadata["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}]
    return {**job, "metadata": metadata, "spec": {**job["spec"], "entrypoint": entrypoint.replace(old, f"run={name}")}}


def _server() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
    if host is None:
        raise RunError("expected to run in a pod (KUBERNETES_SERVICE_HOST is not set)")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _again(ask: Any) -> Any:
    """The result of `ask`, retried while the API server is unreachable."""
    wait_s = 1.0
    while True:
        try:
            return ask()
        except OSError as error:
            _print("failed", error=" ".join(str(error).split()), again_in_s=wait_s)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _print(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main_guard(main)
