#!/usr/bin/env python
"""THUMOS14 as ActionFormer's authors pass it on: annotations and I3D features (2048 numbers per 4 frames).

examples:
  python data_scripts/fetch_thumos.py ~/Downloads/thumos.tar.gz           unpack to data/thumos and report
  python data_scripts/fetch_thumos.py --url https://ADDRESS/thumos.tar.gz download first; the same again continues
  python data_scripts/fetch_thumos.py                                     report what is in data/thumos
"""
import sys

from releases import Release, main

RELEASES = {"i3d": Release("thumos.tar.gz", "375f76ffbf7447af1035e694971ec9b2", "thumos", ("thumos14.json",), "i3d_features", "THUMOS14")}


if __name__ == "__main__":
    sys.exit(main("fetch_thumos", __doc__, RELEASES, None))
