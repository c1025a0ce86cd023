#!/usr/bin/env bash
# Makes .venv: Python, torch (a CPU build where there is no GPU), the locked packages, Lorikeet itself.
# Run again it takes up where it stopped; up to date, it ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

say() { printf '%s\n' "$*" >&2; }
fail() { say "install: $*"; exit 3; }

command -v "$python" >/dev/null || fail "$python is not there; install Python 3.11 to 3.13, or name one: make install PYTHON=python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12 | 3.13) ;;
  *) fail "Python $version will not do; 3.11 to 3.13 will: make install PYTHON=python3.12" ;;
esac

stamp=.venv/.lorikeet-installed
# Python hashes, because sha256sum is not on every Mac.
digest=$(cat requirements.lock pyproject.toml scripts/install.sh |
  "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
wanted="$version $digest $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

made_with=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
if [ "$made_with" != "$version" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  say "making .venv with Python $version"
  rm -rf .venv
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian and Ubuntu keep them in a package of its own.
    if command -v apt-get >/dev/null; then
      say "installing python$version-venv"
      as_root sh -c "apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python$version-venv" >/dev/null 2>&1 || true
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python$version-venv)"
  fi
  "$python" -m venv .venv || fail "could not make .venv with $python"
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)

has_torch() { .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch')" 2>/dev/null; }

install_torch() {
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    say "installing torch $torch for the GPU"
    pip install -qq "torch==$torch"
  elif [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    # On this platform the registry's torch brings gigabytes of CUDA, so a CPU build is looked for first.
    say "installing torch $torch, CPU build"
    pip install -qq --retries 1 "torch==$torch+cpu" 2>/dev/null ||
      pip install -qq --retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null ||
      { say "no CPU build of torch $torch can be had here; installing the one with CUDA, which is large"; pip install -qq "torch==$torch"; }
  else
    say "installing torch $torch"
    pip install -qq "torch==$torch"
  fi
}

has_torch || install_torch
say "installing the locked packages; a few minutes the first time"
pip install -qq -r requirements.lock
pip install -qq --no-deps --no-build-isolation -e .
printf '%s' "$wanted" >"$stamp"
say "ready: .venv/bin/lorikeet --help"
