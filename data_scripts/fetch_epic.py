#!/usr/bin/env python
"""EPIC-Kitchens 100 as ActionFormer's authors pass it on: verb and noun annotations, SlowFast features (2304 numbers per 16 frames).

examples:
  python data_scripts/fetch_epic.py ~/Downloads/epic_kitchens.tar.gz           unpack to data/epic_kitchens and report
  python data_scripts/fetch_epic.py --url https://ADDRESS/epic_kitchens.tar.gz download first; the same again continues
  python data_scripts/fetch_epic.py                                            report what is in data/epic_kitchens
(annotations from the official CSVs: convert_epic.py)
"""
import sys

from releases import Release, main

RELEASES = {"slowfast": Release("epic_kitchens.tar.gz", "add9803756afd9a023bc9a9c547e0229", "epic_kitchens",
                                ("epic_kitchens_100_verb.json", "epic_kitchens_100_noun.json"), "features", "EPIC Kitchens 100", suffix=".npz")}


if __name__ == "__main__":
    sys.exit(main("fetch_epic", __doc__, RELEASES, None))
