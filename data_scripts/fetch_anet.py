#!/usr/bin/env python
"""ActivityNet 1.3 as ActionFormer's authors pass it on: annotations, and TSP (512) or I3D (2048) features of every 16 frames.

examples:
  python data_scripts/fetch_anet.py ~/Downloads/anet_1.3.tar.gz                               TSP, to data/anet_1.3
  python data_scripts/fetch_anet.py --features i3d --url https://ADDRESS/anet_1.3_i3d.tar.gz  I3D, beside it
  python data_scripts/fetch_anet.py --features i3d                                            report what is there
"""
import sys

from releases import Release, main

SCORES = "cuhk_val_simp_share.json"   # class scores of whole videos, for score fusion; used with I3D too
RELEASES = {
    "tsp": Release("anet_1.3.tar.gz", "c415f50120b9425ee1ede9ac3ce11203", "anet_1.3", ("anet1.3_tsp_filtered.json",), "tsp_features", "ActivityNet 1.3", "v_", others=(SCORES,)),
    "i3d": Release("anet_1.3_i3d.tar.gz", "e649425954e0123401650312dd0d56a7", "anet_1.3", ("anet1.3_i3d_filtered.json",), "i3d_features", "ActivityNet 1.3", "v_")}


if __name__ == "__main__":
    sys.exit(main("fetch_anet", __doc__, RELEASES, None))
