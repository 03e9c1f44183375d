"""Manifests for Kubernetes and commands of xpk."""

import json
import pathlib
import re
import shlex

import pytest
import yaml

from launch.sweep import __main__ as sweep
from launch.sweep import gke

SWEEP = ["--config=configs/demo_sweep.py", "--workdir=/runs/sweep", "--claim=filestore:/runs"]
TPU = ["--backend=gke", "--image=registry/save_jax:1", "--accelerator=tpu-v5-lite-podslice"]
GPU = ["--backend=gke", "--image=registry/save_jax:1", "--accelerator=nvidia-l4", "--gpus=4"]
XPK = ["--backend=xpk", "--image=registry/save_jax:1", "--cluster=c", "--zone=z"]


def manifests(capsys, *arguments: str) -> list[dict]:
    assert sweep.main([*SWEEP, *arguments, "--dry_run"]) == 0
    _, text = capsys.readouterr().out.split("---\n", 1)
    return list(yaml.safe_load_all(text))


def parts(manifest: dict) -> tuple[dict, dict, dict]:
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def test_a_tpu_slice_of_four_hosts(capsys):
    found = manifests(capsys, *TPU, "--topology=4x4", "--spot", "--config.steps=5")
    assert len(found) == 6 and len({m["metadata"]["name"] for m in found}) == 6
    job, pod, container = parts(found[1])
    assert found[1]["kind"] == "JobSet"
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["command"] == ["python", "-m", "save_jax.main"]
    assert container["args"] == [
        "--config=configs/demo_sweep.py",
        "--workdir=/runs/sweep/optimizer.new-0.0003__seed-1",
        "--config.steps=5",
        "--config.optimizer.new=0.0003",
        "--config.seed=1",
        "--distributed",
    ]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "filestore"}
    assert container["volumeMounts"][0]["mountPath"] == "/runs"
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]


def test_gpus_on_two_nodes_know_each_other(capsys):
    manifest = manifests(capsys, *GPU, "--nodes=2")[0]
    job, pod, container = parts(manifest)
    name = manifest["metadata"]["name"]
    assert job["completions"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    # JobSet's name of the first pod: JOBSET-JOB-JOBINDEX-PODINDEX.JOBSET.
    assert container["args"][-3:] == [
        f"--coordinator={name}-pod-0-0.{name}:{gke.PORT}",
        "--num_processes=2",
        "--process_id=$(PROCESS_ID)",
    ]
    assert [variable["name"] for variable in container["env"]] == ["PROCESS_ID"]
    _, _, alone = parts(manifests(capsys, *GPU)[0])
    assert "env" not in alone and not any("process" in argument for argument in alone["args"])


def test_names_are_what_kubernetes_takes(capsys):
    for manifest in manifests(capsys, *TPU, "--topology=2x2"):
        name = manifest["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) < 40 and "seed" in name


@pytest.mark.parametrize(
    ("accelerator", "topology", "expected"),
    [
        ("tpu-v5-lite-podslice", "1x1", (1, 1)),
        ("tpu-v5-lite-podslice", "2x4", (1, 8)),
        ("tpu-v5-lite-podslice", "16x16", (64, 4)),
        ("tpu-v6e-slice", "4x4", (4, 4)),
        ("tpu-v4-podslice", "2x2x1", (1, 4)),
        ("tpu-v5p-slice", "2x2x4", (4, 4)),
    ],
)
def test_hosts_of_a_slice(accelerator, topology, expected):
    assert gke.hosts(accelerator, topology) == expected


def test_xpk_and_buckets(capsys, monkeypatch):
    monkeypatch.setattr(gke.points, "missing", lambda sweep: list(sweep.points)[1:])
    arguments = [*XPK, SWEEP[0], "--workdir=gs://b/s", "--tpu_type=v5litepod-16", "--dry_run"]
    assert sweep.main(arguments) == 0
    headline, *commands = capsys.readouterr().out.splitlines()
    assert "1 complete; 5 to run" in headline and len(commands) == 5
    words = shlex.split(commands[0])
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--zone=z", "--tpu-type=v5litepod-16"} <= set(words)
    (command,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    assert shlex.split(command) == [
        "python",
        "-m",
        "save_jax.main",
        SWEEP[0],
        "--workdir=gs://b/s/optimizer.new-0.0003__seed-1",
        "--config.optimizer.new=0.0003",
        "--config.seed=1",
        "--distributed",
    ]


def test_manifests_are_written_and_applied(tmp_path, fake_program, capsys):
    fake_program("kubectl", f'echo "$@" >> {tmp_path}/calls; [[ "$2" != *seed-1* ]]')
    folder = tmp_path / "manifests"
    flags = [*SWEEP, *TPU, "--topology=4x4", f"--manifests={folder}"]
    assert sweep.main(flags) == 1  # this kubectl refuses every other one
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 6 and all(call.startswith("apply --filename=") for call in calls)
    for call in calls:
        (manifest,) = yaml.safe_load_all(pathlib.Path(call.split("=", 1)[1]).read_text())
        assert json.dumps(manifest).count("/runs/sweep/optimizer.new-") == 1
    assert capsys.readouterr().out.count("not started: ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SWEEP, "--backend=gke"], "needs --image"),
        ([*SWEEP, *TPU], "--topology=: expected chips"),
        ([*SWEEP, *TPU, "--topology=3x3"], "9 chips are not whole hosts"),
        ([*SWEEP, *GPU[:2]], "--accelerator=: expected one of tpu-v4-podslice"),
        ([*SWEEP[:2], *TPU, "--topology=2x2"], "--workdir=/runs/sweep would be lost with the pods"),
        ([SWEEP[0], "--workdir=/x", *TPU, "--claim=c:/runs"], "would be lost with the pods"),
        ([*SWEEP[:2], *TPU, "--claim=c"], "expected CLAIM:/PATH"),
        ([SWEEP[0], "--workdir=gs://b/s", *XPK], "needs one of --tpu_type and --device_type"),
        ([SWEEP[0], "--workdir=gs://b/s", "--backend=xpk"], "needs --image"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(capsys, arguments, message):
    assert sweep.main([*arguments, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
