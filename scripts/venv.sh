# Sourced by scripts/run and scripts/test: make .venv and install what is asked for, once.
# shellcheck shell=bash

# ensure_extras a,b,c: install steersman with these extras unless exactly this was done before.
# The stamp holds the extras and the dependency files, so a changed pyproject.toml installs again.
ensure_extras() {
  local want stamp="$root/.venv/.steersman-extras" extra
  want=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
  if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$want" ]; then
    local missing=""
    for extra in ${1//,/ }; do
      grep -qx "$extra" "$stamp" || missing=1
    done
    [ -z "$missing" ] && return 0
  fi
  command -v c++ >/dev/null || {
    echo "steersman: no C++ compiler found; install one (Debian: apt-get install g++," \
      "macOS: xcode-select --install) and run this again" >&2
    exit 3
  }
  local python
  python=$(find_python)
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  # llama.cpp is compiled here; its multimodal and download parts are not used.
  export CMAKE_ARGS="${CMAKE_ARGS:--DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_CURL=OFF}"
  export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}"
  echo "steersman: installing [$1] into .venv (once; the llama.cpp engine is compiled here," \
    "which takes some minutes)" >&2
  local log="$root/.venv/install.log"
  if ! { "$root/.venv/bin/python" -m pip install --upgrade pip &&
    "$root/.venv/bin/python" -m pip install -c "$root/constraints.txt" -e "$root[$1]"; } \
    >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "steersman: installation failed; the whole log is in .venv/install.log" >&2
    exit 3
  fi
  { echo "$want"; { [ -f "$stamp" ] && tail -n +2 "$stamp"; tr ',' '\n' <<<"$1"; } | sort -u; } \
    >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# The first Python of a supported version.
find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$name"
      return 0
    fi
  done
  echo "steersman: Python 3.11, 3.12 or 3.13 is needed" >&2
  exit 3
}
