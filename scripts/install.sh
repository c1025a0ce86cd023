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
wanted="$version $(cat requirements.lock pyproject.toml scripts/install.sh | sha256sum | cut -d' ' -f1) $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  say "making .venv with Python $version"
  rm -rf .venv
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    rm -rf .venv
    # Debian and Ubuntu keep venv in a package of its own.
    if command -v apt-get >/dev/null; then
      say "installing python3-venv"
      as_root sh -c "apt-get update -qq && apt-get install -y -qq python$version-venv" >/dev/null 2>&1 || true
    fi
    "$python" -m venv .venv || fail "$python cannot make virtual environments; install python$version-venv"
  fi
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)

has_torch() { .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch')" 2>/dev/null; }

install_torch() {
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    say "installing torch $torch for the GPU"
    pip install -q "torch==$torch"
  elif [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    # On this platform the registry's torch brings gigabytes of CUDA, so a CPU build is looked for first.
    say "installing torch $torch, CPU build"
    pip install -q "torch==$torch+cpu" 2>/dev/null ||
      pip install -q --retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu" 2>/dev/null ||
      { say "no CPU build of torch $torch can be had here; installing the one with CUDA, which is large"; pip install -q "torch==$torch"; }
  else
    say "installing torch $torch"
    pip install -q "torch==$torch"
  fi
}

has_torch || install_torch
say "installing the locked packages"
pip install -q -r requirements.lock
pip install -q --no-deps --no-build-isolation -e .
printf '%s' "$wanted" >"$stamp"
say "ready: .venv/bin/lorikeet --help"
