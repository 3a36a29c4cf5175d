#!/usr/bin/env bash
# Packs this checkout, the wheels it needs and three clips into one folder for a machine without network.
#
#   bash jobs/measure/gpu/pack.sh DIR [CLIPS]
#
# DIR/ray.txz (18 MB) and DIR/rest.txz (27 MB): pruned wheels for Python 3.12; kept if both exist
# DIR/project.tgz: HEAD of the checkout, without uncommitted changes
# DIR/clips: the files of the folder CLIPS; without CLIPS three rendered ones, kept if the folder exists
# DIR/*.sh: the scripts that run on the machine
# Needs pip, unzip, xz, gcc and binutils; to render clips, the project's environment (PYTHON=.venv/bin/python).
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: bash jobs/measure/gpu/pack.sh DIR [CLIPS]" >&2
  exit 2
fi
python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
kit=$(cd "$1" && pwd)
clips=${2:+$(cd "$2" && pwd)}
cd "$here/../../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What a machine with torch and transformers usually lacks, at the versions of constraints.txt.
NAMES="ray av decord pydantic pydantic_core s3fs fsspec aiobotocore botocore cronsim jsonschema
  jsonschema-specifications annotated-types typing-inspection jmespath aioitertools referencing rpds-py"

fetch() {
  mkdir "$work/wheels" "$work/ray" "$work/rest"
  local platforms=() name wheel
  for name in 2_28 2_24 2_17 2014 2010; do platforms+=(--platform "manylinux${name/#2_/_2_}_x86_64"); done
  for name in $NAMES; do
    "$python" -m pip -q download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" -d "$work/wheels" "$(grep -iE "^$name==" constraints.txt)"
  done
  for wheel in "$work"/wheels/*.whl; do
    case $(basename "$wheel") in
      ray-*) unzip -q -o "$wheel" -d "$work/ray" ;;
      *) unzip -q -o "$wheel" -d "$work/rest" ;;
    esac
  done
}

prune() {
  rm -rf "$work"/ray/ray/{jars,rllib,llm,tune,serve,workflow,setup-dev.py} \
    "$work"/ray/ray/dashboard/client "$work"/ray/ray/core/src/ray/thirdparty
  find "$work/rest/botocore/data" -mindepth 1 -maxdepth 1 -type d \
    ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
  # Stubs replace the HEVC and AV1 encoders (27 MB), which nothing calls. The H.264 encoder stays.
  stub libx265 x265_
  stub libSvtAv1Enc svt_
  # patchelf has changed the other libraries; strip breaks those.
  find "$work/ray" "$work/rest/av" "$work/rest/pydantic_core" -type f \
    \( -name '*.so' -o -name gcs_server -o -name raylet \) -print0 | xargs -0 -n1 strip --strip-unneeded
}

stub() { # LIBRARY PREFIX: functions of that prefix that libavcodec needs return 0
  local libraries=$work/rest/av.libs file
  file=$(basename "$libraries/$1"*)
  nm -D "$libraries"/libavcodec* \
    | awk -v prefix=" U $2" 'index($0, prefix) {print "long " $2 "(void) {return 0;}"}' > "$work/stub.c"
  gcc -shared -fPIC -Os -Wl,-soname,"$file" -o "$libraries/$file" "$work/stub.c"
}

if [ ! -e "$kit/ray.txz" ] || [ ! -e "$kit/rest.txz" ]; then
  fetch
  prune
  for part in ray rest; do tar -C "$work/$part" -cf - . | xz -T2 -9e > "$kit/$part.txz"; done
fi
git archive HEAD lightkv jobs pipeline configs tests pyproject.toml ':!jobs/results' | gzip -9 > "$kit/project.tgz"
cp "$here"/{setup,correctness,figures,caption_job}.sh "$kit/"
if [ -n "$clips" ]; then
  rm -rf "$kit/clips"
  cp -r "$clips" "$kit/clips"
elif [ ! -d "$kit/clips" ]; then
  "$python" - "$kit/clips" <<'END'
import sys
from pathlib import Path

from pipeline.mini.world import DemoStyle, render_demo

render_demo(Path(sys.argv[1]), 3, style=DemoStyle(width_px=448, height_px=448)).unlink()
END
fi
ls -la "$kit" "$kit/clips"
