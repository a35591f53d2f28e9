"""What the student sees in place of the trainer's images: other views of the same faces."""
