# Sourced by the other scripts: makes the virtual environments they work in.

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

heading() {
  printf '\n== %s\n' "$*"
}

# maven ARGUMENT...: quietly; a download that stalls for a minute is tried again. Maven itself would wait half an hour.
maven() {
  mvn --quiet --batch-mode --no-transfer-progress -Dmaven.wagon.rto=60000 -Dmaven.wagon.http.retryHandler.count=5 "$@"
}

# Prints the command of a Python that the pins work with.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' \
      2>/dev/null; then
      "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$candidate has no venv module; on Debian: apt-get install python3-venv"
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "Python 3.11, 3.12 or 3.13 is needed and none was found; on Debian: apt-get install python3 python3-venv"
}

# Prints the pins of file $1, in which the lines of file $2 replace those of the same names.
merge_pins() {
  awk -F '==' '
    function key(name) { name = tolower(name); gsub(/[-_.]+/, "-", name); return name }
    /^(#|$)/ { next }
    NR == FNR { override[key($1)] = 1; print; next }
    !(key($1) in override)
  ' "$2" "$1"
}

# Prints the lower bounds that pyproject.toml gives for the package and the extras $@, as pins.
oldest_pins() {
  "$(find_python)" - "$@" <<'PYTHON'
import re, sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
requirements = [*project["dependencies"]]
for extra in sys.argv[1:]:
    requirements += project["optional-dependencies"][extra]
for requirement in requirements:
    bound = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
    if not bound:
        sys.exit(f"error: {requirement} in pyproject.toml has no lower bound; write it as NAME>=VERSION")
    print(f"{bound[1]}=={bound[2]}")
PYTHON
}

# make_environment DIR PINS REQUIREMENT...: a virtual environment DIR with the REQUIREMENTs, pinned
# by the file PINS. Nothing is done where the same was installed from the same files before.
make_environment() {
  local directory=$1 pins=$2 python stamp stamp_file
  shift 2
  if ! "$directory/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || exit 1
    printf 'making %s with %s\n' "$directory" "$("$python" --version)"
    "$python" -m venv "$directory"
  fi
  # One stamp for each set of requirements: scripts/check and scripts/demo share .venv.
  stamp_file=$directory/.installed-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)
  stamp=$(cat pyproject.toml setup.py "$pins" | cksum)
  if [[ -f $stamp_file && $(<"$stamp_file") == "$stamp" ]]; then
    printf '%s is up to date\n' "$directory"
    return
  fi
  printf 'installing into %s: %s\n' "$directory" "$*"
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" "$@"
  printf '%s\n' "$stamp" >"$stamp_file"
}
