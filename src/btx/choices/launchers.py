"""The ways to start jobs: name → one line for `btx ls launchers`. What starts them is in `btx.running.launchers`."""

LAUNCHERS: dict[str, str] = {
    "local": "processes of this machine",
    "slurm": "jobs of a Slurm cluster, submitted all at once (sbatch); they go on when `btx run` ends",
}
