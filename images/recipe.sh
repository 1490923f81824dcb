# What every recipe under images/ shares: how it speaks, how it fails, and how it knows that there is nothing to do.
# Sourced, not run: `. "$(dirname "$0")/../recipe.sh"`.
#
# A recipe's output carries the hash of everything that went into it in a file beside it. `inputs_hash` makes that hash,
# `up_to_date` compares it, `mark_done` writes it, last of all: a recipe that was interrupted starts again.

IMAGES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=$IMAGES/out
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps mke2fs, for users too
export LC_ALL=C

# One line on what goes on, to the terminal, never into a recipe's output.
say() { printf '%s: %s\n' "$RECIPE" "$*" >&2; }

# The one line of a failure.
die() {
    printf '%s: error: %s\n' "$RECIPE" "$*" >&2
    exit 1
}

# need WHAT…: each a command, or a file by its absolute path; packages.txt knows who brings it.
need() {
    local what
    for what; do
        if [[ $what = /* ]]; then [[ -e $what ]] && continue; else command -v "$what" >/dev/null && continue; fi
        local package
        package=$(awk -v what="$what" '$2 == what { print $1 }' "$IMAGES/packages.txt")
        die "$what is missing; install it with: apt-get install ${package:-$what}"
    done
}

# inputs_hash TEXT FILE…: one hash over a text (versions, arguments) and the names and contents of files.
inputs_hash() {
    local text=$1
    shift
    { printf '%s\n' "$text"; cd "$IMAGES" && sha256sum -- "$@"; } | sha256sum | cut -c1-64
}

# up_to_date HASH MARK OUTPUT…: was MARK written for HASH, and are the outputs still there?
up_to_date() {
    local hash=$1 mark=$2 output
    shift 2
    [[ -f $mark && $(<"$mark") = "$hash" ]] || return 1
    for output; do [[ -e $output ]] || return 1; done
}

mark_done() { printf '%s\n' "$1" >"$2"; }

# One recipe at a time for one output: a second call waits, and then finds the work done.
take_turns() {
    mkdir -p "$(dirname "$1")"
    exec {turn}>"$1"
    flock -n "$turn" || { say "waiting for another run of this recipe"; flock "$turn"; }
}
