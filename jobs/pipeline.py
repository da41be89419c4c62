"""Every stage of a recipe in order, as a Ray job; stages that are done are skipped.

    ray job submit --working-dir . -- python jobs/pipeline.py RECIPE.yaml [section.key=value ...]

On a cluster of several machines, run_dir is an absolute path on a file system that all of them mount.
"""

import sys

from longalign_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
