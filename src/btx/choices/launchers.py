"""The ways to start jobs: name → one line for `btx ls launchers`. What starts them is in `btx.running.launchers`."""

LAUNCHERS: dict[str, str] = {
    "local": "processes of this machine",
    "ray": "jobs of a Ray cluster, or of a Ray of this machine alone",
    "slurm": "jobs of a Slurm cluster, submitted all at once (sbatch); they go on when `btx run` ends",
}
