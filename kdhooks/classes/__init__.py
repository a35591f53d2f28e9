"""Scores of many classes: classifier rows split over ranks, compared a chunk at a time."""
