"""The OpenAI-compatible endpoint of a run, as a Ray job that serves until it is stopped.

    ray job submit --working-dir . -- python jobs/serve.py RECIPE.yaml [section.key=value ...]

On a cluster of several machines, run_dir is an absolute path on a file system that all of them mount.
"""

import sys

from longalign_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
