# What the scripts share: where things are, how they speak, and how they install what is missing. Sourced, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=$ROOT/images/out
VMM=${CARGO_TARGET_DIR:-$ROOT/target}/release/vmm
export LC_ALL=C
PATH=$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin

if [[ -t 2 ]]; then BOLD=$'\e[1m' PLAIN=$'\e[0m'; else BOLD='' PLAIN=''; fi

# What goes on, for the person who waits.
say() { printf '%s==> %s%s\n' "$BOLD" "$*" "$PLAIN" >&2; }

# The one line of a failure.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# step TEXT COMMAND…: says what is done and how long it took; a command that fails ends the script, its output having been shown.
step() {
    local text=$1 start=$SECONDS
    shift
    say "$text"
    "$@" || die "this failed: $*"
    ((SECONDS - start < 2)) || say "$text: done in $((SECONDS - start)) s"
}

# as_root COMMAND…
as_root() {
    if [[ $(id -u) = 0 ]]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else die "needs root (or sudo) for: $*"; fi
}

# install_packages LIST…: Debian packages that are missing, of lists whose lines are "package what-shows-that-it-is-there".
install_packages() {
    local package shows missing=()
    while read -r package shows; do
        [[ $package && $package != \#* ]] || continue
        if [[ $shows = /* ]]; then [[ -e $shows ]]; else command -v "$shows" >/dev/null; fi || missing+=("$package")
    done < <(cat "$@")
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || die "these Debian packages are missing, and there is no apt-get to install them: ${missing[*]}"
    say "installing ${missing[*]}"
    as_root apt-get update -q >/dev/null || die "apt-get update failed"
    DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt-get could not install: ${missing[*]}"
}

# The Rust toolchain. Debian's own is too old; rustup is how Rust is installed.
need_rust() {
    command -v cargo >/dev/null || die "cargo is missing: install Rust 1.95 or newer from https://rustup.rs, then run this again"
}

# flavour: which kernel suits this host. Asks vmm, which asks KVM.
flavour() {
    local mode
    mode=$("$VMM" info --json | sed -n 's/.*"kernel_mode": *"\([a-z]*\)".*/\1/p')
    case $mode in emulated) echo emulated ;; *) echo hardened ;; esac
}

# build_vmm: the agent and the vmm that carries it. cargo and the recipe know whether there is anything to do.
build_vmm() {
    "$ROOT/images/initramfs/build" || die "the agent could not be built"
    # What cargo would look at, by name, time and size: asking cargo itself costs a third of a second.
    local inputs mark=$OUT/vmm.inputs
    inputs=$(cd "$ROOT" && find Cargo.toml Cargo.lock devices vmm guest/protocol images/out/initramfs.cpio -type f \
        -printf '%p %s %T@\n' | sort | sha256sum)
    if [[ -x $VMM && -f $mark && $(<"$mark") = "$inputs" ]]; then return; fi
    step "building vmm (a minute or two the first time)" cargo build --quiet --release -p vmm-cli --manifest-path "$ROOT/Cargo.toml"
    printf '%s\n' "$inputs" >"$mark"
}

# build_guest FLAVOUR: its kernel and the sample container.
build_guest() {
    "$ROOT/images/kernel/build" "$1" || die "the kernel could not be built"
    "$ROOT/images/rootfs/build" || die "the sample container could not be built"
}
