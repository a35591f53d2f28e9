"""State and scores of many classes, which are split over ranks and computed in chunks."""
