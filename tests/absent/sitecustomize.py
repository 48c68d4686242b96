"""Hide packages as if they were not installed, in this process and its children."""

import os
import sys
from importlib.machinery import PathFinder

ABSENT = {name.replace("-", "_") for name in os.environ["ABSENT"].split(",")}


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(*arguments, **options):
        found = PathFinder.find_distributions(*arguments, **options)
        return (each for each in found if each.name.replace("-", "_") not in ABSENT)


sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
