#!/bin/bash
# Builds the container of launch/Dockerfile.
#
#   launch/container.sh --image=REGISTRY/save_jax:1 [--extra=cuda|tpu] [--push] [--dry_run]

set -euo pipefail

image='' extra=cuda push=false dry_run=false
for argument in "$@"; do
  case $argument in
    --image=*) image=${argument#*=} ;;
    --extra=cuda | --extra=tpu) extra=${argument#*=} ;;
    --push) push=true ;;
    --dry_run) dry_run=true ;;
    *)
      echo "error: $argument: expected --image=NAME, --extra=cuda|tpu, --push or --dry_run" >&2
      exit 2
      ;;
  esac
done
if [[ -z $image ]]; then
  echo "error: --image=NAME is required: the registry and the name of what is built" >&2
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
