"""Disks that are full, fail, or are slow, under real runs of the tiny recipe."""
