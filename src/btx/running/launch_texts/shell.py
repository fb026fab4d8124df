"""The run as a shell script of one machine: jobs side by side as far as `launch.jobs` allows."""

from __future__ import annotations

from pathlib import Path

from btx.errors import UserError
from btx.recipe.schema import Recipe
from btx.run_folder.folder import RunFolder
from btx.run_folder.threads import jobs_at_once
from btx.running.launch_texts.jobs import Job, script

SCRIPT = r"""#!/usr/bin/env bash
# Every job of a run on this machine; written by `btx launch --for shell`. Needs bash 4.4 or later.
# Run it again and it continues: what is finished is skipped, what was begun goes on from its last checkpoint.
# Ctrl-C and SIGTERM have every job save and end. Exit codes: as btx has them, of the first job that failed.
set -euo pipefail

run=@RUN@
btx=(@BTX@)
slots=@SLOTS@    # jobs at the same time (launch.jobs)
shared=@SHARED@   # 1: jobs share GPUs if there are fewer (launch.jobs); 0: a job that trains waits for free ones
retries=@RETRIES@  # times a job that failed is started again (launch.retries)
again_s=60   # seconds until a job whose needs somebody else is just making (exit code 75) is started again

cd -- @CWD@
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1

"${btx[@]}" begin /dev/stdin <<'RECIPE'
@RECIPE@
RECIPE
mkdir -p -- "$run/logs"

names=() exit_code=0 stopped=0
declare -A needs stages gpus_of state pid failures begin_at taken
job() {  # NAME NEEDS STAGES GPUS
  names+=("$1")
  needs[$1]=$2 stages[$1]=$3 gpus_of[$1]=$4 state[$1]=waiting failures[$1]=0 begin_at[$1]=0
}

@JOBS@

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null |
  grep -xE '[0-9]+' | paste -sd, || true)}"
gpus=("${gpus[@]// /}")
if [[ ${gpus[*]} =~ ^(-1)?$ ]]; then gpus=(); fi
if ((!shared && ${#gpus[@]} > slots)); then slots=${#gpus[@]}; fi

# NAME: takes the GPUs of a job that trains, those first that the fewest jobs have, and sets `visible` to them, empty if
# it sees all; fails while too few are free, and then for all that train until `waits` is 0 again: none overtakes.
find_gpus() {
  local name number load wanted=${gpus_of[$1]} loads=() own=()
  visible=
  if ((!${#gpus[@]} || !wanted)); then return 0; fi
  for number in "${!gpus[@]}"; do loads[number]=0; done
  for name in "${names[@]}"; do
    if [[ ${state[$name]} != running ]]; then continue; fi
    for number in ${taken[$name]-}; do loads[number]=$((loads[number] + 1)); done
  done
  for ((load = 0; load <= shared * ${#names[@]}; load++)); do
    for number in "${!gpus[@]}"; do
      if ((loads[number] == load && ${#own[@]} < wanted)); then own+=("$number"); fi
    done
  done
  if ((waits || ${#own[@]} < wanted && ${#own[@]} < ${#gpus[@]})); then
    waits=1
    return 1
  fi
  taken[$1]=${own[*]}
  if ((${#own[@]} == ${#gpus[@]})); then return 0; fi
  for number in "${own[@]}"; do visible+=${visible:+,}${gpus[number]}; done
}

log_of() { printf '%s' "$run/logs/${1//\//-}.log"; }

start() {
  local words
  read -ra words <<<"${stages[$1]}"
  echo "$1: started; its log is $(log_of "$1")"
  env ${visible:+"CUDA_VISIBLE_DEVICES=$visible"} "${btx[@]}" work "$run" "${words[@]}" \
    >>"$(log_of "$1")" 2>&1 </dev/null &
  pid[$1]=$! state[$1]=running
}

needs_are_done() {
  local needed
  for needed in ${needs[$1]}; do
    [[ ${state[$needed]} == "done" ]] || return 1
  done
}

ended() {  # NAME EXIT_CODE
  if (($2 == 0)); then
    state[$1]="done"
    echo "$1: done"
  elif ((stopped)); then
    state[$1]=stopped
  elif (($2 == 143)); then  # by `btx cancel` for example, as all others are
    state[$1]=stopped
    echo "$1: told to end, and has saved"
    stop 143
  elif (($2 == 75)); then
    state[$1]=waiting begin_at[$1]=$((SECONDS + again_s))
    echo "$1: not yet: $(tail -n 1 -- "$(log_of "$1")")"
  elif (($2 != 2 && failures[$1] < retries)); then
    state[$1]=waiting failures[$1]=$((failures[$1] + 1))
    echo "$1: failed (exit code $2), started again"
  else
    state[$1]=failed
    ((exit_code)) || exit_code=$2
    printf '%s: failed (exit code %s):\n%s\n' "$1" "$2" "$(tail -n 20 -- "$(log_of "$1")")" >&2
  fi
}

stop() {  # EXIT_CODE
  stopped=$1
  local name
  for name in "${names[@]}"; do
    if [[ ${state[$name]} == running ]]; then kill -TERM "${pid[$name]}" 2>/dev/null || true; fi
  done
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

while true; do
  alive=$(jobs -pr) under_way=0 later=0 waits=0
  alive=" ${alive//$'\n'/ } "
  for name in "${names[@]}"; do
    [[ ${state[$name]} == running ]] || continue
    if [[ $alive == *" ${pid[$name]} "* ]]; then
      under_way=$((under_way + 1))
    else
      code=0
      wait "${pid[$name]}" || code=$?
      ended "$name" "$code"
    fi
  done
  for name in "${names[@]}"; do
    if ((stopped)) || [[ ${state[$name]} != waiting ]] || ! needs_are_done "$name"; then continue; fi
    if ((under_way < slots && SECONDS >= begin_at[$name])) && find_gpus "$name"; then
      start "$name"
      under_way=$((under_way + 1))
    else
      later=1
    fi
  done
  ((under_way || later)) || break
  sleep 0.3 || true
done

if ((stopped)); then
  echo "stopped; run this script again and it continues" >&2
  exit "$stopped"
fi
if ((exit_code)); then
  for name in "${names[@]}"; do
    if [[ ${state[$name]} == waiting ]]; then echo "$name: not begun, what it needs failed" >&2; fi
  done
  exit "$exit_code"
fi
"""


def shell_text(recipe: Recipe, jobs: list[Job]) -> dict[str, str]:
    """The script, for the working directory and the Python of this process.

    Raises:
        UserError: the recipe spreads a model over several machines.
    """
    if wide := [job for job in jobs if job.nodes > 1]:
        raise UserError(
            f"--for shell: launch.nodes gives {wide[0].name} {wide[0].nodes} machines, and a shell script has one; "
            f"launch.nodes=1, or --for slurm"
        )
    names = max(len(job.name) for job in jobs)
    needs = max(len(" ".join(job.needs)) for job in jobs) + 2
    table = [
        f"job {job.name:{names}}  {_quoted(' '.join(job.needs)):{needs}}  {_quoted(' '.join(job.stages))} "
        f"{recipe.launch.gpus_of(job.stages) if recipe.device != 'cpu' else 0}"
        for job in jobs
    ]
    slots = jobs_at_once(RunFolder(Path(recipe.run_folder), recipe).graph)
    return {"run.sh": script(
        SCRIPT, recipe, SLOTS=str(slots), SHARED="1" if recipe.launch.jobs else "0",
        RETRIES=str(recipe.launch.retries), JOBS="\n".join(table),
    )}  # fmt: skip


def _quoted(words: str) -> str:
    return f"'{words}'"
