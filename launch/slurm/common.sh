# shellcheck shell=bash disable=SC2154
# Functions of the batch files of this folder, which set `root` (the repository) and source this file. They read
# `default_python`, the Python that runs where DAS_DS_PYTHON names none, and `how_to_install`, for where there is none.

# >>> repository: das-ds slurm init writes the Python of its environment here
default_python=$root/.venv/bin/python
how_to_install="run make setup in $root"
# The code that runs is next to the batch files, whatever is installed.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# <<< repository

readonly exit_user_error=2
readonly exit_stopped=75
readonly max_stalls=${DAS_DS_MAX_STALLS:-3}

# A rank that fails does not take its peers along at once: they report what they see and keep their exit code. This is
# for those that neither end nor notice; on a good end it is the time that rank 0 has for its last uploads.
readonly seconds_after_first_end=300
srun_options=(--kill-on-bad-exit=0 --wait="$seconds_after_first_end")

say() {
  echo "das_ds: $*"
}

# One attempt with one srun task per rank; ends the script. Arguments: those of das-ds train.
train_under_srun() {
  prepare_job "$@"
  run_ranks forward_signal srun "${srun_options[@]}" "${das_ds[@]}" train "$@"
  finish_job
}

# SLURM signals the ranks by itself, except where the signal was meant for the batch shell alone. It ends a job with
# TERM to both.
forward_signal() {
  [[ $1 == TERM ]] || kill -s "$1" "$ranks_pid" 2>/dev/null || true
}

# Find Python, the run folder and the address of rank 0, print where the job runs, and count the attempt.
# Sets das_ds, output_dir, job.
prepare_job() {
  find_python
  # An array's element by its own name: the last one has the id of the array.
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
  job=${job:-$SLURM_JOB_ID}
  local facts
  # A wrong config ends the job here, before any rank starts.
  facts=$("$python" -P -m das_ds.slurm.job_facts "$@") || exit
  output_dir=${facts%%$'\n'*}
  MASTER_ADDR=$(first_address)
  # Below 32768 ports are not handed out to clients; jobs of one day differ.
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # sbatch's --cpus-per-task reaches srun in this way only.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  say "$(date --iso-8601=seconds) job $job (id $SLURM_JOB_ID), restart ${SLURM_RESTART_COUNT:-0}"
  say "nodes $SLURM_JOB_NODELIST, tasks per node ${SLURM_TASKS_PER_NODE:-1}, rank 0 on $MASTER_ADDR port $MASTER_PORT"
  say "arguments $*; output_dir ${facts/$'\n'/; }"
  begin_attempt
}

# Of the first node, where SLURM puts rank 0: its name, or the address that SLURM itself uses where names do not resolve.
first_address() {
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if getent hosts "$name" >/dev/null; then
    echo "$name"
  else
    scontrol show node --oneliner "$name" | sed -E 's/.* NodeAddr=([^ ]+) .*/\1/'
  fi
}

# Sets python, and das_ds: the words that run the das-ds command. -P: nothing is imported from the current folder.
find_python() {
  python=${DAS_DS_PYTHON:-$default_python}
  das_ds=("$python" -P -u -m das_ds)
  if [[ ! -x $python ]]; then
    say "found no Python at $python; $how_to_install, or set DAS_DS_PYTHON to one that has das_ds" >&2
    exit "$exit_user_error"
  fi
  # Left by the shell that submitted the job they would win over SLURM's own variables.
  unset RANK WORLD_SIZE LOCAL_RANK
}

# Place of the newest checkpoint, without its number: one that was saved again at the same place is no progress.
newest_place() {
  local folders=("$output_dir"/checkpoints/[0-9]*_*/)
  local name=${folders[-1]%/}
  name=${name##*/}
  if [[ -d ${folders[-1]} ]]; then echo "${name#*_}"; else echo start; fi
}

# Count the attempts in a row that began at the same place. Sets record, place, stalls. The record lies next to the
# run folder, which must be empty until the run has started in it.
begin_attempt() {
  record=$output_dir.slurm_attempts
  place=$(newest_place)
  stalls=0
  local last_job last_place last_stalls
  if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -f $record ]]; then
    read -r last_job last_place last_stalls <"$record"
    [[ $last_job != "$job" || $last_place != "$place" ]] || stalls=$((last_stalls + 1))
  fi
  # SLURM itself requeues a job whose node failed; then nothing has looked at the attempt's end.
  [[ $stalls -le $max_stalls ]] || give_up 1
  mkdir -p "$(dirname "$record")"
  echo "$job $place $stalls" >"$record.partial"
  mv "$record.partial" "$record"
  say "attempt begins at: $place; restarts without progress: $stalls, allowed: $max_stalls"
}

# Run a command and wait for its end, whatever signals arrive meanwhile. Sets ranks_pid, code.
#   $1: function that is called with the name of each signal
run_ranks() {
  local on_signal=$1 signal interrupted=1
  shift
  for signal in USR1 USR2 TERM; do
    # shellcheck disable=SC2064 # the names of now
    trap "interrupted=1; say 'the batch shell received $signal'; $on_signal $signal" "$signal"
  done
  "$@" &
  ranks_pid=$!
  while [[ $interrupted == 1 ]]; do
    interrupted=0 code=0
    wait "$ranks_pid" || code=$?
  done
  trap : USR1 USR2 TERM
}

# After a stop or a crash put the job back into the queue, unless that is of no use; ends the script.
finish_job() {
  say "$(date --iso-8601=seconds) ranks ended with exit code $code; newest checkpoint at: $(newest_place)"
  case $code in
    0)
      rm -f "$record"
      exit 0
      ;;
    "$exit_user_error")
      say "not requeued: the message above says what has to be fixed"
      exit "$code"
      ;;
  esac
  if ! is_wanted; then
    say "not requeued by the batch file: the job was canceled, or SLURM has requeued it already"
    exit "$code"
  fi
  [[ $(newest_place) == "$place" ]] || stalls=-1
  [[ $((stalls + 1)) -le $max_stalls ]] || give_up "$code"
  if [[ $code == "$exit_stopped" ]]; then say "stopped on request; requeued"; else say "did not finish; requeued"; fi
  scontrol requeue "$job" || say "requeue refused, see above; to continue submit the same command again"
  exit "$code"
}

# Whether the job still runs or has met its time limit. SLURM would also take back one that a user has canceled.
is_wanted() {
  scontrol show job --oneliner "$job" | grep -qE ' (JobState=RUNNING|Reason=TimeLimit) '
}

give_up() {
  say "gave up after $((max_stalls + 1)) attempts in a row without a new checkpoint in $output_dir/checkpoints" \
    "(DAS_DS_MAX_STALLS=$max_stalls); fix the cause reported above and submit the same command again" >&2
  exit "$1"
}
