"""A sweep on Google Kubernetes Engine: one JobSet a point, or the same through `xpk`.

Every host of a TPU slice, or every GPU node, runs one pod; if one fails or is preempted, all are
made anew and go on from the last checkpoint. A mistake of the user (exit code 2) is final.
"""

import argparse
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess
from typing import Any

import yaml

from launch.sweep import points
from save_jax.errors import UserError

PORT = 8476  # of the coordinator; any that is free in the pods
# Accelerator -> the most chips of a slice that has one host only (of more, each has four).
ONE_HOST_CHIPS = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 8,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 8,
}
KEEP_FINISHED = 3600  # seconds; then the point may be started again


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gke, xpk")
    group.add_argument("--image", default="", help="container image: see launch/container.sh")
    group.add_argument("--accelerator", default="", help="tpu-v5-lite-podslice, nvidia-l4, ...")
    group.add_argument("--topology", default="", help="of the TPU slice of one point: 4x4")
    group.add_argument("--gpus", type=int, default=0, help="of a pod, for GPUs; --nodes pods")
    group.add_argument("--spot", action="store_true", help="spot capacity")
    group.add_argument("--namespace", default="default")
    group.add_argument(
        "--claim", default="", help="CLAIM:/PATH mounts a PersistentVolumeClaim, for --workdir"
    )
    group.add_argument("--max_restarts", type=int, default=20, help="after failures, preemptions")
    group.add_argument("--manifests", default="manifests", help="local directory for the YAML")
    group.add_argument("--cluster", default="", help="xpk: name of the cluster")
    group.add_argument("--zone", default="", help="xpk: its zone")
    group.add_argument("--tpu_type", default="", help="xpk: v5litepod-16, ...")
    group.add_argument("--device_type", default="", help="xpk: h100-80gb-8, ... instead of a TPU")


def run(sweep: points.Sweep, options: argparse.Namespace) -> int:
    """Applies a manifest for what is missing; returns the exit code of `launch.sweep`.

    Raises:
        UserError: a flag is missing or wrong, or kubectl is absent.
    """
    check_paths(sweep, options)
    manifests = {name: jobset(sweep, name, options) for name in sweep.points}
    names = _missing(sweep, options)
    print(points.headline(sweep, names, "one JobSet each"), flush=True)
    folder = pathlib.Path(options.manifests)
    files = {name: folder / f"{job_name(sweep, name)}.yaml" for name in names}
    commands = {name: ["kubectl", "apply", f"--filename={files[name]}"] for name in names}
    if options.dry_run:
        for name in names:
            print(f"---\n# {name}: {shlex.join(commands[name])}")
            print(yaml.safe_dump(manifests[name], sort_keys=False, width=1000), end="")
        return 0
    _require("kubectl")
    _record(sweep, options)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        files[name].write_text(yaml.safe_dump(manifests[name], sort_keys=False, width=1000))
    return _run_each(commands)


def run_xpk(sweep: points.Sweep, options: argparse.Namespace) -> int:
    """Creates an xpk workload for what is missing; returns the exit code of `launch.sweep`.

    Raises:
        UserError: a flag is missing or wrong, or xpk is absent.
    """
    check_paths(sweep, options)
    commands = {name: xpk(sweep, name, options) for name in sweep.points}
    names = _missing(sweep, options)
    print(points.headline(sweep, names, "one xpk workload each"), flush=True)
    if options.dry_run:
        for name in names:
            print(shlex.join(commands[name]))
        return 0
    _require("xpk")
    _record(sweep, options)
    return _run_each({name: commands[name] for name in names})


def job_name(sweep: points.Sweep, name: str) -> str:
    """A name that Kubernetes and xpk (under 40 signs) take; the same for the same point."""
    digest = hashlib.sha256(f"{sweep.workdir}/{name}".encode()).hexdigest()[:6]
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return f"{readable}-{digest}"


def hosts(accelerator: str, topology: str) -> tuple[int, int]:
    """(pods, chips a pod) of a TPU slice.

    Raises:
        UserError: the accelerator or the topology is unknown.
    """
    if accelerator not in ONE_HOST_CHIPS:
        raise UserError(
            f"--accelerator={accelerator}: expected one of {', '.join(ONE_HOST_CHIPS)}, or a GPU "
            "such as nvidia-l4 together with --gpus"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise UserError(f"--topology={topology}: expected chips along each axis, such as 4x4")
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    if chips <= ONE_HOST_CHIPS[accelerator]:
        return 1, chips
    if chips % 4:
        raise UserError(f"--topology={topology}: {chips} chips are not whole hosts of 4")
    return chips // 4, 4


def jobset(sweep: points.Sweep, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The manifest of a point.

    Raises:
        UserError: a flag is missing or wrong.
    """
    if not options.image:
        raise UserError("--backend=gke needs --image: build one with launch/container.sh")
    job = job_name(sweep, name)
    arguments = sweep.arguments(name)
    environment: list[dict[str, Any]] = []
    selector = {"cloud.google.com/gke-spot": "true"} if options.spot else {}
    if options.gpus:
        pods, resource, each = options.nodes, "nvidia.com/gpu", options.gpus
        if options.accelerator:
            selector["cloud.google.com/gke-accelerator"] = options.accelerator
        if pods > 1:
            # By name rather than by asking Kubernetes, which pods may do with a role only.
            index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            environment.append(
                {"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}}
            )
            arguments += [
                f"--coordinator={job}-pod-0-0.{job}:{PORT}",
                f"--num_processes={pods}",
                "--process_id=$(PROCESS_ID)",
            ]
    else:
        pods, each = hosts(options.accelerator, options.topology)
        resource = "google.com/tpu"
        selector["cloud.google.com/gke-tpu-accelerator"] = options.accelerator
        selector["cloud.google.com/gke-tpu-topology"] = options.topology
        if pods > 1:
            arguments.append("--distributed")
    container: dict[str, Any] = {
        "name": "save-jax",
        "image": options.image,
        "command": ["python", "-m", "save_jax.main"],
        "args": arguments,
        "resources": {"limits": {resource: each}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # for a step and a checkpoint after SIGTERM
        "nodeSelector": selector,
        "containers": [container],
    }
    if environment:
        container["env"] = environment
    if resource == "nvidia.com/gpu":
        pod["tolerations"] = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.claim:
        claim, path = _claim(options.claim)
        container["volumeMounts"] = [{"name": "runs", "mountPath": path}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job,
            "namespace": options.namespace,
            "annotations": {
                "save-jax/point": name,
                # One slice, one JobSet: pods of two points never share a slice.
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
            }
            if resource == "google.com/tpu"
            else {"save-jax/point": name},
        },
        "spec": {
            "ttlSecondsAfterFinished": KEEP_FINISHED,
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": "pod",
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": pods,
                            "completions": pods,
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "save-jax",
                                            "operator": "In",
                                            "values": [2],
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def xpk(sweep: points.Sweep, name: str, options: argparse.Namespace) -> list[str]:
    """The command that creates a point's workload.

    Raises:
        UserError: a flag is missing.
    """
    for flag in ("image", "cluster", "zone"):
        if not getattr(options, flag):
            raise UserError(f"--backend=xpk needs --{flag}")
    if bool(options.tpu_type) == bool(options.device_type):
        raise UserError("--backend=xpk needs one of --tpu_type and --device_type")
    if options.claim:
        raise UserError(
            "--claim is for --backend=gke: attach storage to the cluster by `xpk storage`"
        )
    kind = (
        f"--tpu-type={options.tpu_type}"
        if options.tpu_type
        else f"--device-type={options.device_type}"
    )
    run_it = ["python", "-m", "save_jax.main", *sweep.arguments(name), "--distributed"]
    return [
        "xpk",
        "workload",
        "create",
        f"--cluster={options.cluster}",
        f"--zone={options.zone}",
        f"--workload={job_name(sweep, name)}",
        kind,
        f"--docker-image={options.image}",
        f"--max-restarts={options.max_restarts}",
        f"--command={shlex.join(run_it)}",
    ]


def check_paths(sweep: points.Sweep, options: argparse.Namespace) -> None:
    """Raises UserError where a pod would not find the config, or lose what it wrote."""
    if pathlib.PurePath(sweep.config).is_absolute():
        raise UserError(
            f"--config={sweep.config}: pods look for it below the image's working directory; give "
            "a path relative to the checkout, such as configs/msrvtt.py"
        )
    mounted = _claim(options.claim)[1] if options.claim else None
    if "://" in sweep.workdir or (
        mounted and pathlib.PurePosixPath(sweep.workdir).is_relative_to(mounted)
    ):
        return
    raise UserError(
        f"--workdir={sweep.workdir} is not where pods keep files: expected gs://BUCKET/... or a "
        "path below the mount of --claim=CLAIM:/PATH"
    )


def _claim(value: str) -> tuple[str, str]:
    claim, _, path = value.partition(":")
    if not claim or not path.startswith("/"):
        raise UserError(f"--claim={value}: expected CLAIM:/PATH")
    return claim, path


def _missing(sweep: points.Sweep, options: argparse.Namespace) -> list[str]:
    """What is not complete; all of it where the pods' files cannot be seen from here.

    Starting a complete point again is harmless: it sees that it is, and ends.
    """
    if options.claim:
        return list(sweep.points)
    try:
        return points.missing(sweep)
    except Exception as error:
        # Which one depends on the file system behind the address: credentials, network, package.
        if not options.dry_run:
            raise UserError(f"cannot look into {sweep.workdir}: {error}") from error
        print(f"# cannot look into {sweep.workdir}, so all points are shown: {error}")
        return list(sweep.points)


def _record(sweep: points.Sweep, options: argparse.Namespace) -> None:
    if not options.claim:
        points.record(sweep)


def _require(program: str) -> None:
    if not shutil.which(program):
        raise UserError(f"{program} is not installed, or not on PATH")


def _run_each(commands: dict[str, list[str]]) -> int:
    """Runs each; one that fails is named and does not stop the others."""
    failed = [name for name, command in commands.items() if subprocess.run(command).returncode]
    for name in failed:
        print(f"  not started: {name}")
    return 1 if failed else 0
