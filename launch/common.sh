# shellcheck shell=bash
# What the launch scripts share; it is sourced.

# shellcheck disable=SC2034  # used by those who source it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=0

# A user's mistake: one line, WHERE: what is wrong; what to do.
die() {
  echo "error: $*" >&2
  exit 2
}

# The words as one line that bash reads back unchanged. Before bash sees a container's command, Kubernetes replaces
# $(NAME) and $$ in it; %q leaves a bare $ in $'...' alone, so there it becomes \044.
quote() {
  local word quoted dollar='\044' line=''
  for word in "$@"; do
    printf -v quoted %q "$word"
    if [[ $quoted == \$\'* ]]; then
      quoted=${quoted:2}
      quoted="\$'${quoted//\$/$dollar}"
    fi
    line+="${line:+ }$quoted"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry_run prints it, as it can be given to bash.
call() {
  if ((dry_run)); then show "$@"; else "$@"; fi
}

# Like quote, but easier to read where a word is itself a quoted line.
show() {
  local word line='' apostrophe="'\\''"
  for word in "$@"; do
    if [[ $word =~ [[:cntrl:]] ]]; then
      word=$(quote "$word")
    elif [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/$apostrophe}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# need_tool NAME WHERE_TO_GET_IT
need_tool() {
  ((dry_run)) || command -v "$1" >/dev/null || die "$1: is not installed; see $2"
}

# need_option NAME VALUE
need_option() {
  [[ -n $2 ]] || die "--$1: is missing; give --$1=..."
}

# need_name OPTION VALUE: what Google Cloud and Kubernetes take for a name.
need_name() {
  need_option "$1" "$2"
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1=$2: is no name; give up to 40 of a-z, 0-9 and -, beginning with a letter"
}

# need_number OPTION VALUE
need_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "--$1=$2: is no number; give digits"
}

# What is sure to fail is better refused here than after an hour in a queue.
need_train_arguments() {
  local argument workdir=''
  for argument in "$@"; do
    case $argument in
      # Without a --config, the run in it goes on.
      --workdir | --workdir=*) workdir=given ;;
    esac
  done
  [[ $workdir ]] || die "--workdir: is missing; give the arguments of simgr_jax.train after --"
}

# The comment at the head of the script, without its #.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
}
