"""Runs a sweep on Google Kubernetes Engine: one JobSet per point, or the same through `xpk`.

Every host of a TPU slice, or every GPU node, runs one pod. If one fails or is preempted, all are
recreated and resume from the last checkpoint. A mistake of the user (exit code 2) is final.
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

PORT = 8476  # of the coordinator; any port that is free in the pods
# Accelerator -> the most chips of a slice with one host; hosts of larger slices have four each.
ONE_HOST_CHIPS = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 8,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 8,
}
KEEP_FINISHED = 3600  # seconds until Kubernetes deletes a finished JobSet, which frees its name


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of --backend=gke and --backend=xpk."""
    group = parser.add_argument_group("--backend=gke, --backend=xpk")

    def add(name: str, metavar: str, text: str, default: str | int = "") -> None:
        group.add_argument(name, type=type(default), default=default, metavar=metavar, help=text)

    add("--image", "NAME", "container image, built by launch/container.sh")
    add("--accelerator", "TYPE", "gke: tpu-v5-lite-podslice, nvidia-l4, ...")
    add("--topology", "4x4", "gke: topology of the TPU slice of one point")
    add("--gpus", "N", "gke: GPUs per pod, with --nodes pods per point (default: 0, a TPU)", 0)
    group.add_argument("--spot", action="store_true", help="gke: use spot capacity")
    add("--namespace", "NAME", "gke: Kubernetes namespace (default: %(default)s)", "default")
    add("--claim", "CLAIM:/PATH", "gke: a PersistentVolumeClaim for --workdir, mounted at /PATH")
    add("--max_restarts", "N", "after failures or preemptions (default: %(default)s)", 20)
    add(
        "--manifests",
        "DIR",
        "gke: local directory for the YAML (default: %(default)s)",
        "manifests",
    )
    add("--cluster", "NAME", "xpk: name of the cluster")
    add("--zone", "ZONE", "xpk: zone of the cluster")
    add("--tpu_type", "TYPE", "xpk: v5litepod-16, ...")
    add("--device_type", "TYPE", "xpk: h100-80gb-8, ... instead of --tpu_type")


def run(sweep: points.Sweep, options: argparse.Namespace) -> int:
    """Applies a manifest per point that is not complete; returns the exit code of `launch.sweep`.

    Raises:
        UserError: a flag is missing or wrong, or kubectl is not installed.
    """
    check_paths(sweep, options)
    manifests = {name: jobset(sweep, name, options) for name in sweep.points}
    names = _missing(sweep, options)
    print(points.headline(sweep, names, "one JobSet per point"), flush=True)
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
    """Creates a workload per point that is not complete; returns the exit code of `launch.sweep`.

    Raises:
        UserError: a flag is missing or wrong, or xpk is not installed.
    """
    check_paths(sweep, options)
    commands = {name: xpk(sweep, name, options) for name in sweep.points}
    names = _missing(sweep, options)
    print(points.headline(sweep, names, "one xpk workload per point"), flush=True)
    if options.dry_run:
        for name in names:
            print(shlex.join(commands[name]))
        return 0
    _require("xpk")
    _record(sweep, options)
    return _run_each({name: commands[name] for name in names})


def job_name(sweep: points.Sweep, name: str) -> str:
    """Returns a point's job name, valid for Kubernetes and xpk (under 40 characters)."""
    digest = hashlib.sha256(f"{sweep.workdir}/{name}".encode()).hexdigest()[:6]
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return f"{readable}-{digest}"


def hosts(accelerator: str, topology: str) -> tuple[int, int]:
    """Returns (pods, chips per pod) of a TPU slice.

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
        raise UserError(
            f"--topology={topology}: {chips} chips are not whole hosts of 4, of which larger "
            "slices consist"
        )
    return chips // 4, 4


def jobset(sweep: points.Sweep, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a point's manifest.

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
            # By name, because asking Kubernetes would need a role for the pods.
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
                # Each JobSet has a slice to itself: pods of two points never share one.
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
    """Returns the command that creates a point's workload.

    Raises:
        UserError: a flag is missing, or does not apply to xpk.
    """
    for flag in ("image", "cluster", "zone"):
        if not getattr(options, flag):
            raise UserError(f"--backend=xpk needs --{flag}")
    if bool(options.tpu_type) == bool(options.device_type):
        raise UserError("--backend=xpk needs one of --tpu_type and --device_type, and not both")
    if options.claim:
        raise UserError(
            "--claim is for --backend=gke: with xpk, attach storage to the cluster by `xpk storage`"
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
    """Checks that pods find the config and keep the files that they write.

    Raises:
        UserError: they would not.
    """
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
        f"--workdir={sweep.workdir} would be lost with the pods: expected gs://BUCKET/... or a "
        "path below /PATH of --claim=CLAIM:/PATH"
    )


def _claim(value: str) -> tuple[str, str]:
    claim, _, path = value.partition(":")
    if not claim or not path.startswith("/"):
        raise UserError(f"--claim={value}: expected CLAIM:/PATH, such as filestore:/runs")
    return claim, path


def _missing(sweep: points.Sweep, options: argparse.Namespace) -> list[str]:
    """Returns the points that are not complete; all where the pods' files cannot be read from here.

    Starting a complete point again is harmless: it notices and ends.
    """
    if options.claim:
        return list(sweep.points)
    try:
        return points.missing(sweep)
    except Exception as error:
        # Which one depends on the file system behind the address: credentials, network, package.
        if not options.dry_run:
            raise UserError(
                f"{sweep.workdir} cannot be read: {error}. Are its name, the network and this "
                "machine's credentials right?"
            ) from error
        print(f"# {sweep.workdir} cannot be read, so all points are shown: {error}")
        return list(sweep.points)


def _record(sweep: points.Sweep, options: argparse.Namespace) -> None:
    if not options.claim:
        points.record(sweep)


def _require(program: str) -> None:
    if not shutil.which(program):
        raise UserError(f"{program} was not found: install it, or add its directory to PATH")


def _run_each(commands: dict[str, list[str]]) -> int:
    """Runs each command; one that fails is named and does not stop the others."""
    failed = [name for name, command in commands.items() if subprocess.run(command).returncode]
    for name in failed:
        print(f"  not started: {name}")
    return 1 if failed else 0
