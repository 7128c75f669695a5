# shellcheck shell=bash
# Functions that the launch scripts share. Source this file.

# shellcheck disable=SC2034  # used by the scripts that source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=0

# Reports a user's mistake in one line: WHERE: what is wrong; what to do.
die() {
  echo "error: $*" >&2
  exit 2
}

# Prints the words as one line that bash reads back unchanged. Kubernetes replaces $(NAME) and $$ in a container's
# command before bash sees it, and %q does not escape a $ inside $'...', so it is written as \044 there.
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

# Runs a command; with --dry_run, prints it in a form that bash can run.
call() {
  if ((dry_run)); then show "$@"; else "$@"; fi
}

# Like quote, but easier to read if a word is itself a quoted line.
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
  ((dry_run)) || command -v "$1" >/dev/null || die "$1: is not installed; get it from $2"
}

# need_option NAME VALUE
need_option() {
  [[ -n $2 ]] || die "--$1: is missing; give --$1=..."
}

# need_name OPTION VALUE: checks a name by the rules of Google Cloud and Kubernetes.
need_name() {
  need_option "$1" "$2"
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1=$2: is not a valid name; give up to 40 of a-z, 0-9 and -, starting with a letter"
}

# need_number OPTION VALUE
need_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "--$1=$2: is not a number; give digits only"
}

# Refuses arguments that are sure to fail now, not after an hour in a queue.
need_train_arguments() {
  local argument workdir=''
  for argument in "$@"; do
    case $argument in
      # --config may be missing: the run in the workdir then continues.
      --workdir | --workdir=*) workdir=given ;;
    esac
  done
  [[ $workdir ]] || die "--workdir: is missing; give the arguments of simgr_jax.train after --"
}

# Prints the comment at the top of the script without its #.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
}
