#!/usr/bin/env bash
# On the machine with network, from the project's root: lays what a bare GPU machine lacks into .gpu_machine/, which git
# ignores: `wheels` (pydantic and what it needs, for that machine's Python). Take the project and this folder there.
#   bash benchmarks/gpu_machine/prepare.sh [PYTHON_VERSION]
set -euo pipefail
here=benchmarks/gpu_machine
if ! [ -f "$here/first.sh" ]; then
  echo "run this from the project's root: bash $here/prepare.sh" >&2
  exit 2
fi
rm -rf .gpu_machine
mkdir -p .gpu_machine/wheels
# --no-deps: torch and numpy are there; pydantic names the exact core that it needs, and constraints.txt has both
python3 -m pip download --quiet --no-deps --dest .gpu_machine/wheels --only-binary :all: --python-version "${1:-3.12}" \
  --platform manylinux2014_x86_64 --constraint <(grep -iE '^(pydantic|annotated|typing.inspection)' constraints.txt) \
  pydantic pydantic_core annotated-types typing-inspection
ls .gpu_machine/wheels
