#!/bin/bash
# Builds the container image of launch/Dockerfile.
#
#   launch/container.sh --image=REGISTRY/save_jax:1 [--extra=cuda|tpu] [--push] [--dry_run]
#
#   --image=NAME        registry, name and tag of the image
#   --extra=cuda|tpu    for GPUs (default) or TPUs
#   --push              push the image to its registry
#   --dry_run           print every command, run none
#
# Exit codes: 0 done; 2 a mistake in what you gave; otherwise docker's own.

set -euo pipefail

image='' extra=cuda push=false dry_run=false
for argument in "$@"; do
  case $argument in
    --image=*) image=${argument#*=} ;;
    --extra=cuda | --extra=tpu) extra=${argument#*=} ;;
    --push) push=true ;;
    --dry_run) dry_run=true ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *)
      echo "error: $argument: expected --image=NAME, --extra=cuda|tpu, --push or --dry_run" >&2
      exit 2
      ;;
  esac
done
if [[ -z $image ]]; then
  echo "error: --image=NAME is required, such as --image=REGISTRY/save_jax:1" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

do_it() {
  printf '%q ' "$@"
  echo
  if ! $dry_run; then "$@"; fi
}

do_it docker build --file=launch/Dockerfile --build-arg="EXTRA=$extra" --tag="$image" .
if $push; then do_it docker push "$image"; fi
