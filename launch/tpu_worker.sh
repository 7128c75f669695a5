#!/usr/bin/env bash
# launch/tpu_vm.sh runs this on each worker of a TPU as
#
#     tpu_worker.sh setup [BUCKET] | run ARGUMENTS... | status [ARGUMENTS...] | logs | end | stop | reset
#
# It keeps these folders in the home folder:
#
#     simgr_jax/        the code; named simgr_jax.new/ until setup moves it
#     simgr_jax_venv/   the virtual environment
#     simgr_jax_run/    the latest run's arguments, log, pid (of its session) and exit_code; the run holds lock
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

venv=$HOME/simgr_jax_venv
state=$HOME/simgr_jax_run
mount_point=/mnt/bucket

running() {
  [[ -e $state/lock ]] && ! flock --nonblock "$state/lock" true
}

setup() {
  ! running || die "$HOSTNAME: a run is active; stop it first"
  rm -rf "$HOME/simgr_jax"
  mv "$HOME/simgr_jax.new" "$HOME/simgr_jax"
  # The images' own Python is too old; uv installs a newer one.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -e $venv/bin/python ]] || uv venv --quiet --python=3.12 "$venv"
  uv pip install --quiet --python="$venv/bin/python" 'jax[tpu]' --requirements="$HOME/simgr_jax/requirements.txt"
  [[ -z ${1:-} ]] || mount_bucket "$1"
}

mount_bucket() {
  if mountpoint --quiet "$mount_point"; then
    [[ $(findmnt --noheadings --output=SOURCE "$mount_point") == "$1" ]] ||
      die "$HOSTNAME: $mount_point has another bucket; delete the TPU, or sudo umount $mount_point on all workers"
    return
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$mount_point"
  sudo chown "$(id -u)" "$mount_point"
  # Without a metadata cache, each worker immediately sees what another has written.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$1" "$mount_point"
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A new machine first upgrades itself and holds apt's lock meanwhile.
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse
}

# Starts the run in a new session, which outlives the ssh connection and inherits the lock.
run() {
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock --nonblock 9 || die "$HOSTNAME: a run is already active; stop it first"
  rm -f "$state/exit_code"
  quote "$@" >"$state/arguments"
  setsid bash "$0" foreground "$@" </dev/null >>"$state/log" 2>&1 &
  echo $! >"$state/pid"
}

foreground() {
  cd "$HOME/simgr_jax"
  echo "== $(date): python -m simgr_jax.train $(quote "$@")"
  local code=0
  "$venv/bin/python" -m simgr_jax.train "$@" || code=$?
  echo "== $(date): ended $code"
  set_exit_code "$code"
}

set_exit_code() {
  echo "$1" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

# Prints simgr_jax: none | running | ended EXIT_CODE | ended stopped | lost (killed, or the machine restarted) | other
# (a run with other arguments than the given ones is active).
status() {
  local what=lost other=''
  [[ ! -e $state/arguments || $given == '' || $given == "$(<"$state/arguments")" ]] || other=yes
  if running; then
    what=${other:+other}
    what=${what:-running}
  elif [[ ! -e $state/arguments || $other ]]; then
    what=none
  elif [[ -e $state/exit_code ]]; then
    what="ended $(<"$state/exit_code")"
  fi
  echo "simgr_jax: $what on $HOSTNAME"
}

# Prints the log from its beginning and follows it until the run ends.
logs() {
  [[ -e $state/log ]] || die "$HOSTNAME: nothing has run here; see launch/tpu_vm.sh run"
  if running; then
    tail --lines=+1 --follow --pid="$(<"$state/pid")" "$state/log"
  else
    cat "$state/log"
  fi
  status
}

# Prints the end of the log of a run that did not succeed.
end() {
  if ! running && [[ $(status) != *' ended 0 '* && -e $state/log ]]; then
    echo "== $(status)"
    tail --lines=20 "$state/log"
  fi
}

stop() {
  if running; then
    set_exit_code stopped # First, so that up does not see a crash.
    kill -TERM -- "-$(<"$state/pid")" || true
    if ! flock --wait=30 "$state/lock" true; then
      kill -KILL -- "-$(<"$state/pid")" || true
      flock --wait=30 "$state/lock" true
    fi
  fi
  status
}

reset() {
  stop
  rm -f "$state/arguments" "$state/exit_code"
}

given=$(quote "${@:2}")
"$@"
