"""Test sets of face verification: pairs of images, and whether each is of one person."""
