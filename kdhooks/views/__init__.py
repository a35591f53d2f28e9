"""Views of the trainer's images that the student sees in their place."""
