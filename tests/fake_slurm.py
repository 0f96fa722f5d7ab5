"""Slurm's commands for tests: `sbatch` really runs the tasks of a job array, as processes of this machine.

Which command it is, its name says; jobs lie as JSON files in the folder $FAKE_SLURM. With $FAKE_SLURM_HOLD set, jobs
are never started.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "srun")


def install(folder: Path) -> dict[str, str]:
    """Commands in `folder`/bin; returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    for command in COMMANDS:
        file = folder / "bin" / command
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {command} "$@"\n')
        file.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def jobs_of(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("job-*.json"))]


def save(job: dict) -> None:
    file = Path(os.environ["FAKE_SLURM"]) / f"job-{job['id']:04d}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(job))
    temporary.replace(file)


def sbatch(arguments: list[str]) -> None:
    folder = Path(os.environ["FAKE_SLURM"])
    script = Path(arguments[-1]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, flags=re.MULTILINE))
    options |= dict(argument.removeprefix("--").split("=", 1) for argument in arguments[:-1])
    job = {"id": len(jobs_of(folder)) + 1, "name": options["job-name"], "state": "PENDING", "codes": {}}
    job |= {"options": options, "script": script}
    save(job)
    if "FAKE_SLURM_HOLD" not in os.environ:
        command = [sys.executable, "-S", __file__, "run", str(job["id"])]
        nowhere = subprocess.DEVNULL
        subprocess.Popen(command, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    print(f"Submitted batch job {job['id']}")


def run(arguments: list[str]) -> None:
    """What slurmctld does with one job: wait for those it depends on, then run its array."""
    folder = Path(os.environ["FAKE_SLURM"])
    job = next(job for job in jobs_of(folder) if job["id"] == int(arguments[0]))
    for kind, number in re.findall(r"(\w+):(\d+)", job["options"].get("dependency", "")):
        while (other := next(job for job in jobs_of(folder) if job["id"] == int(number)))["state"] != "DONE":
            time.sleep(0.05)
        if kind == "afterok" and any(other["codes"].values()):
            return  # for ever in the queue: DependencyNeverSatisfied
    first, last, limit = re.fullmatch(r"(\d+)-(\d+)(?:%(\d+))?", job["options"]["array"]).groups()
    waiting, running = list(range(int(first), int(last) + 1)), {}
    script = folder / f"script-{job['id']}.sh"
    script.write_text(job["script"])
    exported = dict(item.split("=") for item in job["options"]["export"].split(",")[1:])
    while waiting or running:
        while waiting and len(running) < int(limit or 1000):
            index = waiting.pop(0)
            log = job["options"]["output"].replace("%A", str(job["id"])).replace("%a", str(index))
            here = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(job["id"]), "SLURM_NODELIST": "localhost"}
            with open(log, "w") as file:
                command = ["bash", str(script)]
                running[index] = subprocess.Popen(
                    command, env={**os.environ, **exported, **here}, stdout=file, stderr=subprocess.STDOUT
                )
        time.sleep(0.05)
        for index in [index for index, process in running.items() if process.poll() is not None]:
            job["codes"][index] = running.pop(index).returncode
    job["state"] = "DONE"
    save(job)


def squeue(arguments: list[str]) -> None:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    if os.environ["FAKE_SLURM"] == "down":
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for job in jobs_of(Path(os.environ["FAKE_SLURM"])):
        if job["state"] != "DONE" and job["name"] in options["name"].split(","):
            print(job["id"])


def scontrol(arguments: list[str]) -> None:
    print(arguments[-1])


def srun(arguments: list[str]) -> None:
    while arguments[0].startswith("-"):
        arguments = arguments[2:] if arguments[0] == "-n" else arguments[1:]
    os.execvp(arguments[0], arguments)


if __name__ == "__main__":
    {"sbatch": sbatch, "run": run, "squeue": squeue, "scontrol": scontrol, "srun": srun}[sys.argv[1]](sys.argv[2:])
