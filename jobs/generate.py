"""Answers to a file of requests, as a Ray job: the engines of `serve`, and no HTTP between.

    ray job submit --working-dir . -- python jobs/generate.py RECIPE.yaml generate.requests=/shared/requests.jsonl

On a cluster of several machines, run_dir, the requests and generate.output are on a file system that all of them mount.
"""

import sys

from longalign_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
